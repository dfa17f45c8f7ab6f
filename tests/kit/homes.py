"""Homes for servers of a test's own, gone without a trace afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.places import Place


@contextmanager
def temporary_home(name: str = "home") -> Iterator[Path]:
    """A home that does not exist yet. It goes at the end, and so do its servers' data, wherever they lie.

    Whoever starts servers in it stops them first.
    """
    above = Path(tempfile.mkdtemp(prefix="headrace-test-"))
    home = above / name
    try:
        yield home
    finally:
        shutil.rmtree(Place.of(home).folder, ignore_errors=True)
        shutil.rmtree(above)
