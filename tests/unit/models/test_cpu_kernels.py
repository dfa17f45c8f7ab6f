"""The compiled operations equal their plain-torch twins, and building them harms nobody."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from models.attention import AttentionRules, Chunk, Reference, Step, as_tables
from models.huge_pages import Arena
from models.kernels import cpu
from models.kernels.cpu import CompiledOps, CpuKernels, Norm, Rotary, Scaled, TorchOps
from models.kv_pool import KVPool, LayerShape
from models.linears import Own

TWIN = TorchOps()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2}}


@pytest.fixture(scope="module")
def ops() -> CompiledOps:
    if shutil.which("g++") is None:
        pytest.skip("there is no compiler")
    compiled = cpu.compiled()
    assert compiled is not None
    return compiled


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype])


def equal_scaled(actual: Scaled, expected: Scaled) -> None:
    """Quantized values may differ by one where rounding decides."""
    if expected.scales is None:
        equal(actual.values, expected.values)
        return
    assert actual.scales is not None
    torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-5, atol=0)
    off = (actual.values.int() - expected.values.int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 192), (40, 896)])
def test_norm_products_and_quantization_equal_the_twin(
    ops: CompiledOps, dtype: torch.dtype, rows: int, width: int
) -> None:
    """With and without quantization, with and without scales on what comes in."""
    x, added = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    norm, scales = Norm(torch.rand(width).to(dtype), 1e-6), torch.rand(rows)
    equal_scaled(ops.quantize(x), TWIN.quantize(x))
    for incoming in (None, Scaled(added), Scaled(added, scales)):
        for quantize in (False, True):
            residuals = x.clone(), x.clone()
            made = [
                o.add_norm(r, incoming, norm, quantize=quantize) for o, r in zip((ops, TWIN), residuals, strict=True)
            ]
            equal(*residuals)
            if dtype == torch.float32 or not quantize:  # bf16: a residual that rounds otherwise moves many bytes
                equal_scaled(*made)
            gate_up = Scaled(torch.cat([x, added], -1) * 3, incoming.scales if incoming else None)
            equal_scaled(ops.silu_multiply(gate_up, quantize=quantize), TWIN.silu_multiply(gate_up, quantize=quantize))


def test_extreme_values_come_out_as_in_torch(ops: CompiledOps) -> None:
    """Large and small gates neither overflow nor vanish; a NaN stays one, and zeros quantize to zeros."""
    gates = torch.tensor([-1e4, -100, -88.5, -87, -20, -1e-30, 0, 1e-30, 1, 20, 88, 89, 1e4, torch.nan, 3, -3])
    gate_up = Scaled(torch.cat([gates, torch.ones(16)]).unsqueeze(0))
    made, wanted = (o.silu_multiply(gate_up, quantize=False).values for o in (ops, TWIN))
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert (ops.quantize(torch.zeros(2, 32)).values == cpu.ZERO_POINT).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (64, 96), (208, 1_056)])
@pytest.mark.parametrize("rows", [0, 1, 11, 12, 13, 24, 25, 131])
def test_products_equal_torchs(ops: CompiledOps, dtype: torch.dtype, inputs: int, outputs: int, rows: int) -> None:
    """Any number of rows, with a bias and without."""
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    for bias in (None, torch.randn(outputs).to(dtype)):
        made = ops.product(Scaled(x), cpu.packed_weights(weight, bias, Arena(), int8=False))
        equal(made, F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype))


@pytest.mark.parametrize("int8", [False, True])
def test_a_layer_keeps_the_shape_of_what_comes_before(ops: CompiledOps, *, int8: bool) -> None:
    """Several dimensions, a part of a larger tensor, and no rows: a step that only prefills asks for no logits."""
    layer = Own(torch.randn(64, 32).bfloat16(), None, ops, Arena(), int8=int8)
    x = torch.randn(2, 5, 64).bfloat16()[:, :, ::2]
    whole = layer(x)
    assert whole.shape == (2, 5, 64)
    assert torch.equal(layer(x[1:, 2:4]), whole[1:, 2:4])
    assert layer(x[:1, :0]).shape == (1, 0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_whoever_is_beside_it(ops: CompiledOps, dtype: torch.dtype) -> None:
    """Few rows and many go different ways through a product; a row comes out of each with the same bits."""
    weights = cpu.packed_weights(torch.randn(96, 208).to(dtype), torch.randn(96).to(dtype), Arena(), int8=False)
    rows = torch.randn(60, 208).to(dtype)
    together = ops.product(Scaled(rows), weights)
    alone = torch.cat([ops.product(Scaled(row[None].contiguous()), weights) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 12, 40])
def test_products_of_bytes_are_exact(ops: CompiledOps, dtype: torch.dtype, rows: int) -> None:
    """Sums of whole numbers, the largest there can be among them, brought back to their scales as in float64."""
    x, weight, bias = torch.randn(rows, 112).to(dtype), torch.randn(64, 112).to(dtype), torch.randn(64).to(dtype)
    weight[0], x[0] = 3.0, 2.0
    weight[1] = -3.0
    packed = cpu.packed_weights(weight, bias, Arena(), int8=True)
    assert packed.scales is not None
    whole = (weight.float() / packed.scales[:, None]).round().double()
    bytes_of = ops.quantize(x)
    assert bytes_of.scales is not None
    sums = (bytes_of.values.double() - cpu.ZERO_POINT) @ whole.T
    wanted = sums * (bytes_of.scales[:, None].double() * packed.scales.double()) + bias.double()
    torch.testing.assert_close(
        ops.product(bytes_of, packed), wanted.to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-5
    )
    assert whole[0].unique().tolist() == [127.0]


def test_an_arenas_tensors_are_zero_aligned_and_apart() -> None:
    """Of any size and type, more than one chunk of them; and they outlive the arena."""
    arena = Arena()
    made = [arena.zeros((size, 3), dtype) for size in (1, 7, 5 << 20, 0) for dtype in (torch.uint8, torch.float32)]
    del arena
    for number, tensor in enumerate(made):
        assert tensor.data_ptr() % 64 == 0 or not len(tensor)
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert all((tensor == number + 1).all() for number, tensor in enumerate(made))


def pool_of(  # noqa: PLR0917
    rows: int, contexts: list[int], kv_heads: int, dim: int, block_tokens: int, dtype: torch.dtype
) -> Any:
    """A pool whose blocks are dealt out at random, and the rows' tables."""
    needed = [-(-context // block_tokens) for context in contexts]
    layer = LayerShape(kv_heads, dim, dim, dtype, torch.device("cpu"))
    pool = KVPool([layer, layer], sum(needed) + 3, block_tokens)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.randn(tensor.shape))
    numbers = iter(torch.randperm(pool.blocks).tolist())
    return pool, as_tables([[next(numbers) for _ in range(count)] for count in needed])


def step_of(contexts: list[int], chunk_tokens: list[int], **pool_settings: Any) -> Step:
    """The last of `contexts` belong to chunks of so many tokens; the others decode."""
    pool, tables = pool_of(len(contexts), contexts, **pool_settings)
    decode_rows = len(contexts) - len(chunk_tokens)
    firsts = [decode_rows + sum(chunk_tokens[:at]) for at in range(len(chunk_tokens))]
    chunks = tuple(
        Chunk(decode_rows + at, first, tokens, contexts[decode_rows + at])
        for at, (first, tokens) in enumerate(zip(firsts, chunk_tokens, strict=True))
    )
    tokens = decode_rows + sum(chunk_tokens)
    slots = [
        int(tables[row, at // pool.block_tokens]) * pool.block_tokens + at % pool.block_tokens
        for row, context in enumerate(contexts)
        for at in range(context - ([1] * decode_rows + chunk_tokens)[row], context)
    ]
    return Step(
        pool, Reference(), torch.zeros(tokens).long(), torch.zeros(tokens).long(), torch.tensor(slots), tables,
        torch.tensor(contexts, dtype=torch.int32), decode_rows, max(contexts[:decode_rows], default=0), chunks,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (6, 6, 32), (8, 1, 96), (4, 2, 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_and_write_equal_the_twin(
    ops: CompiledOps, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, *, normed: bool
) -> None:
    """Queries, and the pool's keys and values, with bias, scales and the heads' norms."""
    settings = {"kv_heads": kv_heads, "dim": dim, "block_tokens": 16, "dtype": dtype}
    step = step_of([5, 33, 40], [30], **settings)
    tokens, width = len(step.slots), (heads + 2 * kv_heads) * dim
    qkv = Scaled(torch.randn(tokens, width).to(dtype), torch.rand(tokens) if normed else None)
    angle = torch.rand(tokens, dim // 2).repeat(1, 2) * 6
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    norm = Norm(torch.rand(dim).to(dtype), 1e-6) if normed else None
    how = Rotary(heads, kv_heads, dim, torch.randn(width).to(dtype) if normed else None, norm, norm)
    before = [tensor.clone() for tensor in (step.pool.keys[1], step.pool.values[1])]
    expected = TWIN.rotary_write(qkv, how, angles, step, 1), step.pool.keys[1].clone(), step.pool.values[1].clone()
    for tensor, old in zip((step.pool.keys[1], step.pool.values[1]), before, strict=True):
        tensor.copy_(old)
    actual = ops.rotary_write(qkv, how, angles, step, 1), step.pool.keys[1], step.pool.values[1]
    for made, wanted in zip(actual, expected, strict=True):
        equal(made, wanted)


RULES = {
    "plain": {},
    "window": {"sliding_window": 20},
    "wide window": {"sliding_window": 130},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 70, "softcap": 3.0, "sinks": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens"), [(14, 2, 64, 16), (3, 3, 32, 48), (8, 1, 96, 64)]
)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_attention_equals_the_reference(  # noqa: PLR0917
    ops: CompiledOps,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    rules: dict[str, Any],
) -> None:
    """Decoding rows and chunks, fresh and continued, with contexts on both sides of blocks' and tiles' borders."""
    settings = {"kv_heads": kv_heads, "dim": dim, "block_tokens": block_tokens, "dtype": dtype}
    step = step_of([1, 16, 17, 63, 64, 65, 300, 40, 150, 1], [40, 37, 1], **settings)
    check(ops, step, heads, rules)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_few_long_rows_are_shared_between_threads(ops: CompiledOps, threads: int) -> None:
    """One row of one KV head, its keys split, gives what it gives unsplit; a window and sinks too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = step_of([1500], [], kv_heads=1, dim=64, block_tokens=16, dtype=torch.float32)
        for rules in RULES.values():
            check(ops, step, 4, rules)
    finally:
        torch.set_num_threads(before)


def check(ops: CompiledOps, step: Step, heads: int, rules: dict[str, Any]) -> None:
    """Layer 1, over every row of the step."""
    kernels, reference = CpuKernels(ops), Reference()
    keys = step.pool.keys[1]
    own = AttentionRules(0.2, **{**rules, "sinks": torch.randn(heads)} if "sinks" in rules else rules)
    query = torch.randn(len(step.slots), heads + 2, keys.shape[-1]).to(keys.dtype)[:, :heads]  # rows lie apart
    if step.decode_rows:
        decoding = query[: step.decode_rows]
        equal(kernels.decode(decoding, step, 1, own), reference.decode(decoding, step, 1, own))
    for chunk in step.chunks:
        equal(kernels.prefill(query, step, 1, own, chunk), reference.prefill(query, step, 1, own, chunk))


def test_shapes_it_was_not_written_for_go_to_the_reference(ops: CompiledOps) -> None:
    """Odd head sizes and odd blocks."""
    for dim, block_tokens in ((24, 16), (32, 10)):
        step = step_of([30, 12], [5], kv_heads=2, dim=dim, block_tokens=block_tokens, dtype=torch.float32)
        check(ops, step, 4, {})


def test_without_a_compiler_the_twin_runs_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """No compiler, one that fails, and a home that cannot be written to are each named."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert reason(caplog) == "there is no C++ compiler (g++)"
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    assert reason(caplog).startswith("the compiler failed")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    assert "Not a directory" in reason(caplog)


def reason(caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert cpu.compiled.__wrapped__() is None
    return caplog.messages[-1].partition("because ")[2]


def test_a_build_appears_whole_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler writes elsewhere; a second use finds the library and compiles nothing."""
    commands: list[list[str]] = []

    def compile_(command: list[str], **_: Any) -> None:
        commands.append(command)
        Path(command[-1]).write_text("library")

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: "g++")
    monkeypatch.setattr(subprocess, "run", compile_)
    library = cpu._built()
    assert library == cpu._built()
    assert library.read_text() == "library"
    assert [Path(command[-1]).parent != library.parent for command in commands] == [True]
    assert [path.name for path in library.parent.iterdir()] == [library.name]
