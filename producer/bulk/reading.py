"""From the bytes of the input to requests and rejections, line by line, in constant memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Protocol

import orjson

from jobs.batches import Line, Rejection
from jobs.errors import RequestInvalid
from jobs.schema import JobError, JobRequest
from producer.openai.lines import batch_line, custom_id
from producer.openai.requests import CHAT, ENDPOINTS, renamed, translate

log = logging.getLogger(__name__)

# Enough for one COPY to be quick a line, and small beside what else a process holds. The first are smaller: workers
# have something to do while the rest is read.
FIRST_CHUNK_LINES = 125
CHUNK_LINES = 1000
CHUNK_BYTES = 4_000_000

# A prompt may take twice its bytes in JSON (what is escaped); the rest of a line is small.
_BYTES_PER_PROMPT_BYTE = 2
_LINE_SLACK_BYTES = 64_000
_SKIP_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_REMEMBERED_MODELS = 1000


class LineOptions(Protocol):
    """What is asked of every line; see `BulkOptions`."""

    @property
    def model(self) -> str | None: ...

    @property
    def prompt_field(self) -> str | None: ...

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def temperature(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class AsTheyAre:
    """Nothing: the lines are those of a batch file, and say everything themselves."""

    model: None = None
    prompt_field: None = None
    max_tokens: None = None
    temperature: None = None


@dataclass(frozen=True, slots=True)
class RawLine:
    """One line as it stands in the file."""

    number: int  # from 1
    end: int  # offset in bytes behind it
    content: bytes | None  # without its end; None: too long to be looked at


def max_line_bytes(max_prompt_bytes: int) -> int:
    """The longest line that could hold such a prompt."""
    return _BYTES_PER_PROMPT_BYTE * max_prompt_bytes + _LINE_SLACK_BYTES


def chunks(file: IO[bytes], start: int, end: int, last_line: int, max_bytes: int) -> Iterator[list[RawLine]]:
    """The lines of the file from `start`, behind line `last_line`, to `end`. A chunk is twice the last at most."""
    chunk: list[RawLine] = []
    held, most = 0, FIRST_CHUNK_LINES
    for line in _lines(file, start, end, last_line, max_bytes):
        chunk.append(line)
        held += len(line.content or b"")
        if len(chunk) == most or held >= CHUNK_BYTES:
            yield chunk
            chunk, held, most = [], 0, min(2 * most, CHUNK_LINES)
    if chunk:
        yield chunk


def _lines(file: IO[bytes], start: int, end: int, number: int, max_bytes: int) -> Iterator[RawLine]:
    file.seek(start)
    offset = start
    while offset < end:
        content = file.readline(min(max_bytes + 1, end - offset))
        if not content:
            return  # the file became shorter meanwhile
        number += 1
        offset += len(content)
        if len(content) > max_bytes and not content.endswith(b"\n"):
            offset += _skip_line(file, end - offset)
            yield RawLine(number, offset, None)
        else:
            yield RawLine(number, offset, content.removeprefix(_BOM if number == 1 else b"").rstrip())


def _skip_line(file: IO[bytes], left: int) -> int:
    """Read on to the end of the line without keeping it; returns the bytes passed over."""
    skipped = 0
    while skipped < left:
        block = file.readline(min(_SKIP_BYTES, left - skipped))
        skipped += len(block)
        if not block or block.endswith(b"\n"):
            break
    return skipped


@dataclass(frozen=True, slots=True)
class _Draft:
    """A line on its way: it has a request or a fault."""

    number: int
    custom_id: str
    endpoint: str = ""
    request: JobRequest | None = None
    fault: RequestInvalid | None = None


class LineReader:
    """Makes requests of lines, as the options say. Bad lines stop no good ones."""

    def __init__(
        self,
        options: LineOptions,
        check: Callable[[JobRequest], JobRequest],
        max_prompt_bytes: int,
        max_attempts: int,
    ) -> None:
        self._options = options
        self._check = check
        self._max_attempts = max_attempts
        self.max_bytes = max_line_bytes(max_prompt_bytes)
        # Looking for a model that is not there may take long (a hub), and every line may ask for it.
        self._bad_models: dict[str, RequestInvalid] = {}

    def read(
        self, chunk: Iterable[RawLine], known: Callable[[Sequence[str]], set[str]]
    ) -> tuple[list[Line], list[Rejection]]:
        """The good and the bad lines of a chunk; blank ones are none. `known` tells which ids are taken already.

        An id belongs to the first line that names it. A line that comes too late is named by its number.
        """
        drafts = [self._draft(line) for line in chunk if line.content != b""]
        taken = known([draft.custom_id for draft in drafts])
        late: list[_Draft] = []
        kept: list[_Draft] = []
        for draft in drafts:
            (late if draft.custom_id in taken else kept).append(draft)
            taken.add(draft.custom_id)
        taken |= known([_line_name(draft.number) for draft in late]) if late else set()
        lines = [self._line(draft, draft.request) for draft in kept if draft.request]
        rejections = [_rejection(draft, draft.custom_id) for draft in kept if draft.fault]
        return lines, [*rejections, *(_rejection(_duplicate(draft), _free_name(draft, taken)) for draft in late)]

    def _line(self, draft: _Draft, request: JobRequest) -> Line:
        return Line(draft.number, draft.custom_id, request, self._max_attempts, draft.endpoint)

    def _draft(self, line: RawLine) -> _Draft:
        name = _line_name(line.number)
        try:
            fields = self._parse(line)
            name = self._custom_id(fields) or name
            endpoint, request = self._request(fields)
        except RequestInvalid as fault:
            return _Draft(line.number, name, fault=fault)
        except Exception:  # a mistake of ours over one line must not cost the others theirs, nor stop their batch
            log.exception("line %d cannot be read", line.number)
            mistake = RequestInvalid("line", f"line {line.number} cannot be read", "server_error")
            return _Draft(line.number, name, fault=mistake)
        return _Draft(line.number, name, endpoint, request)

    def _parse(self, line: RawLine) -> dict[str, Any]:
        if line.content is None:
            raise RequestInvalid("line", f"line {line.number} is longer than {self.max_bytes:,} bytes", "line_too_long")
        try:
            fields = orjson.loads(line.content)
        except orjson.JSONDecodeError as error:
            raise _unreadable(line.number, line.content, error) from None
        if not isinstance(fields, dict):
            raise RequestInvalid("line", f"line {line.number} is not a JSON object", "invalid_json_line")
        return fields

    def _custom_id(self, fields: dict[str, Any]) -> str | None:
        if self._options.prompt_field is not None and not isinstance(fields.get("custom_id"), str):
            return None
        return custom_id(fields)

    def _request(self, fields: dict[str, Any]) -> tuple[str, JobRequest]:
        if self._options.prompt_field is not None:
            return CHAT, self._of_field(fields, self._options.prompt_field)
        return self._of_batch_line(fields)

    def _of_field(self, fields: dict[str, Any], name: str) -> JobRequest:
        """Any object with a string under that name asks it as a user would."""
        prompt = fields.get(name)
        if prompt is None:
            raise RequestInvalid(name, "is missing", "missing_required_parameter")
        if not isinstance(prompt, str):
            raise RequestInvalid(name, "must be a string", "invalid_type")
        if not prompt:
            raise RequestInvalid(name, "must not be empty")
        asked = {
            "model": self._options.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
        }
        try:
            return self._check(JobRequest.parse(asked))
        except RequestInvalid as error:
            raise renamed(error, {"messages": name}) from None

    def _of_batch_line(self, fields: dict[str, Any]) -> tuple[str, JobRequest]:
        line = batch_line(fields)
        try:
            asked = translate(line.url, {**line.body, **self._overrides(line.url)})
            return line.url, asked.checked(self._check_known)
        except RequestInvalid as error:
            raise RequestInvalid(f"body.{error.field}", error.message, error.code) from None

    def _check_known(self, request: JobRequest) -> JobRequest:
        bad = self._bad_models.get(request.model)
        if bad is not None:  # a new one: an error that is raised again and again grows by a traceback each time
            raise RequestInvalid(bad.field, bad.message, bad.code)
        try:
            return self._check(request)
        except RequestInvalid as error:
            if error.field == "model" and len(self._bad_models) < _REMEMBERED_MODELS:
                self._bad_models[request.model] = error
            raise

    def _overrides(self, url: str) -> dict[str, Any]:
        options = self._options
        given = {
            "model": options.model,
            "temperature": options.temperature,
            ENDPOINTS[url].limits[0]: options.max_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}


def _line_name(number: int) -> str:
    return f"line-{number}"


def _free_name(draft: _Draft, taken: set[str]) -> str | None:
    name = _line_name(draft.number)
    return None if name in taken else name


def _duplicate(draft: _Draft) -> _Draft:
    fault = RequestInvalid("custom_id", f"{draft.custom_id!r} names an earlier line already", "duplicate_custom_id")
    return replace(draft, fault=draft.fault or fault)


def _rejection(draft: _Draft, name: str | None) -> Rejection:
    fault = draft.fault
    assert fault is not None
    return Rejection(draft.number, name, JobError(code=fault.code, message=str(fault)), fault.field)


def _unreadable(number: int, content: bytes, error: orjson.JSONDecodeError) -> RequestInvalid:
    try:
        content.decode()
    except UnicodeDecodeError as undecodable:
        message = f"line {number} is not UTF-8: byte {undecodable.start + 1} of it, 0x{content[undecodable.start]:02x}"
        return RequestInvalid("line", message, "invalid_utf8")
    message = f"line {number} is not JSON: {error.msg} at character {error.pos + 1}"
    return RequestInvalid("line", message, "invalid_json_line")
