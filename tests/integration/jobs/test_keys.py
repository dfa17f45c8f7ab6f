"""API keys: made, checked, rotated, revoked."""

from __future__ import annotations

import hashlib
import re
from uuid import uuid4

import pytest

from jobs import keys as keys_module
from jobs.database import Database
from jobs.errors import Forbidden, NotFound, Unauthorized
from jobs.keys import CACHE_SECONDS, ApiKey, Keys, Role, digest_of
from kit.contract import Tables

REVOKED_WITHIN_SECONDS = 5.0


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keys_module, "time", clock)
    return clock


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


def test_a_secret_is_its_holders_key(keys: Keys) -> None:
    """Whoever shows the secret is who it was made for, with everything that was said."""
    key, secret = keys.create(
        "acme", tier="premium", models=["echo", "qwen"], roles=[Role.READ], quota_tokens_per_minute=500
    )
    assert keys.authenticate(secret) == key == ApiKey(key.id, "acme", "premium", ("echo", "qwen"), {Role.READ}, 500)


def test_by_default_a_key_hands_in_and_reads_without_a_limit(keys: Keys) -> None:
    """What is not said is every model, no limit, and no administration."""
    key, secret = keys.create("acme")
    assert keys.authenticate(secret) == key
    assert (key.models, key.tier, key.quota_tokens_per_minute) == (None, None, None)
    assert key.roles == {Role.SUBMIT, Role.READ}


def test_secrets_have_at_least_128_bits(keys: Keys) -> None:
    """32 random bytes after the prefix, and no two alike."""
    made = {keys.create("acme")[1] for _ in range(20)}
    assert len(made) == 20
    assert all(re.fullmatch(r"hr-[A-Za-z0-9_-]{43}", secret) for secret in made)


def test_no_table_holds_a_secret(keys: Keys, tables: Tables) -> None:
    """Only its digest is kept."""
    _, secret = keys.create("acme")
    [row] = tables.rows("SELECT * FROM api_keys")
    assert bytes(row["digest"]) == hashlib.sha256(secret.encode()).digest()
    assert secret.removeprefix("hr-") not in str(row)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s + "a", lambda s: s.removeprefix("hr-"), str.upper])
def test_what_is_nearly_a_secret_is_none(keys: Keys, change: object) -> None:
    """One character makes a stranger."""
    _, secret = keys.create("acme")
    with pytest.raises(Unauthorized):
        keys.authenticate(change(secret))  # type: ignore[operator]


@pytest.mark.parametrize("secret", ["", "hr-", "\0", "\ud800", "'; DROP TABLE api_keys; --", "hr-" + "x" * 100_000])
def test_nonsense_is_refused(keys: Keys, secret: str) -> None:
    """Whatever is shown instead of a secret, the answer is the same."""
    with pytest.raises(Unauthorized):
        keys.authenticate(secret)


def test_a_revoked_key_is_refused_at_once_here_and_soon_elsewhere(database: Database, clock: Clock) -> None:
    """Who revokes sees it at once, another process as soon as it looks again, which is within 5 s."""
    here, elsewhere = Keys(database), Keys(database)
    key, secret = here.create("acme")
    assert elsewhere.authenticate(secret) == here.authenticate(secret) == key
    here.revoke(key.id)
    with pytest.raises(Unauthorized):
        here.authenticate(secret)
    clock.now += CACHE_SECONDS
    with pytest.raises(Unauthorized):
        elsewhere.authenticate(secret)
    assert CACHE_SECONDS < REVOKED_WITHIN_SECONDS


def test_a_key_is_not_looked_up_at_every_request(database: Database, clock: Clock, transactions: list[object]) -> None:
    """Within seconds one look is enough."""
    keys = Keys(database)
    key, secret = keys.create("acme")
    keys.authenticate(secret)
    before = len(transactions)
    for _ in range(10):
        keys.authenticate(secret)
    assert keys.remembered(digest_of(secret)) == key
    assert len(transactions) == before
    clock.now += CACHE_SECONDS
    assert keys.remembered(digest_of(secret)) is None
    keys.authenticate(secret)
    assert len(transactions) == before + 1


def test_strangers_leave_nothing_in_memory(keys: Keys) -> None:
    """Whoever tries secrets without end fills no cache."""
    for number in range(10):
        with pytest.raises(Unauthorized):
            keys.authenticate(f"hr-{number}")
    assert keys._cache == {}


def test_the_cache_has_an_end(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many keys in use the oldest are looked up again."""
    monkeypatch.setattr(keys_module, "_CACHED_KEYS", 2)
    for _ in range(4):
        keys.authenticate(keys.create("acme")[1])
    assert len(keys._cache) == 2


def test_a_rotated_key_is_the_same_under_a_new_secret(keys: Keys) -> None:
    """Id, tenant, roles and quota stay; the old secret is a stranger's."""
    key, old = keys.create("acme", quota_tokens_per_minute=7)
    keys.authenticate(old)
    rotated, new = keys.rotate(key.id)
    assert rotated == keys.authenticate(new) == key
    with pytest.raises(Unauthorized):
        keys.authenticate(old)


def test_what_is_revoked_cannot_be_rotated(keys: Keys) -> None:
    """Nothing brings a revoked key back; to revoke it again changes nothing."""
    key, _ = keys.create("acme")
    keys.revoke(key.id)
    [record] = keys.list()
    keys.revoke(key.id)
    assert keys.list() == [record]
    with pytest.raises(NotFound):
        keys.rotate(key.id)


def test_an_unknown_id_is_told(keys: Keys) -> None:
    """A mistyped id is an error, not a silent success."""
    for change in (keys.revoke, keys.rotate):
        with pytest.raises(NotFound):
            change(uuid4())


def test_keys_are_listed_without_their_secrets(keys: Keys) -> None:
    """The newest first, of one tenant or of all, the revoked ones marked."""
    first, _ = keys.create("acme")
    second, secret = keys.create("zeta")
    keys.revoke(first.id)
    assert [record.key for record in keys.list()] == [second, first]
    assert [record.key for record in keys.list("acme")] == [first]
    assert [record.revoked_at is None for record in keys.list()] == [True, False]
    assert secret not in repr(keys.list())


def test_a_role_is_required() -> None:
    """A key does what its roles say; an admin does everything."""
    reader = ApiKey(uuid4(), "acme", roles=frozenset({Role.READ}))
    reader.require(Role.READ)
    with pytest.raises(Forbidden):
        reader.require(Role.SUBMIT)
    admin = ApiKey(uuid4(), "acme", roles=frozenset({Role.ADMIN}))
    for role in Role:
        admin.require(role)


def test_a_model_is_required() -> None:
    """A key for some models is for no other."""
    key = ApiKey(uuid4(), "acme", models=("echo",))
    key.require_model("echo")
    with pytest.raises(Forbidden):
        key.require_model("qwen")
    ApiKey(uuid4(), "acme").require_model("qwen")
