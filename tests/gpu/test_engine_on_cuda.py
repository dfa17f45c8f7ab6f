"""The engine on a GPU: Triton's attention and CUDA graphs change no answer, and faults cost only their owner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.models.test_engine_parity import ARCHITECTURES, PROMPTS, TIE, compare, requests, serve, small_engine

from models.attention import Kernels, Reference
from models.catalog import ModelSpec
from models.engine import load_engine
from models.loading import load_model
from models.prompt import load_prompt_format
from models.protocol import Ended, GenerationRequest
from models.scheduler import Work
from models.transformers_engine import TransformersEngine

pytestmark = pytest.mark.gpu
Ask = Callable[..., GenerationRequest]
Finish = Callable[..., dict[str, Ended]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_generate_under_everything_at_once(
    architecture: str, tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU: mixed arrival, chunks, prefix hits, preemption and cancelled neighbours, greedy in float32."""
    folder, model = tiny_model(architecture, **ARCHITECTURES[architecture])
    model.set_attn_implementation("eager")
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    engine = small_engine(folder, model, "cuda")
    wanted = requests()
    ended = serve(engine, ask, wanted)
    assert engine._scheduler.preemptions > 0
    engine._blocks.check()
    gaps = [
        gap
        for request_id, (prompt, max_tokens) in wanted.items()
        if (gap := compare(model, prompt, ended[request_id].choices[0].token_ids, max_tokens)) is not None
    ]
    print(f"{architecture}: {len(gaps)} of {PROMPTS} answers differ, at gaps of {gaps}; {graphs_of(engine)} graphs")  # noqa: T201
    assert all(gap < TIE for gap in gaps)


def graphs_of(engine: TransformersEngine) -> int:
    graphs = engine._runner._graphs
    return len(graphs._captured) if graphs else 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_change_nothing(
    dtype: str, tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, finish: Finish
) -> None:
    """The same rows, with graphs and without: the same tokens; and plain torch says the same in float32."""
    folder, _ = tiny_model("qwen2")
    answers = []
    for kernels, graphs in ((None, True), (None, False), (Reference(), False)):
        engine = build(folder, dtype, kernels, graphs=graphs)
        assert (engine._runner._graphs is not None) == graphs
        for at in range(11):
            engine.submit(ask(str(at), [at, *range(7 * at)], 10 + 3 * at, ignore_eos=True))
        ended = finish(engine)
        answers.append({request_id: end.choices[0].token_ids for request_id, end in ended.items()})
        assert (graphs_of(engine) > 0) == graphs
    assert answers[0] == answers[1]
    assert dtype != "float32" or answers[1] == answers[2]


def build(folder: Path, dtype: str, kernels: Kernels | None, *, graphs: bool) -> TransformersEngine:
    spec = ModelSpec(name="tiny", path=str(folder), dtype=dtype, slots=8)
    return TransformersEngine(spec, load_model(spec, "cuda"), load_prompt_format(spec), kernels=kernels, graphs=graphs)


def test_real_out_of_memory_costs_only_its_owner(
    tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that asks for more memory than there is: its row fails, the others end, and the engine goes on."""
    engine = load_engine(ModelSpec(name="tiny", path=str(tiny_model()[0]), slots=8), "cuda")
    assert isinstance(engine, TransformersEngine)
    run = engine._runner.run

    def greedy_row(works: Sequence[Work]) -> Tensor:
        if any(work.row.flight.request.id == "3" for work in works):
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return run(works)

    monkeypatch.setattr(engine._runner, "run", greedy_row)
    for at in range(6):
        engine.submit(ask(str(at), "hello", 8))
    ended = finish(engine)
    assert {request_id: end.error and end.error.code for request_id, end in ended.items()} == {
        **dict.fromkeys("01245"),
        "3": "out_of_memory",
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_bitsandbytes_serves(
    quantization: str, tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, finish: Finish
) -> None:
    """Its 8- and 4-bit layers load on a GPU and answer, several rows at once."""
    pytest.importorskip("bitsandbytes")
    folder, _ = tiny_model()
    engine = load_engine(ModelSpec(name="tiny", path=str(folder), dtype="bfloat16", quantization=quantization), "cuda")
    for at in range(4):
        engine.submit(ask(str(at), "hello" * (at + 1), 12, ignore_eos=True))
    ended = finish(engine)
    assert {(end.outcome, len(end.choices[0].token_ids)) for end in ended.values()} == {("succeeded", 12)}
