"""Looks at what may be meant to hurt before this process does: in another one, which is killed if it takes too long.

The tenants come in turns: who sends what takes long waits for themselves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Any, Self

import orjson
from anyio.to_thread import run_sync

from jobs.errors import RequestInvalid
from jobs.schema import JobRequest
from jobs.settings import PREFIX
from producer.gateway.errors import ApiError, retry_after

log = logging.getLogger(__name__)

# Objects, lists and names, and other values, that a body may hold: some 50 ms to read. A schema may have 64 KiB.
MOST_NAMES = 40_000
MOST_VALUES = 200_000
# As `models.screening` has them.
_QUESTION = struct.Struct(">BI")
_ANSWER = struct.Struct(">I")
_BODY, _STRUCTURE = range(2)
# It has 2 s of processor time; this is for a machine that is too busy to give it.
_ANSWER_SECONDS = 10.0
_START_SECONDS = 60.0
# Of one tenant.
_MOST_WAITING = 16
_REMEMBERED = 1_024


class _Overrun(Exception):
    """It took more than it may have."""


class Screen:
    """The way to that process, which is started when it is needed. It belongs to the loop, as a context."""

    def __init__(self) -> None:
        self._process = _Process()
        self._waiting: OrderedDict[str, deque[_Question]] = OrderedDict()  # by tenant, the next one first
        self._asking: asyncio.Task[None] | None = None
        self._faults: OrderedDict[bytes, str | None] = OrderedDict()  # of structures, by their digests

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        self._process.close()

    async def check_body(self, tenant_id: str, raw: bytes) -> None:
        """Whether a JSON text can be read without keeping others waiting. Raises RequestInvalid, ApiError."""
        names = raw.count(b"[") + raw.count(b"{") + raw.count(b":")
        if names <= MOST_NAMES and raw.count(b",") <= MOST_VALUES:
            return  # the common case; else they may stand in strings, where they do not count
        try:
            names, values = await self._ask(tenant_id, _BODY, raw)
        except _Overrun:
            raise RequestInvalid("body", "takes too long to read") from None
        if names > MOST_NAMES or values > MOST_VALUES:
            message = f"may have at most {MOST_NAMES:,} objects, lists and names, and {MOST_VALUES:,} other values"
            raise RequestInvalid("body", message)

    async def check_structure(self, tenant_id: str, request: JobRequest) -> None:
        """Whether some text can be of the form that is asked for. Raises RequestInvalid, ApiError."""
        structure = _structure_of(request)
        if structure is None:
            return
        digest = blake2b(structure, digest_size=16).digest()
        if digest not in self._faults:
            self._remember(digest, await self._fault_of(tenant_id, structure))
        if fault := self._faults[digest]:
            raise RequestInvalid(request.structures[0], fault)

    async def _fault_of(self, tenant_id: str, structure: bytes) -> str | None:
        try:
            return str(fault) if (fault := await self._ask(tenant_id, _STRUCTURE, structure)) else None
        except _Overrun:
            return "takes too much time or memory to compile"

    def _remember(self, digest: bytes, fault: str | None) -> None:
        self._faults[digest] = fault
        if len(self._faults) > _REMEMBERED:
            self._faults.popitem(last=False)

    async def _ask(self, tenant_id: str, kind: int, content: bytes) -> Any:
        queue = self._waiting.setdefault(tenant_id, deque())
        if len(queue) >= _MOST_WAITING:
            message = "Too many of this tenant's requests are being looked at."
            raise ApiError(429, message, kind="requests", code="rate_limit_exceeded", headers=retry_after(1))
        question = _Question(kind, content, asyncio.get_running_loop().create_future())
        queue.append(question)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all())
        return await question.answer

    async def _ask_all(self) -> None:
        while self._waiting:
            tenant_id, queue = self._waiting.popitem(last=False)
            question = queue.popleft()
            if queue:
                self._waiting[tenant_id] = queue  # behind the others
            if question.answer.done():
                continue  # who asked is gone
            try:
                answer = await run_sync(self._process.ask, question.kind, question.content)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is for who asked
                if not question.answer.done():
                    question.answer.set_exception(error)
            else:
                if not question.answer.done():
                    question.answer.set_result(answer)


@dataclass(frozen=True, slots=True)
class _Question:
    kind: int
    content: bytes
    answer: asyncio.Future[Any]


def _structure_of(request: JobRequest) -> bytes | None:
    """As that process takes it; None if there is nothing to look at."""
    if request.regex is not None:
        return orjson.dumps({"regex": request.regex})
    if request.choice is not None:
        return orjson.dumps({"choice": request.choice})
    form = request.response_format
    if form is None or form["type"] != "json_schema":
        return None
    return orjson.dumps({"json_schema": orjson.dumps(form["json_schema"]["schema"]).decode()})


class _Process:
    """The process itself. One thread asks at a time."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, kind: int, content: bytes) -> Any:
        """Raises _Overrun; another process answers the next question then."""
        child = self._child
        if child is None or child.poll() is not None:
            self.close()
            child = self._child = _started()
        try:
            with _killed_after(_ANSWER_SECONDS, child):
                assert child.stdin is not None
                child.stdin.write(_QUESTION.pack(kind, len(content)) + content)
                child.stdin.flush()
                return orjson.loads(_answer_of(child))
        except (OSError, EOFError):
            self.close()
            log.warning("what was screened took too much time or memory; its process was ended")
            raise _Overrun from None

    def stop(self) -> None:
        """Whatever it does, and whoever waits for it."""
        if self._child is not None:
            self._child.kill()

    def close(self) -> None:
        """The same, while nobody waits for it."""
        self.stop()
        if self._child is not None:
            with suppress(BrokenPipeError), self._child:  # what was not written yet
                pass
        self._child = None


def _started() -> subprocess.Popen[bytes]:
    """It gets no password of ours."""
    command = [sys.executable, "-m", "models.screening"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        with _killed_after(_START_SECONDS, child):
            _answer_of(child)
    except EOFError:
        with child:
            child.wait()
        raise RuntimeError(f"python -m models.screening does not start: status {child.returncode}") from None
    return child


@contextmanager
def _killed_after(seconds: float, child: subprocess.Popen[bytes]) -> Iterator[None]:
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answer_of(child: subprocess.Popen[bytes]) -> bytes:
    """Raises EOFError if it dies before."""
    assert child.stdout is not None
    head = child.stdout.read(_ANSWER.size)
    if len(head) < _ANSWER.size:
        raise EOFError
    return child.stdout.read(*_ANSWER.unpack(head))
