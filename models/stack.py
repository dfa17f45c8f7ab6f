"""A decoder stack's forward over a step: all its layers in one compiled call, or operation by operation.

The residual stays in one tensor; adding to it, the norm after it and the next product's quantization are one pass. The
compiled call is made of the very operations that `Ops` names, between barriers of one team of threads.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from models.attention import AttentionRules, Step, attend, current_step
from models.kernels.cpu import Angles, CLinear, CompiledOps, CpuKernels, Norm, Ops, Rotary, Scaled, pointer
from models.kv_pool import KVPool
from models.linears import Own, Packed


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parts."""

    number: int
    input_norm: Norm
    qkv: Packed
    rotary: Rotary
    rules: AttentionRules
    out: Packed
    mlp_norm: Norm
    gate_up: Packed
    down: Packed


class Stack:
    """Stands for the forward of `base`, whose blocks these layers are."""

    def __init__(self, base: Any, ops: Ops, layers: Sequence[Layer], norm: Norm) -> None:
        self._base = base
        self._ops = ops
        self._layers = layers
        self._norm = norm
        ours = all(isinstance(linear, Own) for layer in layers for linear in _linears(layer))
        self._compiled = CompiledStack(ops, layers, norm) if ours and isinstance(ops, CompiledOps) else None

    def __call__(self, **given: Any) -> Any:
        """Hidden states after the last norm, as the stack's own forward returns them."""
        step = current_step()
        if step is None:
            return type(self._base).forward(self._base, **given)
        embedded = self._base.embed_tokens(given["input_ids"])  # (1, tokens, hidden)
        cos, sin = (part[0].contiguous() for part in self._base.rotary_emb(embedded, given["position_ids"]))
        compiled = self._compiled if isinstance(step.kernels, CpuKernels) else None
        hidden = (compiled or self._by_operation)(embedded[0], (cos, sin), step)
        return BaseModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))

    def _by_operation(self, residual: Tensor, angles: Angles, step: Step) -> Tensor:
        """(tokens, hidden). Overwrites `residual`."""
        added = None
        for layer in self._layers:
            added = self._run(layer, residual, added, angles, step)
        return self._ops.add_norm(residual, added, self._norm, quantize=False).values

    def _run(self, layer: Layer, residual: Tensor, added: Scaled | None, angles: Angles, step: Step) -> Scaled:
        """What this layer's MLP adds to the residual. What the layer before adds is added here."""
        ops = self._ops
        x = ops.add_norm(residual, added, layer.input_norm, quantize=layer.qkv.quantized)
        query = ops.rotary_write(layer.qkv.run(x), layer.rotary, angles, step, layer.number)
        attended = attend(query, step, layer.number, layer.rules).flatten(1)
        x = ops.quantize(attended) if layer.out.quantized else Scaled(attended)
        x = ops.add_norm(residual, layer.out.run(x), layer.mlp_norm, quantize=layer.gate_up.quantized)
        return layer.down.run(ops.silu_multiply(layer.gate_up.run(x), quantize=layer.down.quantized))


def _linears(layer: Layer) -> tuple[Packed, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


class _CNorm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _CLayer(ctypes.Structure):
    _fields_ = (
        *((name, _CNorm) for name in ("input_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, CLinear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        ("window", ctypes.c_long),
    )


class _CStack(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_CLayer)),
        ("count", ctypes.c_long),
        ("norm", _CNorm),
        *((name, ctypes.c_long) for name in ("hidden", "intermediate", "heads", "kv_heads", "dim")),
        ("scaling", ctypes.c_float),
        ("block_tokens", ctypes.c_long),
    )


class _CStep(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("tokens", "rows")),
        *((name, ctypes.c_void_p) for name in ("residual", "cos", "sin", "slots", "firsts", "tables", "contexts")),
        ("table_stride", ctypes.c_long),
        ("wanted", ctypes.c_void_p),
        ("outputs", ctypes.c_long),
        ("out", ctypes.c_void_p),
    )


class CompiledStack:
    """All layers in one call. Their products are our own. The last one ends early for what is not wanted."""

    def __init__(self, ops: CompiledOps, layers: Sequence[Layer], norm: Norm) -> None:
        self._ops = ops
        self._layers = layers
        self._norm = norm
        self._pool: KVPool | None = None
        self._stack = _CStack()

    def __call__(self, residual: Tensor, angles: Angles, step: Step) -> Tensor:
        """(tokens, hidden), right where it is wanted. Overwrites `residual`."""
        if step.pool is not self._pool:
            self._pool, self._stack = step.pool, self._over(step.pool)
        wanted = step.wanted if step.wanted is not None and len(step.wanted) < len(residual) else None
        out = residual.new_empty(len(residual) if wanted is None else len(wanted), residual.shape[1])
        firsts = torch.tensor([*range(step.decode_rows), *(chunk.first for chunk in step.chunks), len(residual)])
        tensors = (residual, *angles, step.slots, firsts, step.block_tables, step.context_tokens)
        assert all(tensor.is_contiguous() for tensor in tensors)
        described = _CStep(
            len(residual), len(step.context_tokens), *map(pointer, tensors), step.block_tables.stride(0),
            pointer(wanted), len(out), pointer(out),
        )  # fmt: skip
        self._ops.call("run_stack", residual.dtype, self._stack, described)
        if wanted is not None:
            residual[wanted] = out
        return out if wanted is None else residual

    def _over(self, pool: KVPool) -> _CStack:
        layers = (_CLayer * len(self._layers))(*(_as_c(layer, pool) for layer in self._layers))
        first = self._layers[0]
        sizes = first.rotary.heads, first.rotary.kv_heads, first.rotary.dim
        widths = len(self._norm.weight), layers[0].down.inputs
        return _CStack(layers, len(layers), _norm(self._norm), *widths, *sizes, first.rules.scaling, pool.block_tokens)


def _as_c(layer: Layer, pool: KVPool) -> _CLayer:
    norms = layer.input_norm, layer.rotary.query_norm, layer.rotary.key_norm, layer.mlp_norm
    linears = [linear.weights.as_c() for linear in _linears(layer) if isinstance(linear, Own)]
    memory = pool.keys[layer.number], pool.values[layer.number]
    return _CLayer(*map(_norm, norms), *linears, *map(pointer, memory), layer.rules.sliding_window or 0)


def _norm(norm: Norm | None) -> _CNorm:
    return _CNorm(pointer(norm.weight), norm.epsilon) if norm else _CNorm()
