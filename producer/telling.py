"""The pieces of a streamed answer, each once and in order, whatever became of the stream on its way.

What Redis lost, and what comes too late to be heard, is told from the result, cut where the stream was cut: so the
sequence is the same for whoever listens while it is written and for whoever asks a week later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from jobs.schema import Choice, Job, TokenLogprob
from jobs.streams import Piece


class Diverged(Exception):
    """Another attempt wrote another text, and part of the first one is told already."""


@dataclass(frozen=True, slots=True)
class Told:
    """New text of one choice, to be passed on."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Teller:
    """What one listener was told so far."""

    _told: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    _told_tokens: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    _attempt: str = ""
    _next: int = 0  # number of the attempt's next piece; -1: one is missing
    _repeats: dict[int, str] = field(default_factory=dict)  # by choice: what this attempt has yet to write again

    def take(self, pieces: Iterable[Piece]) -> Iterator[Told]:
        """Pass on what is new. Raises Diverged."""
        for piece in pieces:
            if piece.attempt != self._attempt:
                self._begin(piece.attempt)
            if piece.number != self._next:
                self._next = -1
                continue
            self._next += 1
            told = self._new(piece)
            if told.text or told.logprobs:
                yield told

    def rest(self, job: Job) -> Iterator[Told]:
        """What the result of the job has beyond that. Raises Diverged."""
        for choice in job.choices:
            text, told = choice.text, "".join(self._told[choice.index])
            if not text.startswith(told):
                raise Diverged
            yield from self._rest_of(choice, len(told))

    def _begin(self, attempt: str) -> None:
        self._attempt, self._next = attempt, 0
        self._repeats = {choice: "".join(texts) for choice, texts in self._told.items()}

    def _new(self, piece: Piece) -> Told:
        """The piece without what an earlier attempt has told."""
        repeats = self._repeats.get(piece.choice, "")
        known = min(len(repeats), len(piece.text))
        if piece.text[:known] != repeats[:known]:
            raise Diverged
        self._repeats[piece.choice] = repeats[known:]
        if known and known == len(piece.text):
            return Told(piece.choice, "")
        return self._tell(piece.choice, piece.text[known:], piece.logprobs, piece.tokens)

    def _rest_of(self, choice: Choice, told_characters: int) -> Iterator[Told]:
        """The choice's pieces behind what is told, and what no piece has."""
        end = tokens = 0
        for characters, piece_tokens in choice.pieces:
            start, end, tokens = end, end + characters, tokens + piece_tokens
            if end > told_characters:
                yield self._tell_part(choice, max(start, told_characters), end, tokens)
        has_more = len(choice.text) > max(end, told_characters)
        if has_more or len(choice.logprobs or ()) > self._told_tokens[choice.index]:
            yield self._tell_part(choice, max(end, told_characters), len(choice.text), len(choice.logprobs or ()))

    def _tell_part(self, choice: Choice, start: int, end: int, tokens: int) -> Told:
        before = self._told_tokens[choice.index]
        logprobs: Sequence[TokenLogprob] = (choice.logprobs or ())[before:tokens]
        return self._tell(choice.index, choice.text[start:end], tuple(logprobs), tokens - before)

    def _tell(self, choice: int, text: str, logprobs: tuple[TokenLogprob, ...], tokens: int) -> Told:
        self._told[choice].append(text)
        self._told_tokens[choice] += tokens
        return Told(choice, text, logprobs)
