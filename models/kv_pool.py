"""Where keys and values lie: blocks of tokens, one pair of tensors for each layer, on that layer's device.

The accounting (who holds which block) is `models.blocks`; this is only memory. Attention finds a token of a row by its
slot, `block * block_tokens + offset`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of a token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class KVPool:
    """Keys and values of every layer, (blocks, kv_heads, block_tokens, head_dim) each: a head's tokens lie together."""

    def __init__(self, layers: Sequence[LayerShape], blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.keys = [_empty(layer, blocks, block_tokens, layer.key_dim) for layer in layers]
        self.values = [_empty(layer, blocks, block_tokens, layer.value_dim) for layer in layers]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put new tokens' keys and values, (tokens, kv_heads, head_dim), at `slots`, (tokens,)."""
        block, offset = slots // self.block_tokens, slots % self.block_tokens
        self.keys[layer][block, :, offset] = keys
        self.values[layer][block, :, offset] = values

    def read(self, layer: int, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """A copy of the first `tokens` of a row whose blocks these are: two of (kv_heads, tokens, head_dim)."""
        return _gather(self.keys[layer], blocks, tokens), _gather(self.values[layer], blocks, tokens)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each. All are read before any is written."""
        if not copies:
            return
        for tensor in (*self.keys, *self.values):
            source, target = torch.tensor(copies, device=tensor.device).T
            tensor[target] = tensor[source]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks: a NaN that stays behind would spread, masked or not."""
        for tensor in (*self.keys, *self.values):
            tensor[torch.tensor(blocks, device=tensor.device, dtype=torch.long)] = 0


def blocks_in(budget_bytes: int, layers: Sequence[LayerShape], block_tokens: int) -> int:
    """How many blocks fit into this memory."""
    return budget_bytes // (block_tokens * sum(layer.token_bytes for layer in layers))


def _empty(layer: LayerShape, blocks: int, block_tokens: int, head_dim: int) -> Tensor:
    # zeros: what was never written is masked, but a NaN there would still spread through 0 * NaN
    return torch.zeros(blocks, layer.kv_heads, block_tokens, head_dim, dtype=layer.dtype, device=layer.device)


def _gather(tensor: Tensor, blocks: Tensor, tokens: int) -> Tensor:
    gathered = tensor[blocks].transpose(0, 1)  # (kv_heads, blocks, block_tokens, head_dim)
    return gathered.reshape(gathered.shape[0], -1, gathered.shape[-1])[:, :tokens]
