"""Secrets of the whole suite, that no test's output and no worker's log may hold."""

from __future__ import annotations

_SECRETS: set[str] = set()


def watch(*secrets: str | None) -> None:
    """From now on these are looked for."""
    _SECRETS.update(secret for secret in secrets if secret)


def has_leaked(text: str) -> bool:
    """Whether any of them is in it."""
    return any(secret in text for secret in _SECRETS)
