"""API keys in SQL: made, checked, rotated, revoked.

A secret is shown once and kept as its SHA-256. A slow, salted hash is for passwords, which people choose: a secret of
256 random bits cannot be guessed however quick the hash is, no table of digests holds it, and requests are many.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.database import Database
from jobs.errors import Forbidden, NotFound, Unauthorized
from jobs.ids import new_id
from jobs.states import Role

__all__ = ["ApiKey", "KeyRecord", "Keys", "Role", "digest_of"]

_PREFIX = "hr-"
_SECRET_BYTES = 32
# A key is looked up again after this long: less than the 5 s within which a revoked one must be refused everywhere.
CACHE_SECONDS = 4.0
_CACHED_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What its holder may do, and for whom."""

    id: UUID
    tenant_id: str
    tier: str | None = None
    models: tuple[str, ...] | None = None  # None: every model
    roles: frozenset[Role] = frozenset({Role.SUBMIT, Role.READ})
    quota_tokens_per_minute: int | None = None  # None: no limit

    def require(self, role: Role) -> None:
        """Raises Forbidden unless the key has this role; an admin has all."""
        if role not in self.roles and Role.ADMIN not in self.roles:
            raise Forbidden(f"this key has not the role {role}")

    def require_model(self, model: str) -> None:
        """Raises Forbidden unless the key is for this model."""
        if self.models is not None and model not in self.models:
            raise Forbidden(f"this key is not for the model {model!r}")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key in a list. Its secret is not known any more."""

    key: ApiKey
    created_at: datetime
    rotated_at: datetime | None
    revoked_at: datetime | None


class Keys:
    """Every change of and look at an API key. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._cache: dict[bytes, tuple[ApiKey, float]] = {}  # by digest: the key, and until when it is believed
        self._lock = threading.Lock()

    def authenticate(self, secret: str) -> ApiKey:
        """Whose secret this is. Raises Unauthorized. An answer is at most `CACHE_SECONDS` old."""
        return self.by_digest(digest_of(secret))

    def by_digest(self, digest: bytes) -> ApiKey:
        """The same, of a secret that was shown before and that nobody should have to keep."""
        return self.remembered(digest) or self._look_up(digest, time.monotonic())

    def remembered(self, digest: bytes) -> ApiKey | None:
        """The same without a look into Postgres; None if that is what it takes."""
        with self._lock:
            key, until = self._cache.get(digest, (None, 0.0))
        return key if time.monotonic() < until else None

    def has_met(self, digest: bytes) -> bool:
        """Whether it was some key's when it was last looked up."""
        with self._lock:
            return digest in self._cache

    def _look_up(self, digest: bytes, asked_at: float) -> ApiKey:
        row = self.database.row(_FIND, {"digest": digest})
        known = row is not None and hmac.compare_digest(row.digest, digest)
        with self._lock:
            self._cache.pop(digest, None)
            if not known:
                raise Unauthorized("no such API key, or it was revoked")
            key = _key_of(row)
            self._cache[digest] = (key, asked_at + CACHE_SECONDS)
            if len(self._cache) > _CACHED_KEYS:
                del self._cache[next(iter(self._cache))]
        return key

    def create(
        self,
        tenant_id: str,
        *,
        tier: str | None = None,
        models: Iterable[str] | None = None,
        roles: Iterable[Role] = (Role.SUBMIT, Role.READ),
        quota_tokens_per_minute: int | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which nobody can tell again."""
        allowed = None if models is None else tuple(models)
        key = ApiKey(new_id(), tenant_id, tier, allowed, frozenset(roles), quota_tokens_per_minute)
        secret = _new_secret()
        self.database.run(lambda connection: _create(connection, key, secret))
        return key, secret

    def list(self, tenant_id: str | None = None) -> list[KeyRecord]:
        """Keys of a tenant or of all, revoked ones too, the newest first."""
        return [_record_of(row) for row in self.database.rows(_LIST, {"tenant": tenant_id})]

    def revoke(self, key_id: UUID) -> None:
        """Refused everywhere within 5 s, here at once. May be repeated. Raises NotFound."""
        if self.database.row(_REVOKE, {"id": key_id}) is None:
            raise _unknown(key_id)
        self._forget(key_id)

    def rotate(self, key_id: UUID) -> tuple[ApiKey, str]:
        """The same key under a new secret; the old one is refused as if it were revoked. Raises NotFound."""
        secret = _new_secret()
        row = self.database.row(_ROTATE, {"id": key_id, "digest": digest_of(secret)})
        if row is None:
            raise _unknown(key_id)
        self._forget(key_id)
        return _key_of(self.database.row(_FIND, {"digest": digest_of(secret)})), secret

    def _forget(self, key_id: UUID) -> None:
        with self._lock:
            self._cache = {digest: found for digest, found in self._cache.items() if found[0].id != key_id}


def _new_secret() -> str:
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _unknown(key_id: UUID) -> NotFound:
    return NotFound(f"no key {key_id} that is not revoked")


def _create(connection: Connection, key: ApiKey, secret: str) -> None:
    fields = {
        "id": key.id,
        "tenant": key.tenant_id,
        "digest": digest_of(secret),
        "tier": key.tier,
        "models": None if key.models is None else list(key.models),
        "roles": sorted(key.roles),
        "quota": key.quota_tokens_per_minute,
    }
    connection.execute(_CREATE, fields)
    if key.quota_tokens_per_minute is not None:
        connection.execute(_LIMIT, fields)


def _key_of(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        tenant_id=row.tenant_id,
        tier=row.tier,
        models=None if row.models is None else tuple(row.models),
        roles=frozenset(Role(role) for role in row.roles),
        quota_tokens_per_minute=row.tokens_per_minute,
    )


def _record_of(row: Any) -> KeyRecord:
    return KeyRecord(_key_of(row), row.created_at, row.rotated_at, row.revoked_at)


_COLUMNS = "k.id, k.tenant_id, k.tier, k.models, k.roles, q.tokens_per_minute"

# A function, because a gateway may not look into the table (`jobs.access`).
_FIND = text("SELECT * FROM headrace_key(:digest)")

_CREATE = text("""
INSERT INTO api_keys (id, tenant_id, digest, tier, models, roles)
VALUES (:id, :tenant, :digest, :tier, CAST(:models AS text[]), CAST(:roles AS text[]))
ON CONFLICT (id) DO NOTHING
""")

_LIMIT = text("""
INSERT INTO quotas (key_id, tenant_id, tokens_per_minute) VALUES (:id, :tenant, :quota) ON CONFLICT (key_id) DO NOTHING
""")

_LIST = text(f"""
SELECT {_COLUMNS}, k.created_at, k.rotated_at, k.revoked_at FROM api_keys k LEFT JOIN quotas q ON q.key_id = k.id
WHERE CAST(:tenant AS text) IS NULL OR k.tenant_id = :tenant
ORDER BY k.id DESC
""")  # noqa: S608 - composed of constants

_REVOKE = text("UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = :id RETURNING id")

_ROTATE = text("""
UPDATE api_keys SET digest = :digest, rotated_at = now() WHERE id = :id AND revoked_at IS NULL RETURNING id
""")
