"""Files of the API in SQL: in pieces of one size, so that any gateway serves any file in constant memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from jobs.database import Database
from jobs.errors import NotFound

PIECE_BYTES = 262_144
# Whoever tidies up takes so many pieces at a time: one statement must not hold the disk for long.
_TIDY_PIECES = 200


@dataclass(frozen=True, slots=True)
class File:
    """A file as its owner sees it."""

    id: UUID
    purpose: str
    filename: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None


class Files:
    """Every look at and change of a file."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def begin(self, file_id: UUID, tenant_id: str, purpose: str, filename: str, expires_seconds: int | None) -> None:
        """A file that is being written; nobody sees it yet."""
        fields = {
            "id": file_id,
            "tenant": tenant_id,
            "purpose": purpose,
            "filename": filename,
            "seconds": expires_seconds,
        }
        self.database.rows(_BEGIN, fields)

    def write(self, file_id: UUID, tenant_id: str, number: int, data: bytes) -> None:
        """One piece, all but the last of `PIECE_BYTES`. May be repeated."""
        fields = {"id": file_id, "tenant": tenant_id, "number": number, "data": data}
        self.database.rows(_WRITE, fields)

    def finish(self, file_id: UUID, tenant_id: str, size: int) -> File:
        """It is whole, and can be seen."""
        self.database.rows(_FINISH, {"id": file_id, "tenant": tenant_id, "bytes": size})
        return self.get(file_id, tenant_id)

    def get(self, file_id: UUID, tenant_id: str) -> File:
        """The file. Raises NotFound, also if it was deleted or has expired."""
        row = self.database.row(_GET, {"id": file_id, "tenant": tenant_id})
        if row is None:
            raise NotFound(f"no file {file_id}")
        return File(**row._asdict())

    def list(
        self, tenant_id: str, *, purpose: str | None = None, after: UUID | None = None, limit: int, ascending: bool
    ) -> list[File]:
        """Files in the order they were made, the newest first unless `ascending`; behind `after`."""
        fields = {"tenant": tenant_id, "purpose": purpose, "after": after, "limit": limit}
        rows = self.database.rows(_LIST_ASCENDING if ascending else _LIST, fields)
        return [File(**row._asdict()) for row in rows]

    def delete(self, file_id: UUID, tenant_id: str) -> None:
        """Nobody sees it any more. A batch that was begun on it goes on. Raises NotFound."""
        if self.database.row(_DELETE, {"id": file_id, "tenant": tenant_id}) is None:
            raise NotFound(f"no file {file_id}")

    def give_up(self, file_id: UUID) -> None:
        """One that is being written is not wanted any more."""
        self.database.rows(_FORSAKE, {"id": file_id})

    def size(self, file_id: UUID, tenant_id: str) -> int:
        """Bytes of a file whose content is there, deleted or not. Raises NotFound."""
        row = self.database.row(_SIZE, {"id": file_id, "tenant": tenant_id})
        if row is None:
            raise NotFound(f"no file {file_id}")
        return int(row.bytes)

    def piece(self, file_id: UUID, number: int) -> bytes:
        """One piece; empty behind the end."""
        row = self.database.row(_PIECE, {"id": file_id, "number": number})
        return b"" if row is None else bytes(row.data)

    def pieces(self, file_id: UUID) -> Iterator[bytes]:
        """All of them, in order."""
        number = 0
        while data := self.piece(file_id, number):
            yield data
            number += 1

    def tidy(self) -> int:
        """Remove some content that nobody can see and no batch needs, whoever it belonged to.

        Returns the number of pieces removed: there may be more while it is not 0.
        """
        return len(self.database.rows(_TIDY, {"limit": _TIDY_PIECES}))


class FileReader(io.RawIOBase):
    """A file of the API as a readable, seekable stream; wrap it in a `BufferedReader`."""

    def __init__(self, files: Files, file_id: UUID, size: int) -> None:
        self._files = files
        self._file_id = file_id
        self._size = size
        self._at = 0
        self._number = -1
        self._piece = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As much as the current piece has."""
        number, start = divmod(self._at, PIECE_BYTES)
        if number != self._number:
            self._piece, self._number = self._files.piece(self._file_id, number), number
        data = self._piece[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class FileWriter:
    """Writes a file of the API piece by piece; only one piece is held. Each call may raise StoreUnavailable."""

    def __init__(self, files: Files, file_id: UUID, tenant_id: str) -> None:
        self._files = files
        self._tenant_id = tenant_id
        self.file_id = file_id
        self.size = 0
        self._number = 0
        self._held = bytearray()

    def write(self, data: bytes) -> None:
        """Append."""
        self._held += data
        self.size += len(data)
        while len(self._held) >= PIECE_BYTES:
            self._put(bytes(self._held[:PIECE_BYTES]))
            del self._held[:PIECE_BYTES]

    def finish(self) -> File:
        """Write the rest, and let the file be seen."""
        if self._held:
            self._put(bytes(self._held))
            self._held.clear()
        return self._files.finish(self.file_id, self._tenant_id, self.size)

    def _put(self, data: bytes) -> None:
        self._files.write(self.file_id, self._tenant_id, self._number, data)
        self._number += 1


_BEGIN = text("""
INSERT INTO files (id, tenant_id, purpose, filename, expires_at)
VALUES (:id, :tenant, :purpose, :filename, now() + make_interval(secs => CAST(:seconds AS double precision)))
ON CONFLICT (id) DO NOTHING
""")

_WRITE = text("""
INSERT INTO file_pieces (file_id, number, tenant_id, data) VALUES (:id, :number, :tenant, :data)
ON CONFLICT (file_id, number) DO UPDATE SET data = excluded.data
""")

_FINISH = text("UPDATE files SET bytes = :bytes WHERE id = :id AND tenant_id = :tenant AND bytes IS NULL")

_SEEN = """
tenant_id = :tenant AND bytes IS NOT NULL AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""

_COLUMNS = "id, purpose, filename, bytes, created_at, expires_at"

_GET = text(f"SELECT {_COLUMNS} FROM files WHERE id = :id AND {_SEEN}")  # noqa: S608 - composed of constants

_FOR = "AND (CAST(:purpose AS text) IS NULL OR purpose = :purpose)"

_LIST = text(f"""
SELECT {_COLUMNS} FROM files
WHERE {_SEEN} {_FOR} AND (CAST(:after AS uuid) IS NULL OR id < :after) ORDER BY id DESC LIMIT :limit
""")  # noqa: S608

_LIST_ASCENDING = text(f"""
SELECT {_COLUMNS} FROM files
WHERE {_SEEN} {_FOR} AND (CAST(:after AS uuid) IS NULL OR id > :after) ORDER BY id LIMIT :limit
""")  # noqa: S608

_DELETE = text(f"UPDATE files SET deleted_at = now() WHERE id = :id AND {_SEEN} RETURNING id")  # noqa: S608

_PIECE = text("SELECT data FROM file_pieces WHERE file_id = :id AND number = :number")

_FORSAKE = text("UPDATE files SET deleted_at = now() WHERE id = :id AND bytes IS NULL")

# While a batch needs it, its pieces stay.
_SIZE = text("SELECT bytes FROM files WHERE id = :id AND tenant_id = :tenant AND bytes IS NOT NULL")

# For all tenants at once: see migration 0003.
_TIDY = text("SELECT headrace_tidy_files(:limit)")
