"""A whole decoder stack in few, fat operations, for the architectures whose blocks are all alike.

Llama, Qwen2, Qwen3 and Mistral: RMS norm, attention with rotary positions, RMS norm, gated MLP. The residual stays in
one tensor; adding to it, the norm after it and the next product's quantization are one pass. Any other architecture
keeps its own code. So do these while no step is running.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from models.attention import AttentionRules, Kernels, Reference, Step, attend, current_step
from models.kernels.cpu import Angles, CompiledOps, CpuKernels, Norm, Ops, Rotary, Scaled, TorchOps, compiled
from models.linears import Packed, Part, pack_linears

_log = logging.getLogger(__name__)

_KNOWN = (LlamaModel, Qwen2Model, Qwen3Model, MistralModel)
_LANES = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parts, as the fused code uses them."""

    number: int
    input_norm: Norm
    qkv: Packed
    rotary: Rotary
    rules: AttentionRules
    out: Packed
    mlp_norm: Norm
    gate_up: Packed
    down: Packed


def prepare_for_cpu(model: PreTrainedModel, quantization: str, *, ops: Ops | None = None) -> Kernels:
    """Make a loaded model fast on this CPU, in place; returns the attention kernels that belong into its steps.

    Weights that bitsandbytes holds stay as they are. `ops` is for tests; without it, what this machine can compile.
    """
    ops = ops or compiled() or TorchOps()
    if quantization in ("none", "int8-onednn"):
        pack_linears(model, ops, int8=quantization == "int8-onednn")
        fused = fuse_layers(model, ops)
        _log.info("%s: linear layers packed%s", type(model).__name__, ", decoder layers fused" if fused else "")
    return CpuKernels(ops) if isinstance(ops, CompiledOps) else Reference()


def fuse_layers(model: PreTrainedModel, ops: Ops) -> bool:
    """Replace the forward of a decoder stack whose linear layers are packed. False if it is of another kind."""
    base: Any = model.base_model
    if type(base) not in _KNOWN or base.config.hidden_act not in ("silu", "swish") or base.config.hidden_size % _LANES:
        return False
    layers = [layer for module in base.layers if (layer := _layer(module))]
    rotated = 2 * len(base.rotary_emb.inv_freq)  # of each head's values: a part only, in some models
    if len(layers) < len(base.layers) or any(layer.rotary.dim != rotated for layer in layers):
        return False
    base.forward = Stack(base, ops, layers)
    return True


def _layer(module: Any) -> Layer | None:
    """None if a part is not as expected: not packed, biased where no bias is looked for, or of an odd width."""
    attn, mlp = module.self_attn, module.mlp
    parts = (attn.q_proj, mlp.gate_proj, attn.o_proj, mlp.down_proj)
    if not (all(isinstance(part, Part) for part in parts[:2]) and all(isinstance(part, Packed) for part in parts[2:])):
        return None
    qkv, gate_up = attn.q_proj.together.linear, mlp.gate_proj.together.linear
    biased = any(linear.bias is not None for linear in (gate_up, *parts[2:]))
    if biased or attn.head_dim % (2 * _LANES) or attn.config.intermediate_size % _LANES:
        return None
    heads, kv_heads = attn.config.num_attention_heads, attn.config.num_key_value_heads
    norms = [_norm(getattr(attn, name)) if hasattr(attn, name) else None for name in ("q_norm", "k_norm")]
    # Mistral's layers read the window from the configuration, Llama's have none, the others decide by layer
    window = attn.config.sliding_window if type(attn).__name__ == "MistralAttention" else None
    return Layer(
        number=attn.layer_idx,
        input_norm=_norm(module.input_layernorm),
        qkv=qkv,
        rotary=Rotary(heads, kv_heads, attn.head_dim, qkv.late_bias, *norms),
        rules=AttentionRules(attn.scaling, getattr(attn, "sliding_window", window)),
        out=attn.o_proj,
        mlp_norm=_norm(module.post_attention_layernorm),
        gate_up=gate_up,
        down=mlp.down_proj,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


class Stack:
    """The decoder stack's forward."""

    def __init__(self, base: Any, ops: Ops, layers: Sequence[Layer]) -> None:
        self._base = base
        self._ops = ops
        self._layers = layers
        self._norm = _norm(base.norm)

    def __call__(self, **given: Any) -> Any:
        """Hidden states after the last norm, as the stack's own forward returns them."""
        step = current_step()
        if step is None:
            return type(self._base).forward(self._base, **given)
        embedded = self._base.embed_tokens(given["input_ids"])  # (1, tokens, hidden)
        cos, sin = (part[0].contiguous() for part in self._base.rotary_emb(embedded, given["position_ids"]))
        residual, added = embedded[0], None
        for layer in self._layers:
            added = self._run(layer, residual, added, (cos, sin), step)
        hidden = self._ops.add_norm(residual, added, self._norm, quantize=False)
        return BaseModelOutputWithPast(last_hidden_state=hidden.values.unsqueeze(0))

    def _run(self, layer: Layer, residual: Tensor, added: Scaled | None, angles: Angles, step: Step) -> Scaled:
        """What this layer's MLP adds to the residual. What the layer before adds is added here."""
        ops = self._ops
        x = ops.add_norm(residual, added, layer.input_norm, quantize=layer.qkv.quantized)
        query = ops.rotary_write(layer.qkv.run(x), layer.rotary, angles, step, layer.number)
        attended = attend(query, step, layer.number, layer.rules).flatten(1)
        x = ops.quantize(attended) if layer.out.quantized else Scaled(attended)
        x = ops.add_norm(residual, layer.out.run(x), layer.mlp_norm, quantize=layer.gate_up.quantized)
        return layer.down.run(ops.silu_multiply(layer.gate_up.run(x), quantize=layer.down.quantized))
