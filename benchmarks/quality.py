"""What quantization costs in answers: tiny-chat's held-out skills, exact match, once for each scheme.

A random model can show speed but no quality. tiny-chat is small, which makes it a hard case: less redundancy hides a
rounding. All schemes see the same conversations, greedily, through `models.engine.load_engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, hardware
from benchmarks.turns import held
from examples.tiny_chat_training.evaluate import EXAMS, LONGEST_ANSWER_TOKENS, Score
from examples.tiny_chat_training.generate import Message
from models.catalog import Catalog, CatalogError
from models.engine import load_engine
from models.prompt import PromptFormat, load_prompt_format
from models.protocol import Ended, Engine, EngineError, GenerationRequest, SamplingParams

SCHEMES = ("none", "int8-onednn", "int8", "nf4")
TOLERATED_POINTS = 1.0
_HELD_TO_IT = ("int8-onednn", "int8")  # nf4 is a memory format: what it costs is told, not promised
_EXAMPLES = 2_000
_ALL = "all skills"


def measure(*, quick: bool, lock: Path | None = None) -> bool:
    """Returns whether the 8-bit schemes stay within a point of none. `lock` is a file to hold during each scheme."""
    examples = 10 if quick else -(-_EXAMPLES // len(EXAMS))
    console = Console(stderr=True)
    scores: dict[str, list[Score]] = {}
    for scheme in SCHEMES:
        try:
            with held(lock):
                scores[scheme] = score(scheme, examples)
        except (EngineError, CatalogError) as error:
            console.print(f"{scheme} is absent: {error}", markup=False)
    lost = {scheme: points_lost(scores, scheme) for scheme in scores if scheme != "none"}
    kept = {scheme: lost[scheme] <= TOLERATED_POINTS for scheme in _HELD_TO_IT if scheme in lost}
    if not quick:
        _write(scores, lost, kept)
    _show(scores, lost, kept)
    return quick or all(kept.values())


def score(scheme: str, examples: int) -> list[Score]:
    """Each skill on so many examples, the same ones at every call, and all of them together last.

    Raises `CatalogError` or `EngineError` if the scheme cannot be had here.
    """
    spec = Catalog.from_mapping({"tiny-chat": {"quantization": scheme, **_type_of(scheme)}}).get("tiny-chat")
    form = load_prompt_format(spec)
    engine = load_engine(spec, "cpu")
    try:
        scores = [_examine(engine, form, skill, examples) for skill in EXAMS]
    finally:
        engine.close()
    return [*scores, Score(_ALL, sum(one.right for one in scores), sum(one.total for one in scores))]


def _type_of(scheme: str) -> Mapping[str, Any]:
    """As the catalog has it without quantization; quantized, in the type that the weights are stored in."""
    return {} if scheme == "none" else {"dtype": "auto"}


def _examine(engine: Engine, form: PromptFormat, skill: str, examples: int) -> Score:
    rng = Random(f"exam {skill}")
    exams = [EXAMS[skill](rng) for _ in range(examples)]
    for number, exam in enumerate(exams):
        engine.submit(_request(form, f"{skill}-{number}", exam[:-1]))
    given: dict[str, Ended] = {}
    while engine.has_work():
        given |= {event.id: event for event in engine.step() if isinstance(event, Ended)}
    right = sum(_is_right(given[f"{skill}-{number}"], exam[-1]["content"]) for number, exam in enumerate(exams))
    return Score(skill, right, examples)


def _request(form: PromptFormat, name: str, messages: list[Message]) -> GenerationRequest:
    sampling = SamplingParams(LONGEST_ANSWER_TOKENS, temperature=0.0)
    return GenerationRequest(name, tuple(form.encode_messages(messages)), sampling)


def _is_right(ended: Ended, expected: str) -> bool:
    """Every character, and it ended by itself."""
    return ended.outcome == "succeeded" and (ended.choices[0].text, ended.choices[0].finish_reason) == (
        expected,
        "stop",
    )


def points_lost(scores: Mapping[str, Sequence[Score]], scheme: str) -> float:
    """Percentage points over all skills, against none; negative if it is better."""
    return 100 * (scores["none"][-1].accuracy - scores[scheme][-1].accuracy)


def _write(scores: Mapping[str, Sequence[Score]], lost: Mapping[str, float], kept: Mapping[str, bool]) -> None:
    RESULTS.mkdir(exist_ok=True)
    record = {
        "name": "quality",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "model": "tiny-chat",
        "records": [
            {"quantization": scheme, **one.record(), "accuracy": round(one.accuracy, 4)}
            for scheme, skills in scores.items()
            for one in skills
        ],
        "points_lost": {scheme: round(points, 2) for scheme, points in lost.items()},
        "promise": f"int8-onednn and int8 at most {TOLERATED_POINTS:g} point below none",
        "held": kept,
    }
    (RESULTS / "quality.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _show(scores: Mapping[str, Sequence[Score]], lost: Mapping[str, float], kept: Mapping[str, bool]) -> None:
    table = Table(title="tiny-chat, exact match on held-out skills", title_justify="left")
    for column in ("skill", *scores):
        table.add_column(column, justify="left" if column == "skill" else "right")
    for skills in zip(*scores.values(), strict=True):
        table.add_row(skills[0].skill, *(f"{one.accuracy:.1%} ({_interval(one)})" for one in skills))
    console = Console(width=140)
    console.print(table)
    for scheme, points in lost.items():
        word = {True: "held", False: "MISSED", None: "not promised"}[kept.get(scheme)]
        console.print(f"{scheme}: {points:+.2f} points lost: {word}")


def _interval(one: Score) -> str:
    low, high = one.interval()
    return f"{low:.1%} to {high:.1%}"
