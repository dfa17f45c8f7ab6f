"""The arithmetic of the benchmarks, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.record import Comparison, Promise, percentile


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Rounds are compared with themselves, so that a slow minute of the machine slows both sides of its round."""
    comparison = Comparison(ours=[100.0, 20.0, 90.0], theirs=[10.0, 4.0, 30.0], unit="jobs/s")
    assert comparison.ratios == [10.0, 5.0, 3.0]
    assert comparison.ratio == 5.0


@pytest.mark.parametrize(
    ("promise", "ratio", "held"),
    [
        (Promise("", at_least=5.0), 5.0, True),
        (Promise("", at_least=5.0), 4.99, False),
        (Promise("", at_most=1.5), 1.5, True),
        (Promise("", at_most=1.5), 1.51, False),
    ],
)
def test_a_promise_is_held_up_to_its_bound(promise: Promise, ratio: float, held: bool) -> None:  # noqa: FBT001
    """The bound itself still holds."""
    assert promise.holds(ratio) is held


def test_percentiles_are_values_that_were_measured() -> None:
    """Nearest rank, never beyond the last."""
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 1.0) == 3.0


def test_a_record_says_where_and_with_what_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, hardware, date, every round, and whether the promise held."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    comparison = Comparison([10.0, 12.0], [2.0, 3.0], "jobs/s")
    path = record.write("some", {"jobs": 7}, {"ours": [10.0, 12.0]}, comparison, Promise("5 times", at_least=5.0))
    kept = json.loads(path.read_text())
    assert kept["hardware"]["cores"] >= 1
    assert kept["versions"]["celery"]
    assert kept["parameters"] == {"jobs": 7}
    assert (kept["ratio"], kept["ratio_range"], kept["held"]) == (4.5, [4.0, 5.0], False)
