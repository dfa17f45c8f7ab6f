"""Which runs a measurement consists of, round by round."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.engine.contestants import CONTESTANTS, Contestant

_CONVERSATION_WIDTH = 16
_FIRST_TOKEN_WIDTH = 24
_ONCE = {"transformers-single"}  # slow, and no promise rests on it
_CONVERSING = {"headrace": "bf16", "openvino": "fp16"}


@dataclass(frozen=True)
class Case:
    """What has one line in the table. Its best width counts."""

    workload: str
    engine: str
    precision: str
    reuse: bool = False


@dataclass(frozen=True)
class Run:
    """One process to start."""

    case: Case
    width: int

    @property
    def contestant(self) -> Contestant:
        """Who runs it."""
        return CONTESTANTS[self.case.engine]


def runs(
    round_number: int, best_widths: Mapping[Case, int], *, quick: bool, only_width: int | None = None
) -> Iterator[Run]:
    """The runs of a round, engines taking turns. In the first, every width is tried; later the best goes on.

    `only_width` is tried instead of all, where an engine has several.
    """
    for case in _cases(quick=quick):
        if case in best_widths:
            if case.engine not in _ONCE:
                yield Run(case, best_widths[case])
        elif round_number == 0:
            for width in _widths(case, only_width, quick=quick):
                yield Run(case, width)


def _cases(*, quick: bool) -> Iterator[Case]:
    for contestant in CONTESTANTS.values():
        if not (quick and contestant.name in _ONCE):
            yield from (Case("mixed", contestant.name, precision) for precision in contestant.precisions)
    for engine, precision in _CONVERSING.items():
        yield from (Case("conversations", engine, precision, reuse) for reuse in (False, True))
    yield Case("first_token", "headrace", "bf16")


def _widths(case: Case, only_width: int | None, *, quick: bool) -> tuple[int, ...]:
    if case.workload == "conversations":
        return (_CONVERSATION_WIDTH,)
    if case.workload == "first_token":
        return (_FIRST_TOKEN_WIDTH,)
    widths = CONTESTANTS[case.engine].widths
    if only_width and len(widths) > 1:
        return (only_width,)
    return widths[:1] if quick else widths
