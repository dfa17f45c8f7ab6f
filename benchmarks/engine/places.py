"""Where models and other engines' environments are kept between runs. Standard library only."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """Ours in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def peer_folder(name: str) -> Path:
    """The environment of one other engine."""
    return cache_folder() / "peers" / name


def peer_python(name: str) -> Path | None:
    """Its interpreter; None if `make bench-peers` has not made it."""
    python = peer_folder(name) / "bin" / "python"
    return python if (peer_folder(name) / ".installed").exists() and python.exists() else None
