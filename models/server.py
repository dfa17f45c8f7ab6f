"""What an engine process does, from its arguments to its end; `workers.engine` is the program.

    reader thread   socket -> intake queue; answers `health` itself, so that a step that hangs can be seen
    main thread     intake -> engine.submit -> engine.step -> one frame of events; sleeps on the queue when idle

It serves one client at a time. A new one takes the place of the old; the requests of a client that is gone are
cancelled. It ends with status 0 at SIGTERM, at once when its standard input ends (whoever started it has died), and
with an error if the engine breaks: then its clients' requests fail as "engine_lost".
"""

import argparse
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import orjson

from models.catalog import ModelSpec
from models.engine import load_engine
from models.prompt import PromptError
from models.protocol import DuplicateRequest, Ended, Engine, Event, Failure, InvalidRequest, ModelLoadError, Started
from models.wire import Channel, Message, event_message, listen, read_request

log = logging.getLogger("models.server")

# The collector looks when so many objects more are alive than when it last looked. Measured with the echo engine: its
# usual 700, less than one frame brings, cost a third of the process's time.
_GARBAGE_OBJECTS = 50_000


@dataclass(frozen=True, slots=True)
class Attached:
    """From here on the intake speaks for this client; None: for nobody."""

    channel: Channel | None


class Server:
    """One engine, served to whoever connects last."""

    def __init__(self, engine: Engine, listener: socket.socket, execution_log: "ExecutionLog | None" = None) -> None:
        self._engine = engine
        self._listener = listener
        self._execution_log = execution_log
        self._intake: queue.SimpleQueue[Attached | list[list[Any]]] = queue.SimpleQueue()
        self._client: Channel | None = None  # the main thread's: whom events go to
        self._open: set[str] = set()

    def serve(self) -> NoReturn:
        """Run the engine for ever, in this thread."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while True:
            events = self._take_intake()
            events += self._engine.step()
            self._report(events)

    def _take_intake(self) -> list[Event]:
        """Everything that has arrived; waits for something if there is nothing to compute."""
        events: list[Event] = []
        while True:
            try:
                item = self._intake.get(block=not self._engine.has_work() and not events)
            except queue.Empty:
                return events
            if isinstance(item, Attached):
                self._change_client(item.channel)
            else:
                for message in item:
                    events += self._handle(*message)

    def _change_client(self, channel: Channel | None) -> None:
        """Nobody waits for what the old client asked: stop it before the new one asks."""
        self._client = channel
        for request_id in self._open:
            self._engine.cancel(request_id)
        if self._open:
            self._note(self._engine.step())
        self._open.clear()

    def _handle(self, kind: str, value: Any) -> list[Event]:
        if kind == "submit":
            return self._submit(value)
        if kind == "cancel":
            self._engine.cancel(str(value))
            return []
        if kind == "drain":
            return self._engine.drain()
        log.warning("unknown message %r", kind)
        return []

    def _submit(self, value: Any) -> list[Event]:
        """Into the engine, or back as refused."""
        try:
            self._engine.submit(read_request(value))
        except DuplicateRequest as error:
            log.warning("%s; the first one goes on", error)
            return []
        except InvalidRequest as error:
            request_id = value.get("id") if isinstance(value, dict) else None
            return [Ended(str(request_id), "failed", error=Failure("invalid_request", str(error), retryable=False))]
        self._open.add(value["id"])
        return []

    def _report(self, events: list[Event]) -> None:
        self._note(events)
        self._open.difference_update(event.id for event in events if isinstance(event, Ended))
        told = [event_message(event) for event in events if not isinstance(event, Started)]
        if told and self._client:
            try:
                self._client.send(told)
            except OSError:
                self._client = None  # the reader will say so too

    def _note(self, events: list[Event]) -> None:
        if self._execution_log:
            self._execution_log.write([event.id for event in events if isinstance(event, Started)])

    def _read(self) -> NoReturn:
        """The reader thread: whoever connects last is the client."""
        channel: Channel | None = None
        while True:
            ready = wait([self._listener, channel.connection] if channel else [self._listener])
            if self._listener in ready:
                if channel:
                    channel.close()
                channel = self._greet()
            elif channel and not self._forward(channel):
                channel.close()
                channel = None
                self._intake.put(Attached(None))

    def _greet(self) -> Channel | None:
        channel = Channel(self._listener.accept()[0])
        self._intake.put(Attached(channel))
        return channel if self._send_health(channel, None) else None

    def _forward(self, channel: Channel) -> bool:
        """Pass one frame on; False when the client is gone."""
        try:
            messages = channel.receive()
        except (EOFError, OSError):
            return False
        except ValueError:
            log.exception("a frame that is not JSON")
            return False
        questions = [value for kind, value in messages if kind == "health"]
        self._intake.put([message for message in messages if message[0] != "health"])
        return all(self._send_health(channel, value) for value in questions)

    def _send_health(self, channel: Channel, value: Any) -> bool:
        answer: Message = ("health", (value, self._engine.health()))
        try:
            channel.send([answer])
        except OSError:
            return False
        return True


class ExecutionLog:
    """One line for each request that a step began to work on, on disk before its result leaves: tests count them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, request_ids: list[str]) -> None:
        """Append and fsync."""
        if not request_ids:
            return
        lines = [{"id": request_id, "monotonic": time.monotonic(), "pid": os.getpid()} for request_id in request_ids]
        self._file.write(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
        os.fsync(self._file.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Load, listen, serve; returns the exit status: 1 if the model cannot be loaded, 2 for bad arguments."""
    options = _parse(arguments)
    _set_up_process()
    try:
        engine = load_engine(options.spec, options.device)
    except (ModelLoadError, PromptError) as error:
        log.error("cannot load: %s", error)  # noqa: TRY400  the message says it all
        return 1
    gc.freeze()  # what loading made stays
    gc.set_threshold(_GARBAGE_OBJECTS)
    listener = listen(options.socket)
    log.info("model %s is ready", options.spec.name)
    try:
        Server(engine, listener, options.execution_log and ExecutionLog(options.execution_log)).serve()
    finally:
        options.socket.unlink(missing_ok=True)
        engine.close()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.engine", description="Serve one model on a local socket.")
    parser.add_argument("--socket", type=Path, required=True, help="path of the Unix socket")
    parser.add_argument("--spec", type=ModelSpec.model_validate_json, required=True, help="models.catalog.ModelSpec")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--execution-log", type=Path, help="append a line for each request that is computed")
    return parser.parse_args(arguments)


def _set_up_process() -> None:
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _exit(*_: object) -> NoReturn:
    sys.exit(0)


def _end_with_parent() -> NoReturn:
    """Even a step that hangs must not outlive the supervisor and hold its GPU."""
    while os.read(0, 4_096):
        pass
    os._exit(0)
