"""Attention over the paged pool, plugged into transformers' models through its `AttentionInterface`.

A step's tokens go through a model as one packed sequence, (1, tokens): first one token of each row that decodes, then
the prefill chunks. The model's own layers never mix tokens but here, and here each token attends to the tokens of its
own row alone. `running` says which step is under way; `paged_attention` is what the model's layers call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn
from transformers import AttentionInterface

from models.kv_pool import KVPool

NAME = "headrace"  # of our attention among transformers'; it has no mask function, so no mask is made


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one row's prompt: tokens [first, first + tokens) of the packed step."""

    row: int  # into the step's block tables
    first: int
    tokens: int
    context_tokens: int  # of the row once the chunk is done: the chunk's own are the last of these


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of one forward pass and where their keys and values lie. All tensors are on the pool's device."""

    pool: KVPool
    kernels: "Kernels"
    token_ids: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64
    slots: Tensor  # (tokens,) int64: where each token's keys and values go
    block_tables: Tensor  # (rows, blocks of the longest row) int32, filled up with 0
    context_tokens: Tensor  # (rows,) int32: tokens of each row, this step's included
    decode_rows: int  # rows and tokens [0, decode_rows) are decoding, one token each
    longest_decode: int  # the largest context of those, 0 if none decodes
    chunks: tuple[Chunk, ...]  # rows [decode_rows, rows)
    wanted: Tensor | None = None  # (outputs,) int64, ascending: the tokens whose hidden states are read at the end

    def __post_init__(self) -> None:
        """The packing's invariants."""
        assert len(self.token_ids) == self.decode_rows + sum(chunk.tokens for chunk in self.chunks)
        assert len(self.block_tables) == self.decode_rows + len(self.chunks)


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """What differs between layers."""

    scaling: float
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap) (Gemma 2)
    sinks: Tensor | None = None  # (heads,): one more score in each head's softmax, of no value (gpt-oss)


class Kernels(Protocol):
    """How attention is computed on a device. Layers are indices into the pool."""

    def decode(self, query: Tensor, step: Step, layer: int, rules: AttentionRules) -> Tensor:
        """One token of each decoding row over its keys and values in the pool. (decode_rows, heads, dim) both."""

    def prefill(self, query: Tensor, step: Step, layer: int, rules: AttentionRules, chunk: Chunk) -> Tensor:
        """One chunk, causally, over what its row had before and itself. `query` is the whole step's."""


_step: ContextVar[Step] = ContextVar("step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """While a model runs this step, its attention layers work on it."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> Step | None:
    """The step that is running, if one is."""
    return _step.get(None)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a model's attention layer calls. `query` is (1, heads, tokens, head_dim), the others with kv_heads.

    Returns (1, tokens, heads, head_dim), and no weights.
    """
    assert attention_mask is None
    step, layer = _step.get(), int(module.layer_idx)  # type: ignore[arg-type]
    rules = AttentionRules(scaling, sliding_window, softcap, s_aux)
    step.pool.write(layer, step.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attend(query[0].transpose(0, 1), step, layer, rules).unsqueeze(0), None


def attend(query: Tensor, step: Step, layer: int, rules: AttentionRules) -> Tensor:
    """Every token over its row's keys and values, which are in the pool. `query` and result: (tokens, heads, dim)."""
    parts = [step.kernels.prefill(query, step, layer, rules, chunk) for chunk in step.chunks]
    if step.decode_rows:
        parts.insert(0, step.kernels.decode(query[: step.decode_rows], step, layer, rules))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Reference:
    """Plain torch, on any device: what every faster path is tested against."""

    def decode(self, query: Tensor, step: Step, layer: int, rules: AttentionRules) -> Tensor:
        """See `Kernels`. Gathers every row's keys and values, filled up to the longest."""
        rows, blocks = step.decode_rows, -(-step.longest_decode // step.pool.block_tokens)
        tables = step.block_tables[:rows, :blocks].long()
        keys, values = (_padded(tensor[layer], tables) for tensor in (step.pool.keys, step.pool.values))
        at = torch.arange(keys.shape[2], device=query.device)
        lengths = step.context_tokens[:rows, None]
        visible = at < lengths  # (rows, tokens)
        if rules.sliding_window:
            visible &= at >= lengths - rules.sliding_window
        return _attention(query.unsqueeze(2), keys, values, visible[:, None, None], rules).squeeze(2)

    def prefill(self, query: Tensor, step: Step, layer: int, rules: AttentionRules, chunk: Chunk) -> Tensor:
        """See `Kernels`."""
        table = step.block_tables[chunk.row].long()
        blocks = -(-chunk.context_tokens // step.pool.block_tokens)
        keys, values = step.pool.read(layer, table[:blocks], chunk.context_tokens)
        own = query[chunk.first : chunk.first + chunk.tokens].transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, dim)
        if chunk.tokens == chunk.context_tokens and _is_plain(rules, chunk.context_tokens):
            out = F.scaled_dot_product_attention(
                own, keys.unsqueeze(0), values.unsqueeze(0), is_causal=True, scale=rules.scaling, enable_gqa=True
            )
            return out[0].transpose(0, 1)
        visible = _causal(chunk, rules, query.device)
        return _attention(own, keys.unsqueeze(0), values.unsqueeze(0), visible, rules)[0].transpose(0, 1)


def _is_plain(rules: AttentionRules, tokens: int) -> bool:
    unlimited = rules.sliding_window is None or rules.sliding_window >= tokens
    return unlimited and rules.softcap is None and rules.sinks is None


def _causal(chunk: Chunk, rules: AttentionRules, device: torch.device) -> Tensor:
    """(tokens, context_tokens): whom each of the chunk's tokens sees."""
    before = chunk.context_tokens - chunk.tokens
    own = torch.arange(before, chunk.context_tokens, device=device).unsqueeze(-1)
    at = torch.arange(chunk.context_tokens, device=device)
    visible = at <= own
    if rules.sliding_window:
        visible &= at > own - rules.sliding_window
    return visible


def _attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, rules: AttentionRules) -> Tensor:
    """(rows, heads, tokens, dim) over (rows, kv_heads, context, dim) where `visible` (broadcastable) is true."""
    if rules.softcap is None and rules.sinks is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=rules.scaling, enable_gqa=True
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = (query @ keys.transpose(-1, -2)).float() * rules.scaling
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if rules.sinks is not None:
        sinks = rules.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(values.dtype) @ values


def _padded(tensor: Tensor, tables: Tensor) -> Tensor:
    """Gather (rows, kv_heads, blocks * block_tokens, dim) from the pool."""
    gathered = tensor[tables]  # (rows, blocks, kv_heads, block_tokens, dim)
    return gathered.transpose(1, 2).flatten(2, 3)


AttentionInterface.register(NAME, paged_attention)


def as_tables(tables: Sequence[Sequence[int]]) -> Tensor:
    """Block tables of unequal length as one (rows, longest) int32, filled up with 0."""
    longest = max(map(len, tables))
    return torch.tensor([[*table, *[0] * (longest - len(table))] for table in tables], dtype=torch.int32)
