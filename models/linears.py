"""Linear layers on a CPU: their weights laid out once, at load, as products read them; one handler for each scheme.

Our own product (`models/kernels/cpu.cpp`) where it is the faster one, oneDNN's elsewhere.

Projections of one input are one product: `q_proj`, `k_proj`, `v_proj`, and `gate_proj`, `up_proj`. Their modules stay
where they were, each handing out its part, so a model's own code runs unchanged. Weights that are packed are freed.
Everything that is not a plain `nn.Linear` (experts, routers, layers that bitsandbytes holds) is left alone.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from models.huge_pages import Arena
from models.kernels.cpu import PANEL, ZERO_POINT, CompiledOps, Ops, Scaled, packed_weights, quantized_weight

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_INPUTS = 16  # a multiple of this, of our own product: the vectors that quantize its rows
_LEAST_FEATURES = 32  # a router's scores stay as they are
_STEPS = ((8, 1), (64, 8), (256, 16), (1 << 60, 64))  # up to so many rows, multiples of this


class Packed(nn.Module):
    """A linear layer of whole numbers or none: `run` takes what `quantized` says, `forward` takes plain tensors."""

    quantized = False
    bias: Tensor | None
    late_bias: Tensor | None = None  # what `run` leaves to add, once its scales are applied

    def run(self, x: Scaled) -> Scaled:
        """(rows, in) to (rows, out)."""
        raise NotImplementedError


class Plain(Packed):
    """Weights in the type they have, float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._prepacked = _prepackable(weight.dtype)
        # held in a tuple: torch must not take an opaque tensor for state that it can move or save
        self._weight = (torch.ops.mkldnn._reorder_linear_weight(weight) if self._prepacked else weight,)  # noqa: SLF001
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self._prepacked:
            rows = filled_up(x.flatten(0, -2))
            out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, *self._weight, self.bias, "none", [], "")  # noqa: SLF001
            return out[: x.shape[:-1].numel()].view(*x.shape[:-1], out.shape[-1])
        return F.linear(x, *self._weight, self.bias)

    def run(self, x: Scaled) -> Scaled:
        """See `Packed`."""
        return Scaled(self.forward(x.values))


class Int8(Packed):
    """Symmetric 8-bit weights, a scale for each output; activations 8-bit, a scale for each token (W8A8, dynamic)."""

    quantized = True

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._dtype = weight.dtype
        whole, self._scales = quantized_weight(weight)
        self._zeros = torch.zeros(len(whole), dtype=torch.int32)
        self._weight = (torch.ops.onednn.qlinear_prepack(whole, None),)
        self.bias = self.late_bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        values, scales = self.run(self._ops.quantize(x.flatten(0, -2).contiguous()))
        assert scales is not None
        out = values * scales[:, None]
        out = out if self.bias is None else out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def run(self, x: Scaled) -> Scaled:
        """See `Packed`."""
        out = torch.ops.onednn.qlinear_pointwise(
            filled_up(x.values), 1.0, ZERO_POINT, *self._weight, self._scales, self._zeros, None, 1.0, 0, self._dtype,
            "none", [], "",
        )  # fmt: skip
        return Scaled(out[: len(x.values)], x.scales)


class Own(Packed):
    """For our own product: in the type the weights have, or as `Int8`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: CompiledOps, arena: Arena, *, int8: bool) -> None:
        super().__init__()
        self.quantized = int8
        self._ops = ops
        self.weights = packed_weights(weight, bias, arena, int8=int8)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.flatten(0, -2).contiguous()
        out = self.run(self._ops.quantize(rows) if self.quantized else Scaled(rows)).values
        return out.view(*x.shape[:-1], out.shape[-1])

    def run(self, x: Scaled) -> Scaled:
        """See `Packed`."""
        return Scaled(self._ops.product(x, self.weights))


class Together:
    """One product for several layers of the same input."""

    def __init__(self, linear: Packed, sizes: Sequence[int]) -> None:
        self.linear = linear
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, number: int, x: Tensor) -> Tensor:
        """That layer's output. They are asked one after the other, with the very same input."""
        if self._input is not x:
            self._input, self._parts = x, torch.split(self.linear(x), self._sizes, -1)
        out = self._parts[number]
        if number == len(self._sizes) - 1:
            self._input, self._parts = None, ()
        return out


class Part(nn.Module):
    """Stands where one of the layers was."""

    def __init__(self, together: Together, number: int) -> None:
        super().__init__()
        self.together = together
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.together.part(self._number, x)


def filled_up(rows: Tensor) -> Tensor:
    """The same rows, and so many more (of zeros) that only some 50 different numbers of rows occur.

    oneDNN generates code for every number of rows it meets, keeps it for good, and takes 0.5 MB for it: 200 numbers and
    5 layers, all in float32, were 500 MB (measured with oneDNN 3.12).
    """
    count = len(rows)
    step = next(step for most, step in _STEPS if count <= most)
    return F.pad(rows, (0, 0, 0, more)) if (more := -count % step) else rows


def pack_linears(model: nn.Module, ops: Ops, *, int8: bool) -> None:
    """Replace the model's plain linear layers, in place. With `int8`, all but the output head are quantized."""
    arena = Arena()
    heads = {id(model.get_output_embeddings())}  # type: ignore[operator]
    for module in list(model.modules()):
        for names in _TOGETHER:
            _join(module, names, ops, arena, int8=int8)
        for name, child in list(module.named_children()):
            if _is_plain(child):
                setattr(module, name, _packed([child], ops, arena, int8=int8 and id(child) not in heads))


def _join(module: nn.Module, names: Sequence[str], ops: Ops, arena: Arena, *, int8: bool) -> None:
    layers = [child for name in names if _is_plain(child := getattr(module, name, None))]
    if len(layers) < len(names) or len({(layer.in_features, layer.bias is None) for layer in layers}) > 1:
        return
    together = Together(_packed(layers, ops, arena, int8=int8), [layer.out_features for layer in layers])
    for number, name in enumerate(names):
        setattr(module, name, Part(together, number))


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and min(module.in_features, module.out_features) >= _LEAST_FEATURES
    )


def _packed(layers: Sequence[nn.Linear], ops: Ops, arena: Arena, *, int8: bool) -> Packed:
    weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    if isinstance(ops, CompiledOps) and _suits(weight, ops, int8=int8):
        return Own(weight, bias, ops, arena, int8=int8)
    return Int8(weight, bias, ops) if int8 else Plain(weight, bias)


def _suits(weight: Tensor, ops: CompiledOps, *, int8: bool) -> bool:
    outputs, inputs = weight.shape
    return outputs % PANEL == 0 and inputs % _INPUTS == 0 and ops.multiplies(torch.int8 if int8 else weight.dtype)


def _prepackable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
