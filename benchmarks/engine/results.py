"""From runs to figures: medians, ratios round by round, promises, results/engine.json."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from benchmarks.engine.plan import Case
from benchmarks.record import RESULTS, Promise, hardware

Record = Mapping[str, Any]

OURS = Case("mixed", "headrace", "bf16")
OURS_INT8 = Case("mixed", "headrace", "int8")
_TALKS = Case("conversations", "headrace", "bf16", reuse=False)
_TALKS_REUSED = Case("conversations", "headrace", "bf16", reuse=True)
_FIRST_TOKEN = Case("first_token", "headrace", "bf16")
# Whoever takes this many times our time in the first round is not measured again: no round can turn that.
_FAR_BEHIND = 3.0


def _seconds(runs: Sequence[Record]) -> float:
    """Of the round that all widths took part in. `first_token` has one width, and no wall."""
    return float(runs[0].get("wall_seconds", 0.0))


@dataclass
class Results:
    """Every run so far: for each case, by width, one record a round."""

    runs: dict[Case, dict[int, list[Record]]] = field(default_factory=dict)

    def add(self, case: Case, record: Record) -> None:
        """Keep a run."""
        self.runs.setdefault(case, {}).setdefault(record["width"], []).append(record)

    def best_widths(self) -> dict[Case, int]:
        """For each case, that with the least time in the first round."""
        return {case: min(widths, key=lambda width: _seconds(widths[width])) for case, widths in self.runs.items()}

    def worth_repeating(self) -> dict[Case, int]:
        """The best widths of those that are not far behind us at the same work."""
        widths, ours = self.best_widths(), self.best(OURS)
        limit = _FAR_BEHIND * _seconds(ours) if ours else math.inf
        return {
            case: width
            for case, width in widths.items()
            if case.workload != OURS.workload or _seconds(self.runs[case][width]) <= limit
        }

    def best(self, case: Case) -> list[Record]:
        """The runs of a case at its best width; none if it was not measured."""
        return self.runs[case][self.best_widths()[case]] if case in self.runs else []

    def records(self, ideal_seconds: Mapping[str, float]) -> list[dict[str, Any]]:
        """One for each case: medians, and of `mixed` the share of the ideal time's rate that is reached."""
        return [self._record(case, ideal_seconds) for case in self.runs]

    def _record(self, case: Case, ideal_seconds: Mapping[str, float]) -> dict[str, Any]:
        runs = self.best(case)
        record = dict(runs[len(runs) // 2])
        for name in ("wall_seconds", "tokens_per_second"):
            if name in record:
                record[name] = statistics.median(run[name] for run in runs)
                record[f"{name}_rounds"] = [run[name] for run in runs]
        if case.workload == "mixed":
            record["tokens_per_second_by_width"] = {
                str(width): statistics.median(run["tokens_per_second"] for run in runs)
                for width, runs in self.runs[case].items()
            }
            if record["width"] > 1 and ideal_seconds:
                ideal = ideal_seconds["int8" if case.precision == "int8" else "bf16"]
                record["share_of_ideal"] = round(ideal / record["wall_seconds"], 3)
        return record


@dataclass(frozen=True)
class Aim:
    """A promise, and the figure that it is about: one for each round, none if what it needs was not measured."""

    name: str
    promise: Promise
    figures: Callable[[Results], Sequence[float]]

    def checked(self, results: Results) -> dict[str, Any]:
        """Its line in the results. `held` is None if it could not be checked."""
        figures = self.figures(results)
        figure = statistics.median(figures) if figures else None
        return {
            "name": self.name,
            "promise": self.promise.text,
            "at_least": self.promise.at_least,
            "at_most": self.promise.at_most,
            "figure": None if figure is None else round(figure, 4),
            "range": [round(min(figures), 4), round(max(figures), 4)] if figures else None,
            "held": None if figure is None else self.promise.holds(figure),
        }


def _faster(ours: Case, theirs: Case) -> Callable[[Results], list[float]]:
    """Ours over theirs in tokens per second, of each round: what the machine did to both cancels out."""
    return lambda results: [
        a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in zip(results.best(ours), results.best(theirs), strict=False)
    ]


def _reuse_saves(results: Results) -> list[float]:
    pairs = zip(results.best(_TALKS_REUSED), results.best(_TALKS), strict=False)
    return [a["wall_seconds"] / b["wall_seconds"] for a, b in pairs]


def _figure(case: Case, name: str) -> Callable[[Results], list[float]]:
    return lambda results: [float(run[name]) for run in results.best(case) if name in run]


def _mixed(engine: str, precision: str) -> Case:
    return Case("mixed", engine, precision)


AIMS = (
    Aim(
        "mixed_bf16_over_transformers_padded",
        Promise("mixed, bf16: at least 5.5 times transformers in padded batches", at_least=5.5),
        _faster(OURS, _mixed("transformers-padded", "bf16")),
    ),
    Aim(
        "mixed_bf16_over_transformers_continuous",
        Promise("mixed, bf16: at least 2.7 times transformers' continuous batching", at_least=2.7),
        _faster(OURS, _mixed("transformers-continuous", "bf16")),
    ),
    Aim(
        "mixed_bf16_over_vllm_cpu",
        Promise("mixed, bf16: at least 1.8 times vLLM", at_least=1.8),
        _faster(OURS, _mixed("vllm-cpu", "bf16")),
    ),
    Aim(
        "mixed_bf16_over_openvino_fp16",
        Promise("mixed, bf16: at least 1.05 times OpenVINO with fp16 weights", at_least=1.05),
        _faster(OURS, _mixed("openvino", "fp16")),
    ),
    Aim(
        "mixed_int8_over_openvino_int8",
        Promise("mixed, int8: at least 1.25 times OpenVINO with int8 weights", at_least=1.25),
        _faster(OURS_INT8, _mixed("openvino", "int8")),
    ),
    Aim(
        "conversations_reuse_over_none",
        Promise("conversations: with reuse at most 0.42 of the time without", at_most=0.42),
        _reuse_saves,
    ),
    Aim(
        "conversations_computed_over_new",
        Promise("conversations: prompt tokens computed at most 1.05 times the new ones", at_most=1.05),
        _figure(_TALKS_REUSED, "computed_over_new"),
    ),
    Aim(
        "conversations_second_tenant",
        Promise("conversations: another tenant's cache is never hit", at_most=0),
        _figure(_TALKS_REUSED, "second_tenant_cached_tokens"),
    ),
    Aim(
        "first_token_step",
        Promise("first token of a short request by the third step, beside 15 rows and a long prompt", at_most=3),
        _figure(_FIRST_TOKEN, "first_token_step"),
    ),
    Aim(
        "longest_step_seconds",
        Promise("no step longer than 0.5 s meanwhile", at_most=0.5),
        _figure(_FIRST_TOKEN, "longest_step_seconds"),
    ),
)


def summary(results: Results, roofline: Mapping[str, Any], absent: Sequence[str]) -> dict[str, Any]:
    """What results/engine.json holds."""
    checked = [aim.checked(results) for aim in AIMS]
    return {
        "name": "engine",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "roofline": roofline,
        "absent": list(absent),
        "records": results.records(roofline.get("ideal_seconds", {})),
        "ratios": {line["name"]: line["figure"] for line in checked},
        "promises": checked,
    }


def write(found: Mapping[str, Any]) -> None:
    """Keep it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
