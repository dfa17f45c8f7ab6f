"""A worker's side of the engine process. Thread-safe; loads no torch.

client = EngineClient(socket_path)
client.connect(timeout_seconds=60)
client.submit(request, on_event)    # on_event is called from the client's reader thread, and must not block
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from models.protocol import (
    DuplicateRequest,
    Ended,
    EngineError,
    Event,
    Failure,
    GenerationRequest,
    Health,
    InvalidRequest,
)
from models.wire import Channel, Message, dial, read_event, read_health, submit_message

log = logging.getLogger(__name__)

OnEvent: TypeAlias = Callable[[Event], None]

_DIAL_AGAIN_SECONDS = 0.02


class EngineClient:
    """One connection to one engine. When it is lost, every open request ends as failed, and `lost` is set for good."""

    def __init__(self, socket_path: Path | str) -> None:
        self.lost = threading.Event()
        self._path = Path(socket_path)
        self._channel: Channel | None = None
        self._reader: threading.Thread | None = None
        self._lock = threading.Lock()  # over _open, _questions and lost together
        self._open: dict[str, OnEvent] = {}
        self._questions: dict[int, queue.SimpleQueue[Health | None]] = {}
        self._numbers = itertools.count()

    def connect(self, timeout_seconds: float) -> Health:
        """Wait until the engine listens and greets. Raises `EngineError` if it does not in this time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            greeted = _dial_and_greet(self._path, deadline)
            if greeted:
                break
            if time.monotonic() >= deadline:
                raise EngineError(f"no engine answered at {self._path} within {timeout_seconds:g} s")
            time.sleep(_DIAL_AGAIN_SECONDS)
        self._channel, health = greeted
        self._reader = threading.Thread(target=self._read, args=(self._channel,), name="engine-client", daemon=True)
        self._reader.start()
        return health

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Ask; `on_event` gets the request's events, the last one an `Ended`, also if it is refused or lost."""
        self.submit_many([(request, on_event)])

    def submit_many(self, requests: Iterable[tuple[GenerationRequest, OnEvent]]) -> None:
        """Ask all in one frame. What cannot even be sent ends at once, in the caller's thread."""
        if self._channel is None:
            raise EngineError("connect first")
        messages: list[Message] = []
        for request, on_event in requests:
            try:
                message = submit_message(request)
                self._open_request(request.id, on_event)
            except InvalidRequest as error:
                refusal = Failure("invalid_request", str(error), retryable=False)
                _tell(on_event, _failed(request.id, refusal))
            except EngineError:
                _tell(on_event, Ended(request.id, "released"))
            else:
                messages.append(message)
        if messages:
            self._send(messages)

    @property
    def open_requests(self) -> int:
        """How many have not ended."""
        return len(self._open)

    def cancel(self, request_id: str) -> None:
        """End the request soon; its `Ended` still comes. An unknown id is ignored."""
        self._send([("cancel", request_id)])

    def drain(self) -> None:
        """End as "released" what no step has touched; the others go on."""
        self._send([("drain", None)])

    def health(self, timeout_seconds: float) -> Health:
        """Ask the engine process, which answers even while a step hangs. Raises `EngineError`."""
        number, answer = next(self._numbers), queue.SimpleQueue[Health | None]()
        with self._lock:
            if self.lost.is_set():
                raise EngineError("the engine is lost")
            self._questions[number] = answer
        self._send([("health", number)])
        try:
            health = answer.get(timeout=timeout_seconds)
        except queue.Empty:
            raise EngineError(f"the engine did not answer within {timeout_seconds:g} s") from None
        finally:
            self._questions.pop(number, None)
        if health is None:
            raise EngineError("the engine was lost")
        return health

    def close(self) -> None:
        """Hang up. Open requests end as lost; the engine cancels them."""
        if self._channel:
            self._channel.hang_up()
        if self._reader and self._reader is not threading.current_thread():
            self._reader.join()

    def _open_request(self, request_id: str, on_event: OnEvent) -> None:
        with self._lock:
            if self.lost.is_set():
                raise EngineError("the engine is lost")
            if request_id in self._open:
                raise DuplicateRequest(request_id)
            self._open[request_id] = on_event

    def _send(self, messages: list[Message]) -> None:
        if self._channel is None:
            raise EngineError("connect first")
        try:
            self._channel.send(messages)
        except OSError:
            self._channel.hang_up()  # the reader ends what is open

    def _read(self, channel: Channel) -> None:
        """The reader thread: events to those who wait for them, until the connection ends."""
        try:
            while True:
                for kind, value in channel.receive():
                    self._handle(kind, value)
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("the engine sent what cannot be read")
        finally:
            self._lose()
            channel.close()

    def _handle(self, kind: str, value: Any) -> None:
        if kind == "health":
            number, health = value
            if question := self._questions.get(number):
                question.put(read_health(health))
            return
        event = read_event(kind, value)
        with self._lock:
            on_event = self._open.pop(event.id, None) if isinstance(event, Ended) else self._open.get(event.id)
        if on_event:
            _tell(on_event, event)

    def _lose(self) -> None:
        with self._lock:
            self.lost.set()
            abandoned, self._open = self._open, {}
        for question in list(self._questions.values()):
            question.put(None)
        failure = _LOST if len(abandoned) == 1 else _LOST_TOGETHER
        for request_id, on_event in abandoned.items():
            _tell(on_event, _failed(request_id, failure))


_LOST = Failure("engine_lost", "the engine process was lost", retryable=True)
# A step tells nothing before it is over: whichever of them was computed may have been the end of the engine.
_LOST_TOGETHER = replace(_LOST, in_company=True)


def _failed(request_id: str, failure: Failure) -> Ended:
    return Ended(request_id, "failed", error=failure)


def _tell(on_event: OnEvent, event: Event) -> None:
    try:
        on_event(event)
    except Exception:  # one listener's mistake must not cost the others their events
        log.exception("the listener of request %s failed", event.id)


def _dial_and_greet(path: Path, deadline: float) -> tuple[Channel, Health] | None:
    """A connection on which the engine has said who it is; None if there is none yet."""
    channel = dial(path)
    if channel is None:
        return None
    try:
        if channel.connection.poll(max(0.0, deadline - time.monotonic())):
            _kind, (_number, health) = channel.receive()[0]
            return channel, read_health(health)
    except (EOFError, OSError):
        pass  # it ended while it was starting, or another client came in between
    channel.close()
    return None
