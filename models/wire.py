"""How a client and the engine process talk: frames of many messages over a Unix socket.

A frame is one JSON list; a message is `[kind, value]`. To the engine: `submit` (request), `cancel` (request id),
`drain` (null), `health` (any value, given back). From it: `delta`, `ended` (events) and `health`
(`[value, health]`; the first, with a null value, greets whoever connects).
"""

import contextlib
import os
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from models.protocol import (
    Choice,
    Delta,
    Ended,
    EngineError,
    Failure,
    GenerationRequest,
    GpuLoad,
    Health,
    InvalidRequest,
    SamplingParams,
    Structure,
    Timings,
    TokenLogprobs,
    Usage,
)

Message: TypeAlias = tuple[str, Any] | list[Any]
Told: TypeAlias = Delta | Ended  # the events that leave the engine's process

_SOCKET_PATH_BYTES = 107  # Linux; a longer one is refused by bind with an error that does not say so


class Channel:
    """One connection. `send` may be called from any thread, `receive` and `close` by the one that reads."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self.connection = Connection(os.dup(peer.fileno()))  # public for `wait` and `poll`
        self._sending = threading.Lock()

    def send(self, messages: list[Message]) -> None:
        """Send one frame. Raises OSError if the other side is gone."""
        frame = orjson.dumps(messages)
        with self._sending:
            self.connection.send_bytes(frame)

    def receive(self) -> list[list[Any]]:
        """The next frame's messages; blocks. Raises EOFError or OSError at the end, ValueError if it is no frame."""
        messages = orjson.loads(self.connection.recv_bytes())
        if not isinstance(messages, list) or not all(isinstance(item, list) and len(item) == 2 for item in messages):  # noqa: PLR2004
            raise ValueError("a frame is a list of [kind, value]")
        return messages

    def hang_up(self) -> None:
        """End the conversation: whoever is blocked in `send` or `receive`, on either side, gets an error."""
        with contextlib.suppress(OSError):  # the other side was first
            self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and free the socket, once nobody sends: its number may be another's at once."""
        self.hang_up()
        with self._sending:
            self.connection.close()
            self._peer.close()


def listen(path: Path) -> socket.socket:
    """A listening socket at this path, for its owner only; one left by a killed process is replaced."""
    _check_path(path)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(umask)
    listener.listen()
    return listener


def dial(path: Path) -> Channel | None:
    """A connection to who listens there; None if nobody does (yet)."""
    _check_path(path)
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        peer.close()
        return None
    return Channel(peer)


def _check_path(path: Path) -> None:
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise EngineError(f"socket path has more than {_SOCKET_PATH_BYTES} bytes: {path}")


def submit_message(request: GenerationRequest) -> Message:
    """Encoded here, so that one request that JSON cannot carry spoils no others. Raises `InvalidRequest` for it."""
    try:
        return ("submit", orjson.Fragment(orjson.dumps(request)))
    except TypeError as error:  # an integer above 64 bits, text that is no Unicode
        raise InvalidRequest("request", f"cannot be sent: {error}") from error


def event_message(event: Told) -> Message:
    """Orjson writes the dataclass."""
    return (_KINDS[type(event)], event)


_KINDS: dict[type, str] = {Delta: "delta", Ended: "ended"}


def read_event(kind: str, value: dict[str, Any]) -> Told:
    """The event a message carries."""
    if kind == "delta":
        return Delta(**_with_tokens(value))
    return Ended(
        id=value["id"],
        outcome=value["outcome"],
        choices=tuple(Choice(**_with_tokens(choice)) for choice in value["choices"]),
        usage=Usage(**value["usage"]),
        timings=Timings(**value["timings"]),
        error=value["error"] and Failure(**value["error"]),
        prompt_logprobs=_read_logprobs(value["prompt_logprobs"]),
    )


def _with_tokens(value: dict[str, Any]) -> dict[str, Any]:
    """A choice's or a delta's fields, its tokens as tuples."""
    return {**value, "token_ids": tuple(value["token_ids"]), "logprobs": _read_logprobs(value["logprobs"])}


def _read_logprobs(values: list[Any]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(value["token_id"], value["logprob"], tuple(map(tuple, value["top"]))) for value in values
    )


def read_request(value: dict[str, Any]) -> GenerationRequest:
    """The request a message carries, its values unchecked. Raises `InvalidRequest` if it has another form."""
    try:
        sampling = dict(value["sampling"])
        sampling |= {name: tuple(sampling.get(name, ())) for name in ("stop", "stop_token_ids")}
        sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling.get("logit_bias", ()))
        sampling["structure"] = _read_structure(sampling.get("structure"))
        prompt = tuple(value["prompt_token_ids"])
        return GenerationRequest(**{**value, "prompt_token_ids": prompt, "sampling": SamplingParams(**sampling)})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest("request", f"has not the form of one: {error!r}") from error


def _read_structure(value: dict[str, Any] | None) -> Structure | None:
    if value is None:
        return None
    choice = value.get("choice")
    return Structure(**{**value, "choice": None if choice is None else tuple(choice)})


def read_health(value: dict[str, Any]) -> Health:
    """The health a message carries."""
    gpu = value.get("gpu")
    return Health(**{**value, "gpu": None if gpu is None else GpuLoad(**gpu)})
