"""Takes the input of a batch in, chunk by chunk, on from where the last committed chunk ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO, TypeAlias, TypeVar

from jobs.batches import Batch, Batches, Line, Rejection
from producer.bulk.reading import LineReader, RawLine, chunks

T = TypeVar("T")
Steadily = Callable[[Callable[[], T]], T]
Admit: TypeAlias = Callable[[Sequence[Line]], Sequence[Line]]


class Intake:
    """One batch's input on its way in. `steadily` runs what asks Postgres, as often as its user has patience for.

    `admit` gives of some lines the first ones that may come in now. At the first that may not, `run` ends.
    """

    def __init__(
        self,
        batches: Batches,
        batch: Batch,
        reader: LineReader,
        steadily: Steadily[object],
        admit: Admit = lambda lines: lines,
    ) -> None:
        self._batches = batches
        self._batch = batch
        self._reader = reader
        self._steadily = steadily
        self._admit = admit
        self.offset = batch.input_offset  # bytes that are in

    def run(self, file: IO[bytes], size: int) -> Iterator[list[str]]:
        """Take in the rest of the `size` bytes; gives the models of each chunk, once that is committed."""
        for chunk in chunks(file, self.offset, size, self._batch.input_lines, self._reader.max_bytes):
            lines, rejections = self._reader.read(
                chunk, lambda ids: self._ask(lambda: self._batches.known(self._batch.id, ids))
            )
            admitted = self._admit(lines)
            if len(admitted) == len(lines):
                yield self._take(chunk, admitted, rejections)
                continue
            first_left = lines[len(admitted)].number
            before = [line for line in chunk if line.number < first_left]
            if before:
                yield self._take(before, admitted, [one for one in rejections if one.number < first_left])
            return

    def _take(self, chunk: Sequence[RawLine], lines: Sequence[Line], rejections: Sequence[Rejection]) -> list[str]:
        start, end, last_line = self.offset, chunk[-1].end, chunk[-1].number
        self._ask(
            lambda: self._batches.take_in(
                self._batch, lines, rejections, start_offset=start, end_offset=end, last_line=last_line
            )
        )
        self.offset = end
        return list(dict.fromkeys(line.request.model for line in lines))

    def _ask(self, work: Callable[[], T]) -> T:
        answer: T = self._steadily(work)  # type: ignore[assignment]
        return answer
