"""A whole decoder stack in few, fat operations, for the architectures whose blocks are all alike.

Llama, Qwen2, Qwen3 and Mistral: RMS norm, attention with rotary positions, RMS norm, gated MLP (`models.stack` runs
them). Any other architecture keeps its own code. So do these while no step is running.
"""

import logging
from typing import Any

from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model

from models.attention import AttentionRules, Kernels, Reference
from models.kernels.cpu import CompiledOps, CpuKernels, Norm, Ops, Rotary, TorchOps, compiled
from models.linears import Packed, Part, pack_linears
from models.stack import Layer, Stack

_log = logging.getLogger(__name__)

_KNOWN = (LlamaModel, Qwen2Model, Qwen3Model, MistralModel)
_LANES = 16


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
    base.forward = Stack(base, ops, layers, _norm(base.norm))
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
