"""Packed and fused models on a CPU say what the untouched model says, compiled or in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import fused
from models.attention import Reference
from models.blocks import Lease
from models.catalog import ModelSpec
from models.engine import load_engine
from models.fused import prepare_for_cpu
from models.kernels.cpu import CompiledOps, CpuKernels, Ops, TorchOps, compiled
from models.linears import Int8, Own, Packed, Part, Plain
from models.loading import load_model
from models.protocol import ModelLoadError
from models.rows import Row
from models.runner import _row
from models.scheduler import Work
from models.stack import Stack

Load = Callable[..., tuple[Path, Any]]
TORCH = TorchOps()
WIDE = {"head_dim": 32}  # the compiled attention takes multiples of 32
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": {"hidden_size": 128},
    "qwen3": WIDE,
    "mistral": {**WIDE, "sliding_window": 8},
}


def ops_of(name: str) -> Ops:
    """The compiled operations, or their twin."""
    if name == "torch":
        return TORCH
    ops = compiled()
    if ops is None:
        pytest.skip("nothing can be compiled here")
    return ops


def engine_of(folder: Path, ops: Ops, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """An engine that has checked its attention against the model's own, on packed weights."""
    monkeypatch.setattr(fused, "compiled", lambda: ops)
    return load_engine(ModelSpec(name="m", path=str(folder), **settings), device="cpu")


def logits_of(engine: Any, ids: list[int]) -> Tensor:
    """All logits of one prompt, in two chunks and then two single tokens."""
    row, parts = row_of(engine, ids), []
    for first, end in ((0, 20), (20, len(ids) - 2), (len(ids) - 2, len(ids) - 1), (len(ids) - 1, len(ids))):
        step = engine._runner.pack([Work(row, first, end - first)])
        with torch.inference_mode():
            parts.append(engine._runner.forward(step, torch.arange(end - first)))
    engine._blocks.release(row.lease, ())
    return torch.cat(parts)


def row_of(engine: Any, ids: list[int]) -> Row:
    """A row with blocks for these tokens."""
    row = _row(ids)
    row.lease = Lease("test")
    engine._blocks.grow(row.lease, len(ids))
    return row


@pytest.mark.parametrize("ops", ["torch", "compiled"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_untouched_models(
    architecture: str, ops: str, tiny_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, through the fused layers and the paged pool; without a step, through the model's own code too."""
    folder, model = tiny_model(architecture, **ARCHITECTURES[architecture])
    engine = engine_of(folder, ops_of(ops), monkeypatch)
    assert isinstance(engine._model.base_model.forward, Stack)
    assert isinstance(engine._runner._kernels, CpuKernels if ops == "compiled" else Reference)
    ids = torch.randint(0, 250, (45,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0]
        engine._model.set_attn_implementation("eager")
        own = engine._model(torch.tensor([ids]), use_cache=False).logits[0]
        engine._model.set_attn_implementation("headrace")
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(engine, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quantization", ["none", "int8-onednn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_call_for_all_layers_gives_every_bit_of_single_operations(  # noqa: PLR0917
    architecture: str, dtype: str, quantization: str, threads: int, tiny_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and single tokens, fresh and continued, by one thread or two; and that call is what runs."""
    monkeypatch.setattr(CompiledOps, "multiplies", lambda *_: True)
    folder, _ = tiny_model(architecture, **ARCHITECTURES[architecture])
    engine = engine_of(folder, ops_of("compiled"), monkeypatch, dtype=dtype, quantization=quantization)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = logits_of(engine, list(range(3, 78)))
        with monkeypatch.context() as single:
            single.setattr(engine._model.base_model.forward, "_compiled", None)
            wanted = logits_of(engine, list(range(3, 78)))
        monkeypatch.setattr(Stack, "_by_operation", None)
        assert torch.equal(made, wanted)
        assert torch.equal(logits_of(engine, list(range(3, 78))), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("quantization", ["none", "int8-onednn"])
@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_the_last_layer_computes_what_is_wanted(
    architecture: str, quantization: str, tiny_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token, single ones, stretches within a row and across rows: as if all had been, and later steps alike."""
    monkeypatch.setattr(CompiledOps, "multiplies", lambda *_: True)
    folder, _ = tiny_model(architecture, **ARCHITECTURES[architecture])
    engine = engine_of(folder, ops_of("compiled"), monkeypatch, quantization=quantization)
    rows = [row_of(engine, list(range(at, at + 80))) for at in (3, 50, 90)]
    engine._runner.run([Work(row, 0, 40) for row in rows])
    step = engine._runner.pack([Work(rows[0], 40, 1), Work(rows[1], 40, 20), Work(rows[2], 40, 12)])
    with torch.inference_mode():
        everything = engine._runner.forward(step, torch.arange(33))
        keys = [tensor.clone() for tensor in (*engine._pool.keys, *engine._pool.values)]
        for wanted in ([], [0], [20], [0, 20, 32], [5, 6, 7], [0, 1, 2], [19, 20, 21, 22, 30], list(range(1, 33))):
            assert torch.equal(engine._runner.forward(step, torch.tensor(wanted).long()), everything[wanted])
    assert all(map(torch.equal, (*engine._pool.keys, *engine._pool.values), keys))


@pytest.mark.parametrize("ops", ["torch", "compiled"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_int8_is_the_quantization_it_says(
    architecture: str, ops: str, tiny_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits equal, to rounding, those of a float64 model whose linear layers quantize weights and activations."""
    folder, model = tiny_model(architecture, **ARCHITECTURES[architecture])
    engine = engine_of(folder, ops_of(ops), monkeypatch, quantization="int8-onednn")
    ids = torch.randint(0, 250, (45,), generator=torch.Generator().manual_seed(4)).tolist()
    emulated = emulate_int8(load_model(ModelSpec(name="m", path=str(folder)), "cpu").double())
    with torch.inference_mode():
        expected = emulated(torch.tensor([ids]), use_cache=False).logits[0].float()
        exact = model(torch.tensor([ids]), use_cache=False).logits[0]
    actual = logits_of(engine, ids)
    # A value on the edge between two steps falls to either side, in either arithmetic: near, not equal
    assert relative(actual, expected) < 0.3 * relative(expected, exact)
    assert relative(actual, exact) < 0.1
    assert engine.health().quantization == "int8-onednn"
    assert isinstance(engine._model.get_output_embeddings(), Plain)


def emulate_int8(model: Any) -> Any:
    """The same scheme, in place, in plain arithmetic."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = to_steps(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (to_steps(inputs[0]),))
    return model


def to_steps(x: Tensor) -> Tensor:
    scales = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / scales).round() * scales


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_weights_are_not_kept_twice(tiny_model: Load) -> None:
    """What is packed leaves no plain linear layer, and no parameter, behind; int8 spares the output head."""
    for quantization, kind in (("none", Plain), ("int8-onednn", Int8)):
        model = load_model(ModelSpec(name="m", path=str(tiny_model("llama", **WIDE)[0])), "cpu")
        prepare_for_cpu(model, quantization, ops=TORCH)
        assert not any(type(module) is nn.Linear for module in model.modules())
        names = {name.split(".")[-2] for name, _ in model.named_parameters()}
        assert names == {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}
        attention = model.base_model.layers[0].self_attn
        assert isinstance(attention.q_proj, Part)
        assert isinstance(attention.o_proj, kind)
        assert isinstance(attention.q_proj.together.linear, kind)


def test_our_own_product_is_used_where_the_cpu_has_the_instructions(
    tiny_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 and 8-bit layers of fitting widths; oneDNN's for the others, and in a CPU without them."""
    ops = ops_of("compiled")
    assert isinstance(ops, CompiledOps)
    for has_them in (True, False):
        monkeypatch.setattr(CompiledOps, "multiplies", lambda _, dtype, yes=has_them: yes and dtype != torch.float32)
        for quantization, other in (("none", Plain), ("int8-onednn", Int8)):
            spec = ModelSpec(
                name="m", path=str(tiny_model("qwen2", hidden_size=128, vocab_size=270)[0]), dtype="bfloat16"
            )
            model = load_model(spec, "cpu")
            prepare_for_cpu(model, quantization, ops=ops)
            assert isinstance(model.base_model.layers[0].mlp.down_proj, Own if has_them else other)
            assert isinstance(model.lm_head, Plain)  # 270 outputs: no multiple of 32


def test_other_architectures_keep_their_own_layers(tiny_model: Load) -> None:
    """Experts and routers ride along; Gemma's blocks, which are of another kind, keep their code."""
    for architecture, settings in (
        ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
        ("gemma2", {**WIDE, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    ):
        folder, untouched = tiny_model(architecture, **settings)
        model = load_model(ModelSpec(name="m", path=str(folder)), "cpu")
        prepare_for_cpu(model, "none", ops=TORCH)
        assert not isinstance(model.base_model.forward, Stack)
        assert any(isinstance(module, Packed) for module in model.modules())
        ids = torch.arange(30).unsqueeze(0)
        with torch.inference_mode():
            wanted, made = (m(ids, use_cache=False).logits for m in (untouched, model))
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_partial_rotation_and_biased_mlps_are_not_fused(tiny_model: Load) -> None:
    """What the fused code does not know is left to the model."""
    for settings in ({"mlp_bias": True}, {"hidden_act": "gelu"}):
        folder, _ = tiny_model("llama", **WIDE, **settings)
        model = load_model(ModelSpec(name="m", path=str(folder)), "cpu")
        prepare_for_cpu(model, "none", ops=TORCH)
        assert not isinstance(model.base_model.forward, Stack)
    model = load_model(ModelSpec(name="m", path=str(tiny_model("llama", **WIDE)[0])), "cpu")
    model.base_model.rotary_emb.inv_freq = model.base_model.rotary_emb.inv_freq[:8]
    prepare_for_cpu(model, "none", ops=TORCH)
    assert not isinstance(model.base_model.forward, Stack)


def test_int8_onednn_is_refused_on_a_gpu(tiny_model: Load) -> None:
    """By the field's name, before anything is loaded."""
    spec = ModelSpec(name="m", path=str(tiny_model()[0]), quantization="int8-onednn")
    with pytest.raises(ModelLoadError, match="quantization int8-onednn runs on a CPU only, not on cuda"):
        load_model(spec, "cuda")


def test_bfloat16_stays_near_the_untouched_model(tiny_model: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepacked, fused, and with the compiled operations where they can be had."""
    folder, model = tiny_model("qwen3", **WIDE)
    ops = compiled() or TORCH
    engine = engine_of(folder, ops, monkeypatch, dtype="bfloat16")
    assert isinstance(ops, CompiledOps | TorchOps)
    ids = list(range(3, 48))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0]
    assert relative(logits_of(engine, ids).float(), expected) < 0.03
