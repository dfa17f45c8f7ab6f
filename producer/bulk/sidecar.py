"""The file beside OUT that ties it to its batch while the run is not finished: `OUT.headrace`.

It is written before the batch exists and removed after OUT is in place, so whoever finds it can go on. A lock on it,
which ends with its process, keeps two commands from the same OUT. It is overwritten in place, for a renamed file would
not be the locked one; torn by a crash it counts as none, and rightly: no batch can exist before it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import orjson

from producer.bulk.errors import BulkRefused

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """Which batch an unfinished output belongs to, and what it was made from."""

    batch_id: UUID
    sha256: str  # of the input's content
    input_bytes: int
    options: dict[str, Any]

    def differences(self, other: Link) -> list[str]:
        """What the other one has differently, in words."""
        found = [] if (self.sha256, self.input_bytes) == (other.sha256, other.input_bytes) else ["the input's content"]
        for name in sorted(self.options.keys() | other.options.keys()):
            ours, theirs = self.options.get(name), other.options.get(name)
            if ours != theirs:
                found.append(f"{name} (it was {_shown(ours)}, now {_shown(theirs)})")
        return found


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


class Sidecar:
    """One output's sidecar, ours alone from `lock` to `release`."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.headrace")
        self._file: IO[bytes] | None = None

    def lock(self) -> Link | None:
        """Take it. Returns what it says, None if no batch was begun. Raises BulkRefused if another command has it."""
        while True:
            file = self._open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise BulkRefused(f"{self.path}: another command is writing this output") from None
            if self._is_current(file):
                self._file = file
                return _parse(file.read())
            file.close()

    def write(self, link: Link) -> None:
        """Say which batch it is, durably."""
        file = self._held
        file.seek(0)
        file.truncate()
        file.write(orjson.dumps(asdict(link), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        file.flush()
        os.fsync(file.fileno())
        sync_folder(self.path.parent)

    def remove(self) -> None:
        """The run is finished or given up."""
        self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of it. One that names no batch goes."""
        if self._file is not None:
            with self._file as file:
                if os.fstat(file.fileno()).st_size == 0:
                    self.remove()
            self._file = None

    @property
    def _held(self) -> IO[bytes]:
        assert self._file is not None, "not locked"
        return self._file

    def _open(self) -> IO[bytes]:
        try:
            return os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise BulkRefused(f"{self.path}: cannot be written: {error.strerror}") from None

    def _is_current(self, file: IO[bytes]) -> bool:
        """Whether the locked file is still the one under the name: who had it before may have removed it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


def _parse(content: bytes) -> Link | None:
    try:
        fields = orjson.loads(content)
        return Link(**(fields | {"batch_id": UUID(fields["batch_id"])}))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def digest(path: Path, on_block: Callable[[], None]) -> tuple[str, int]:
    """SHA-256 and size in bytes of a file, in constant memory; `on_block` is called between blocks."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            size += len(block)
            on_block()
    return sha256.hexdigest(), size


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
