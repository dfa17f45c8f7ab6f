"""Signatures: known again, and nothing else is."""

from __future__ import annotations

import hashlib
import hmac
import logging

import pytest

from jobs.signing import MessageSigner, Purpose, Signer

SECRET = "0123456789abcdef0123456789abcdef"


def test_a_signature_is_known_again() -> None:
    """Of the same parts, by anybody with the same secret and purpose."""
    signature = Signer(SECRET, Purpose.MESSAGES).sign("run", "id")
    assert Signer(SECRET, Purpose.MESSAGES).knows(signature, "run", "id")


def test_it_is_hmac_sha256_under_a_key_of_its_own() -> None:
    """The secret itself signs nothing: each purpose has a key made from it."""
    key = hmac.digest(SECRET.encode(), b"headrace tenants", "sha256")
    expected = hmac.new(key, b"acme", hashlib.sha256).hexdigest()
    assert Signer(SECRET, Purpose.TENANTS).sign("acme") == expected


@pytest.mark.parametrize(
    ("secret", "purpose", "parts"),
    [
        (SECRET, Purpose.MESSAGES, ("run", "other")),
        (SECRET, Purpose.MESSAGES, ("runid",)),
        (SECRET, Purpose.MESSAGES, ("ru", "nid")),
        (SECRET, Purpose.TENANTS, ("run", "id")),
        (SECRET[::-1], Purpose.MESSAGES, ("run", "id")),
    ],
)
def test_what_differs_is_not_known(secret: str, purpose: Purpose, parts: tuple[str, ...]) -> None:
    """Another text, other parts of the same text, another purpose, another secret."""
    assert not Signer(SECRET, Purpose.MESSAGES).knows(Signer(secret, purpose).sign(*parts), "run", "id")


@pytest.mark.parametrize("nonsense", [None, 7, b"0" * 64, "", "0" * 64, "\u00e9" * 64, "\ud800", ["a"], "0" * 10_000])
def test_nonsense_is_not_known(nonsense: object) -> None:
    """Whatever comes instead of a signature is no error, only none."""
    assert not Signer(SECRET, Purpose.MESSAGES).knows(nonsense, "run", "id")


def test_any_text_can_be_signed() -> None:
    """Also what UTF-8 cannot write."""
    signer = Signer(SECRET, Purpose.MESSAGES)
    assert signer.knows(signer.sign("run", "\ud800"), "run", "\ud800")


def test_a_flood_of_forgeries_is_counted_and_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Each of the first has a line, and later every thousandth; the count is of all."""
    signer = MessageSigner(SECRET)
    with caplog.at_level(logging.WARNING):
        for _ in range(2_000):
            assert not signer.accepts("forged", "run", "id")
        assert signer.accepts(signer.sign("run", "id"), "run", "id")
    assert signer.refused == 2_000
    assert len(caplog.records) == 12
    assert caplog.messages[-1].endswith("2000 so far")
