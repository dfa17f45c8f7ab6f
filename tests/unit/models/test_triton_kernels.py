"""Triton's kernels against plain torch. Without a GPU they run in Triton's interpreter, where Triton is installed."""

from __future__ import annotations

import os

import pytest
import torch

from models.attention import AttentionRules, Reference, Step, as_tables
from models.kv_pool import KVPool, LayerShape

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in the interpreter
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
CASES = [  # query heads, key-value heads, head dim, rules
    (2, 2, 64, {}),
    (14, 2, 64, {}),
    (8, 1, 128, {"sliding_window": 50}),
    (4, 2, 80, {"softcap": 5.0}),
    (8, 4, 96, {"sliding_window": 7, "softcap": 30.0}),
    (4, 4, 256, {}),
    (6, 2, 16, {"sinks": True}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rules"), CASES)
def test_decode_equals_the_reference(
    heads: int, kv_heads: int, dim: int, rules: dict[str, object], dtype: torch.dtype
) -> None:
    """Contexts of every length beside one another, blocks in any order, groups, windows, soft caps and sinks."""
    from models.kernels.triton import TritonKernels

    sinks = torch.randn(heads, device=DEVICE) if rules.get("sinks") else None
    own = AttentionRules(dim**-0.5, rules.get("sliding_window"), rules.get("softcap"), sinks)  # type: ignore[arg-type]
    step = random_step([1, 15, 16, 17, 63, 64, 65, 200], kv_heads, dim, dtype)
    query = torch.randn(step.decode_rows, heads, dim, device=DEVICE, dtype=dtype)
    expected = Reference().decode(query.float(), as_float(step), 0, own)
    actual = TritonKernels().decode(query, step, 0, own).float()
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def random_step(contexts: list[int], kv_heads: int, dim: int, dtype: torch.dtype) -> Step:
    """Rows of these contexts in a pool whose unwritten places are NaN: who reads them is found out."""
    tables, blocks = [], 0
    for context in contexts:
        tables.append(list(range(blocks, blocks + -(-context // 16))))
        blocks += len(tables[-1])
    order = torch.randperm(blocks).tolist()
    tables = [[order[block] for block in table] for table in tables]
    pool = KVPool([LayerShape(kv_heads, dim, dim, dtype, DEVICE)], blocks, 16)
    pool.keys[0].fill_(torch.nan)
    pool.values[0].fill_(torch.nan)
    for table, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([table[at // 16] * 16 + at % 16 for at in range(context)], device=DEVICE)
        tokens = torch.randn(2, context, kv_heads, dim, device=DEVICE, dtype=dtype)
        pool.write(0, slots, tokens[0], tokens[1])
    rows = len(contexts)
    return Step(
        pool=pool,
        kernels=Reference(),
        token_ids=torch.zeros(rows, dtype=torch.long, device=DEVICE),
        positions=torch.tensor(contexts, device=DEVICE) - 1,
        slots=torch.zeros(rows, dtype=torch.long, device=DEVICE),
        block_tables=as_tables(tables).to(DEVICE),
        context_tokens=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        decode_rows=rows,
        longest_decode=max(contexts),
        chunks=(),
    )


def as_float(step: Step) -> Step:
    """The same in float32, with zeros where nothing was written: the reference masks, and 0 * NaN is NaN."""
    pool = step.pool
    pool_32 = KVPool([LayerShape(1, 1, 1, torch.float32, DEVICE)], 1, pool.block_tokens)
    pool_32.keys = [keys.float().nan_to_num() for keys in pool.keys]
    pool_32.values = [values.float().nan_to_num() for values in pool.values]
    return Step(pool_32, step.kernels, *(getattr(step, name) for name in Step.__slots__[2:]))
