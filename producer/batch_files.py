"""Looks at the input file of a batch as a whole, before any of its requests runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import IO, Any

import orjson

from jobs.api_batches import Fault
from jobs.errors import RequestInvalid
from producer.bulk.reading import RawLine, chunks
from producer.openai.lines import custom_id

MAX_REQUESTS = 50_000
# More of them help nobody.
MAX_FAULTS = 100

_REQUIRED = ("custom_id", "method", "url", "body")


class FileCheck:
    """What is wrong with a file, and how many requests it has. A fault of one request's body is none of the file."""

    def __init__(self, endpoint: str, max_line_bytes: int) -> None:
        self._endpoint = endpoint
        self._max_line_bytes = max_line_bytes
        self._seen: set[bytes] = set()  # digests of the custom_ids: those themselves may be long
        self.requests = 0
        self.faults: list[Fault] = []

    def run(self, file: IO[bytes], size: int, on_chunk: Callable[[], None]) -> None:
        """Read the whole file in constant memory; ends early when nothing more would be told."""
        for chunk in chunks(file, 0, size, 0, self._max_line_bytes):
            for line in chunk:
                if line.content != b"":
                    self._look_at(line)
            on_chunk()
            if len(self.faults) >= MAX_FAULTS or self.requests > MAX_REQUESTS:
                break
        self.faults = self._all_faults()[:MAX_FAULTS]

    def _all_faults(self) -> list[Fault]:
        if self.requests > MAX_REQUESTS:
            return [Fault("too_many_tasks", f"The file holds more than {MAX_REQUESTS:,} requests."), *self.faults]
        if self.requests == 0 and not self.faults:
            return [Fault("empty_file", "The file holds no request.")]
        return self.faults

    def _look_at(self, line: RawLine) -> None:
        self.requests += 1
        try:
            fields = _fields(line)
            self._check(fields)
        except RequestInvalid as error:
            self.faults.append(Fault(error.code, error.message, line.number, error.field))

    def _check(self, fields: dict[str, Any]) -> None:
        for required in _REQUIRED:
            if fields.get(required) is None:
                raise RequestInvalid(required, f"`{required}` is missing.", "missing_required_parameter")
        name = custom_id(fields)
        digest = hashlib.blake2b(str(name).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            raise RequestInvalid("custom_id", f"{name!r} names an earlier line already.", "duplicate_custom_id")
        self._seen.add(digest)
        if fields["method"] != "POST":
            raise RequestInvalid("method", "`method` must be POST.", "invalid_method")
        if fields["url"] != self._endpoint:
            raise RequestInvalid("url", f"`url` must be {self._endpoint}, as the batch's endpoint.", "url_mismatch")


def _fields(line: RawLine) -> dict[str, Any]:
    """The line as an object. Raises RequestInvalid."""
    if line.content is None:
        raise RequestInvalid("line", "The line is too long.", "invalid_json_line")
    try:
        fields = orjson.loads(line.content)
    except orjson.JSONDecodeError:
        raise RequestInvalid("line", "This line is not parseable as valid JSON.", "invalid_json_line") from None
    if not isinstance(fields, dict):
        raise RequestInvalid("line", "This line is not a JSON object.", "invalid_json_line")
    return fields
