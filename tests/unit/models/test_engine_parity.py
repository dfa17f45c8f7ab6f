"""Greedy float32 answers equal transformers' `generate` token by token, whatever the scheduler does meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.attention import Reference
from models.catalog import ModelSpec
from models.engine import load_engine
from models.kernels import cpu
from models.kernels.cpu import CompiledOps
from models.protocol import Ended, Event, GenerationRequest
from models.stack import Stack
from models.transformers_engine import TransformersEngine

Ask = Callable[..., GenerationRequest]
PROMPTS = 20
POOL_BLOCKS = 12  # of 16 tokens: five rows at their longest would need 35
TIE = 1e-4  # two logits this close may swap places by rounding
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
# With heads wide enough for the fused layers and the compiled attention of CPUs.
FUSED: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen2": {"hidden_size": 128},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 8},
}


@pytest.mark.parametrize(
    ("architecture", "settings", "fused"),
    [
        *(pytest.param(name, settings, False, id=name) for name, settings in ARCHITECTURES.items()),
        *(pytest.param(name, settings, True, id=f"{name}-fused") for name, settings in FUSED.items()),
    ],
)
def test_equals_generate_under_everything_at_once(
    architecture: str,
    settings: dict[str, Any],
    tiny_model: Callable[..., tuple[Path, Any]],
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fused: bool,
) -> None:
    """Mixed arrival, chunked prefill, prefix hits, preemption and cancelled neighbours change no token."""
    folder, model = tiny_model(architecture, **settings)
    model.set_attn_implementation("eager")  # the only one that has every rule, Gemma's soft cap too
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    engine = small_engine(folder, model)
    assert isinstance(engine._runner._kernels, Reference) or _is_fused(engine) is fused
    wanted = requests()
    ended = serve(engine, ask, wanted)
    assert engine._scheduler.preemptions > 0
    assert sum(end.usage.cached_tokens for end in ended.values()) > 0
    engine._blocks.check()
    mismatches = [
        mismatch
        for request_id, (prompt, max_tokens) in wanted.items()
        if (mismatch := compare(model, prompt, ended[request_id].choices[0].token_ids, max_tokens))
    ]
    ties = [gap for gap in mismatches if gap < TIE]
    print(f"{architecture}: {len(ties)} of {PROMPTS} answers differ at a tie")  # noqa: T201  shown by -s
    assert mismatches == ties


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("quantization", ["none", "int8-onednn"])
def test_one_call_for_all_layers_answers_as_single_operations_do(
    architecture: str,
    quantization: str,
    tiny_model: Callable[..., tuple[Path, Any]],
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16, under all of the above: every answer, token by token."""
    if cpu.compiled() is None:
        pytest.skip("nothing can be compiled here")
    monkeypatch.setattr(CompiledOps, "multiplies", lambda *_: True)
    folder, model = tiny_model(architecture, **FUSED[architecture])
    answers = []
    for single in (False, True):
        engine = small_engine(folder, model, dtype="bfloat16", quantization=quantization)
        stack = engine._model.base_model.forward
        assert isinstance(stack, Stack)
        assert stack._compiled is not None
        monkeypatch.setattr(stack, "_compiled" if single else "_by_operation", None)
        ended = serve(engine, ask, wanted := requests())
        assert engine._scheduler.preemptions > 0
        answers.append([ended[request_id].choices[0].token_ids for request_id in wanted])
    assert answers[0] == answers[1]


def _is_fused(engine: TransformersEngine) -> bool:
    return isinstance(engine._model.base_model.forward, Stack)


def small_engine(folder: Path, model: Any, device: str = "cpu", **settings: Any) -> TransformersEngine:
    """Five slots, a pool too small for them, and steps of 24 tokens."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    value_bytes = 2 if settings.get("dtype") == "bfloat16" else 4
    token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * value_bytes
    memory = (POOL_BLOCKS + 1) * 16 * token_bytes
    spec = ModelSpec(name="tiny", path=str(folder), slots=5, kv_memory_bytes=memory, **settings)
    engine = load_engine(spec, device)
    assert isinstance(engine, TransformersEngine)
    assert engine._blocks.blocks == POOL_BLOCKS
    engine._budget.tokens = engine._budget._most = 24
    engine._scheduler.reserved_tokens = 0  # admits too many, so that some have to give way
    engine._budget._target_seconds = float("inf")
    return engine


def requests() -> dict[str, tuple[list[int], int]]:
    """Prompts of 1 to 70 tokens, every third the beginning of another, and up to 40 tokens of answer."""
    draw = random.Random(7)
    made: dict[str, tuple[list[int], int]] = {}
    for at in range(PROMPTS):
        prompt = [draw.randrange(256) for _ in range(draw.randint(1, 70))]
        if at % 3 == 2:
            other = made[str(at - 1)][0]
            prompt = (other + prompt)[: draw.randint(1, 70)]
        made[str(at)] = (prompt, draw.randint(3, 40))
    return made


def serve(engine: TransformersEngine, ask: Ask, wanted: dict[str, tuple[list[int], int]]) -> dict[str, Ended]:
    """Some at first, one more every other step, and beside each a neighbour that is cancelled after three steps."""
    waiting = list(wanted.items())
    events: list[Event] = []
    steps = 0
    while engine.has_work() or waiting:
        if waiting and (steps % 2 == 0 or not engine.has_work()):
            request_id, (prompt, max_tokens) = waiting.pop(0)
            engine.submit(ask(request_id, prompt, max_tokens, ignore_eos=True))
            engine.submit(ask(f"neighbour {request_id}", [*prompt[:20], 5], 50))
        if steps >= 6 and steps % 2 == 0:
            engine.cancel(f"neighbour {steps // 2 - 3}")
        events += engine.step()
        steps += 1
    return {event.id: event for event in events if isinstance(event, Ended)}


def compare(model: Any, prompt: list[int], token_ids: tuple[int, ...], max_tokens: int) -> float | None:
    """None if these are generate's tokens, else the reference's gap between its two best where they first differ."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else each token 0 counts as padding
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = output.sequences[0, len(prompt) :].tolist()
    for token_id, right, logits in zip(token_ids, expected, output.logits, strict=True):
        if token_id != right:
            best = logits[0].topk(2).values
            return float(best[0] - best[1])
    return None
