# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Attention of decoding rows on a GPU, in Triton: each row's keys and values are read once, where they lie in the pool.

One program computes one row's group of query heads that share a key-value head, over one part of the row's context
(flash-decoding, Dao et al. 2023); a second kernel joins the parts. Lengths are read from the device, so a CUDA graph of
it stays right as rows grow.
"""

import torch
import triton  # comes with torch for CUDA
import triton.language as tl
from torch import Tensor

from models.attention import AttentionRules, Reference, Step

_TOKENS = 64  # of keys and values that a program holds at once
_LEAST_GROUP = 16  # rows that `tl.dot` takes at least
_MOST_PARTS = 16


@triton.jit
def _decode_part(
    query, keys, values, tables, contexts, part_out, part_max, part_sum,
    scaling, softcap, window,
    query_row, query_head, table_row,
    key_block, key_head, key_token, value_block, value_head, value_token,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, KEY: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    context = tl.load(contexts + row)
    begin = tl.maximum(context - window, 0) // TOKENS if WINDOW else 0
    steps = tl.cdiv(context, TOKENS) - begin
    per_part = tl.cdiv(steps, PARTS)
    first = (begin + part * per_part) * TOKENS
    end = tl.minimum(first + per_part * TOKENS, context)

    group = tl.arange(0, GROUP_PADDED)
    key_at, value_at = tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
    own = group < GROUP
    head = kv_head * GROUP + group
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + key_at[None, :],
        mask=own[:, None] & (key_at < KEY)[None, :],
        other=0.0,
    )
    best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for at in range(first, end, TOKENS):
        token = at + tl.arange(0, TOKENS)
        there = token < end
        block = tl.load(tables + row * table_row + token // BLOCK, mask=there, other=0).to(tl.int64)
        k = tl.load(
            keys
            + block[:, None] * key_block
            + kv_head * key_head
            + (token % BLOCK)[:, None] * key_token
            + key_at[None, :],
            mask=there[:, None] & (key_at < KEY)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if SOFTCAP:
            scores = softcap * (2 / (1 + tl.exp(-2 * scores / softcap)) - 1)  # tanh
        seen = there & (token >= context - window) if WINDOW else there
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing seen yet: no infinity minus infinity
        weights = tl.exp(scores - base[:, None])
        scale = tl.exp(best - base)
        v = tl.load(
            values + block[:, None] * value_block + kv_head * value_head
            + (token % BLOCK)[:, None] * value_token + value_at[None, :],
            mask=there[:, None] & (value_at < VALUE)[None, :],
            other=0.0,
        )  # fmt: skip
        out = out * scale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * scale + tl.sum(weights, 1)
        best = new_best
    place = (row * heads + head) * PARTS + part
    tl.store(part_max + place, best, mask=own)
    tl.store(part_sum + place, total, mask=own)
    tl.store(
        part_out + place[:, None] * VALUE + value_at[None, :], out, mask=own[:, None] & (value_at < VALUE)[None, :]
    )


@triton.jit
def _join_parts(
    part_out, part_max, part_sum, sinks, result,
    VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(1) + head
    part, value_at = tl.arange(0, PARTS), tl.arange(0, VALUE_PADDED)
    best = tl.load(part_max + place * PARTS + part)
    highest = tl.max(best, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    scale = tl.exp(best - highest)
    total = tl.sum(tl.load(part_sum + place * PARTS + part) * scale, 0)
    if SINKS:
        total += tl.exp(sink - highest)
    out = tl.load(
        part_out + (place * PARTS + part)[:, None] * VALUE + value_at[None, :],
        mask=(value_at < VALUE)[None, :],
        other=0.0,
    )
    joined = tl.sum(out * scale[:, None], 0) / total
    tl.store(result + place * VALUE + value_at, joined.to(result.dtype.element_ty), mask=value_at < VALUE)


class TritonKernels(Reference):
    """`Kernels` on a GPU. Prompts go through torch's own attention, as in the reference."""

    def decode(self, query: Tensor, step: Step, layer: int, rules: AttentionRules) -> Tensor:
        """See `Kernels`. Launches two kernels, whatever the lengths."""
        rows, heads, key_dim = query.shape
        keys, values = step.pool.keys[layer], step.pool.values[layer]
        kv_heads, value_dim = keys.shape[1], values.shape[-1]
        parts = _parts(rows * kv_heads, query.device)
        part_out = query.new_empty(rows, heads, parts, value_dim, dtype=torch.float32)
        part_max, part_sum = query.new_empty(2, rows, heads, parts, dtype=torch.float32)
        query = query.contiguous()
        _decode_part[rows, kv_heads, parts](
            query, keys, values, step.block_tables, step.context_tokens, part_out, part_max, part_sum,
            rules.scaling, rules.softcap or 0.0, rules.sliding_window or 0,
            query.stride(0), query.stride(1), step.block_tables.stride(0),
            keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
            GROUP=heads // kv_heads, GROUP_PADDED=max(_LEAST_GROUP, triton.next_power_of_2(heads // kv_heads)),
            KEY=key_dim, KEY_PADDED=_padded(key_dim), VALUE=value_dim, VALUE_PADDED=_padded(value_dim),
            BLOCK=step.pool.block_tokens, TOKENS=_TOKENS, PARTS=parts,
            SOFTCAP=rules.softcap is not None, WINDOW=rules.sliding_window is not None,
        )  # fmt: skip
        result = query.new_empty(rows, heads, value_dim)
        sinks = rules.sinks
        _join_parts[rows, heads](
            part_out, part_max, part_sum, part_out if sinks is None else sinks, result,
            VALUE=value_dim, VALUE_PADDED=_padded(value_dim), PARTS=parts, SINKS=sinks is not None,
        )  # fmt: skip
        return result


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _parts(programs: int, device: torch.device) -> int:
    """A power of two that gives each of the GPU's multiprocessors about two programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return min(_MOST_PARTS, triton.next_power_of_2(max(1, 2 * processors // programs)))
