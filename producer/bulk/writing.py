"""Hands over: OUT and ERR are written aside and renamed, so that under their names there is never half a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO
from uuid import UUID

import orjson

from jobs.batches import Batches
from jobs.states import State
from producer.bulk.errors import BulkError
from producer.bulk.sidecar import sync_folder
from producer.openai.lines import output_line, rejected_line

_BUFFER_BYTES = 1 << 20
_TELL_LINES = 500


def write(batches: Batches, batch_id: UUID, output: Path, errors: Path, on_lines: Callable[[], None]) -> None:
    """Write every line of an ended batch; `on_lines` is called now and then. May be repeated.

    Raises BulkError if the disk refuses, StoreUnavailable if Postgres does; neither leaves a trace.
    """
    parts = {path: path.with_name(f"{path.name}.headrace.part") for path in (errors, output)}
    with ExitStack() as cleanup:
        for part in parts.values():
            cleanup.callback(part.unlink, missing_ok=True)
        try:
            with parts[output].open("wb", _BUFFER_BYTES) as good, parts[errors].open("wb", _BUFFER_BYTES) as bad:
                _fill(batches, batch_id, good, bad, on_lines)
                _sync(good)
                _sync(bad)
            _put_in_place(parts, output, errors)
        except OSError as error:
            reason = error.strerror or str(error)
            raise BulkError(
                f"{output}: cannot be written: {reason}. Nothing is lost: make room, then run the same command again"
            ) from error


def _fill(batches: Batches, batch_id: UUID, good: IO[bytes], bad: IO[bytes], on_lines: Callable[[], None]) -> None:
    for count, job in enumerate(batches.outputs(batch_id)):
        file = good if job.state is State.SUCCEEDED else bad
        file.write(orjson.dumps(output_line(job), option=orjson.OPT_APPEND_NEWLINE))
        if count % _TELL_LINES == 0:
            on_lines()
    for rejection in batches.rejected(batch_id):
        bad.write(orjson.dumps(rejected_line(batch_id, rejection), option=orjson.OPT_APPEND_NEWLINE))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(parts: dict[Path, Path], output: Path, errors: Path) -> None:
    """ERR first: when OUT is there, all is."""
    if parts[errors].stat().st_size:
        parts[errors].replace(errors)
    else:
        errors.unlink(missing_ok=True)
    sync_folder(errors.parent)
    parts[output].replace(output)
    sync_folder(output.parent)
