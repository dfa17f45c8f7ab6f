"""The pieces of streamed answers on their way: a Redis stream for each job, with a limit and an end.

Only for those who listen while it is written. The result has the whole text and says where its pieces were cut, so what
is lost here is told from there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

import orjson
import redis

from jobs.schema import TokenLogprob
from jobs.settings import Settings
from jobs.signals import TOLD, UNREACHABLE, Signals

log = logging.getLogger(__name__)

# What is cut off at the front is told from the result at the end.
_PIECES = 20_000
BEGINNING = "0-0"
_PIECE, _SIGNATURE = "p", "s"
_KIND = "piece"
_Entry: TypeAlias = tuple[bytes, dict[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some new text of one choice."""

    attempt: str  # whose; another attempt begins anew
    number: int  # of the attempt's pieces, from 0, whichever choice they belong to
    choice: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Streams:
    """Writes and reads the pieces of many jobs at once."""

    def __init__(self, settings: Settings, signals: Signals) -> None:
        assert settings.broker_url is not None
        self._prefix = settings.key_prefix
        self._milliseconds = int(settings.stream_seconds * 1000)
        self._signals = signals
        self._redis = redis.Redis.from_url(
            settings.broker_url, socket_timeout=2.0, socket_connect_timeout=2.0, socket_keepalive=True, retry=None
        )

    def append(self, pieces: Sequence[tuple[UUID, Piece]]) -> bool:
        """Write them and tell who listens. False: Redis did not take them."""
        jobs = dict.fromkeys(job_id for job_id, _ in pieces)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for job_id, piece in pieces:
                    pipeline.xadd(self._key(job_id), self._signed(job_id, piece), maxlen=_PIECES, approximate=True)
                for job_id in jobs:
                    pipeline.pexpire(self._key(job_id), self._milliseconds)
                pipeline.execute()
        except UNREACHABLE as error:
            log.warning("%d pieces of streams are not told: %s", len(pieces), error)
            return False
        return self._signals.publish(TOLD, list(jobs))

    def read(self, after: Sequence[tuple[UUID, str]]) -> list[tuple[str, list[Piece]]]:
        """For each job, what has come behind a position, and the new position. Nothing if Redis does not answer."""
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for job_id, position in after:
                    pipeline.xrange(self._key(job_id), min=f"({position}")
                found = pipeline.execute()
        except UNREACHABLE as error:
            log.warning("the streams of %d jobs cannot be read: %s", len(after), error)
            return [(position, []) for _, position in after]
        return [self._read(*place, entries) for place, entries in zip(after, found, strict=True)]

    def _signed(self, job_id: UUID, piece: Piece) -> dict[Any, Any]:
        written = _written(piece)
        return {_PIECE: written, _SIGNATURE: self._signals.signer.sign(_KIND, f"{job_id} {written}")}

    def _read(self, job_id: UUID, position: str, entries: Sequence[_Entry]) -> tuple[str, list[Piece]]:
        """What none of us signed is passed over: it is told from the result."""
        texts = [(fields.get(_PIECE.encode(), b"").decode(), fields.get(_SIGNATURE.encode())) for _, fields in entries]
        ours = [text for text, signature in texts if self._accepts(job_id, text, signature)]
        return (entries[-1][0].decode() if entries else position), [_piece(orjson.loads(text)) for text in ours]

    def _accepts(self, job_id: UUID, text: str, signature: bytes | None) -> bool:
        return self._signals.signer.accepts((signature or b"").decode(errors="replace"), _KIND, f"{job_id} {text}")

    def forget(self, jobs: Sequence[UUID]) -> None:
        """Delete the pieces of these; where Redis does not answer, they go when their time is over."""
        try:
            self._redis.unlink(*map(self._key, jobs))
        except UNREACHABLE as error:
            log.warning("the pieces of %d jobs are left to their end: %s", len(jobs), error)

    def close(self) -> None:
        """Let go of Redis."""
        self._redis.close()

    def _key(self, job_id: UUID) -> str:
        return f"{self._prefix}:stream:{job_id}"


def _written(piece: Piece) -> str:
    logprobs = [one.model_dump(exclude_defaults=True) for one in piece.logprobs]
    return orjson.dumps([piece.attempt, piece.number, piece.choice, piece.text, piece.tokens, logprobs]).decode()


def _piece(fields: list[Any]) -> Piece:
    attempt, number, choice, text, tokens, logprobs = fields
    return Piece(attempt, number, choice, text, tokens, tuple(TokenLogprob.model_validate(one) for one in logprobs))
