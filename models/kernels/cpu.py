"""What a step does on a CPU, products and all between them: compiled (`cpu.cpp`), or the same in plain torch.

Linear layers hand on `Scaled` tensors, so that quantized activations never exist in another form: whoever makes a
layer's input quantizes it on the way, and whoever takes its output multiplies it by what the quantization left out.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from models.attention import AttentionRules, Chunk, Reference, Step
from models.huge_pages import Arena

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_BUILD_SECONDS = 300.0
PANEL = 32  # outputs that the compiled product computes at once
_LANES = 16  # floats of the compiled code's vectors
ZERO_POINT = 128  # of quantized activations: unsigned, because oneDNN's signed ones run on a slow path

Angles = tuple[Tensor, Tensor]  # cos and sin of each token's rotation, (tokens, head_dim) each


class Scaled(NamedTuple):
    """`values * scales[:, None]`, (rows, width). Unsigned bytes count from `ZERO_POINT`. No scales: all are 1."""

    values: Tensor
    scales: Tensor | None = None  # (rows,) float32


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm's parameters."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Rotary:
    """How one layer's fused projection becomes queries, keys and values."""

    heads: int
    kv_heads: int
    dim: int
    bias: Tensor | None  # still to be added
    query_norm: Norm | None  # of each head (Qwen3)
    key_norm: Norm | None


class Weights(NamedTuple):
    """A layer's weights as the compiled product reads them, 32 outputs at a time; see `packed_weights`."""

    words: Tensor  # (out / 32, in / values in a word, 32) int32: a float, two bfloat16, or four bytes
    bias: Tensor | None
    dtype: torch.dtype  # of what comes out
    scales: Tensor | None = None  # (out,) float32, for bytes
    shifts: Tensor | None = None  # (out,) int32, what `ZERO_POINT` adds to each sum of bytes

    @property
    def inputs(self) -> int:
        """How wide a row is that it multiplies."""
        value_bytes = self.dtype.itemsize if self.scales is None else 1
        return self.words.shape[1] * self.words.itemsize // value_bytes

    @property
    def outputs(self) -> int:
        """How wide the result is."""
        return PANEL * len(self.words)

    def as_c(self) -> "CLinear":
        """As the compiled code reads it."""
        return CLinear(*map(pointer, (self.words, self.bias, self.scales, self.shifts)), self.inputs, self.outputs)


class CLinear(ctypes.Structure):
    """`Linear` in cpu.cpp. Whoever holds it holds the tensors too."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "bias", "scales", "shifts")),
        *((name, ctypes.c_long) for name in ("inputs", "outputs")),
    )


class Ops(Protocol):
    """One implementation of all of them. Widths are multiples of 16, head_dim of 32."""

    def quantize(self, x: Tensor) -> Scaled:
        """Each row to 8 bits by its own largest value."""

    def add_norm(self, residual: Tensor, added: Scaled | None, norm: Norm, *, quantize: bool) -> Scaled:
        """`residual` += `added`, in place; returns its norm."""

    def silu_multiply(self, gate_up: Scaled, *, quantize: bool) -> Scaled:
        """silu(gate) * up of a fused projection, (rows, 2 * width)."""

    def rotary_write(self, qkv: Scaled, how: Rotary, angles: Angles, step: Step, layer: int) -> Tensor:
        """Put keys and values into the pool and return the queries, (tokens, heads, dim). May overwrite `qkv`."""


class TorchOps:
    """Plain torch: where nothing can be compiled, and what the compiled code is tested against."""

    def quantize(self, x: Tensor) -> Scaled:
        """See `Ops`."""
        scales = (x.float().abs().amax(-1) / 127).clamp_min(1e-12)
        return Scaled((x.float() / scales[:, None]).round().add(ZERO_POINT).to(torch.uint8), scales)

    def add_norm(self, residual: Tensor, added: Scaled | None, norm: Norm, *, quantize: bool) -> Scaled:
        """See `Ops`."""
        if added is not None:
            residual.copy_(residual.float() + _whole(added))
        out = F.rms_norm(residual.float(), norm.weight.shape, norm.weight.float(), norm.epsilon)
        return self.quantize(out) if quantize else Scaled(out.to(residual.dtype))

    def silu_multiply(self, gate_up: Scaled, *, quantize: bool) -> Scaled:
        """See `Ops`."""
        gate, up = _whole(gate_up).chunk(2, -1)
        out = F.silu(gate) * up
        return self.quantize(out) if quantize else Scaled(out.to(gate_up.values.dtype))

    def rotary_write(self, qkv: Scaled, how: Rotary, angles: Angles, step: Step, layer: int) -> Tensor:
        """See `Ops`."""
        whole = _whole(qkv) + (0 if how.bias is None else how.bias)
        heads = whole.view(len(whole), -1, how.dim)
        query, key, value = torch.split(heads, [how.heads, how.kv_heads, how.kv_heads], 1)
        query, key = (_rotated(x, norm, angles) for x, norm in ((query, how.query_norm), (key, how.key_norm)))
        dtype = qkv.values.dtype
        step.pool.write(layer, step.slots, key.to(dtype), value.to(dtype))
        return query.to(dtype)


def _whole(x: Scaled) -> Tensor:
    return x.values.float() if x.scales is None else x.values.float() * x.scales[:, None]


def _rotated(x: Tensor, norm: Norm | None, angles: Angles) -> Tensor:
    """(tokens, heads, dim)."""
    cos, sin = (part.float().unsqueeze(1) for part in angles)
    if norm:
        x = F.rms_norm(x, norm.weight.shape, norm.weight.float(), norm.epsilon)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class CompiledOps:
    """See `Ops`. Tensors are contiguous and of one type, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def quantize(self, x: Tensor) -> Scaled:
        """See `Ops`."""
        out = _sink(x, x.shape[1], quantize=True)
        self.call("quantize", x.dtype, x, out.values, out.scales, *x.shape)
        return out

    def add_norm(self, residual: Tensor, added: Scaled | None, norm: Norm, *, quantize: bool) -> Scaled:
        """See `Ops`."""
        out = _sink(residual, residual.shape[1], quantize=quantize)
        values, scales = added or (None, None)
        self.call(
            "add_norm",
            residual.dtype,
            residual,
            values,
            scales,
            norm.weight,
            norm.epsilon,
            *_targets(out),
            *residual.shape,
        )
        return out

    def silu_multiply(self, gate_up: Scaled, *, quantize: bool) -> Scaled:
        """See `Ops`."""
        rows, width = gate_up.values.shape
        out = _sink(gate_up.values, width // 2, quantize=quantize)
        self.call("silu_multiply", gate_up.values.dtype, *gate_up, *_targets(out), rows, width // 2)
        return out

    def rotary_write(self, qkv: Scaled, how: Rotary, angles: Angles, step: Step, layer: int) -> Tensor:
        """See `Ops`."""
        norms = [norm.weight if norm else None for norm in (how.query_norm, how.key_norm)]
        epsilon = how.query_norm.epsilon if how.query_norm else 0.0
        pool, tokens = step.pool, len(qkv.values)
        self.call(
            "rotary_write", qkv.values.dtype, *qkv, how.bias, *angles, *norms, epsilon, step.slots, pool.keys[layer],
            pool.values[layer], tokens, how.heads, how.kv_heads, how.dim, pool.block_tokens,
        )  # fmt: skip
        return qkv.values.view(tokens, -1, how.dim)[:, : how.heads]

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether products of this type (int8: of bytes) are faster on this CPU than oneDNN's."""
        if dtype == torch.int8:
            return bool(self._library.multiplies_bytes())
        return dtype in _NAMES and bool(self._library.multiplies_floats())

    def product(self, x: Scaled, weights: Weights) -> Tensor:
        """Rows (rows, in) times the weights, plus the bias: (rows, out)."""
        out = torch.empty(len(x.values), weights.outputs, dtype=weights.dtype)
        plain, scaled = ((None, *x) if weights.scales is not None else (x.values, None, None)), weights.as_c()
        self.call("product", out.dtype, out, *plain, scaled, len(out))
        return out

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | ctypes.Structure | float | None) -> None:
        """The function of that name for values of that type."""
        torch.get_num_threads()  # has torch set the thread count of this thread, which the compiled code shares
        getattr(self._library, f"{name}_{_NAMES[dtype]}")(*map(_as_c, arguments))


def packed_weights(weight: Tensor, bias: Tensor | None, arena: Arena, *, int8: bool) -> Weights:
    """A weight (out, in), out a multiple of 32 and in of 4. `int8`: symmetric, a scale for each output."""
    if not int8:
        return Weights(_words(weight, arena), bias, weight.dtype)
    whole, scales = quantized_weight(weight)
    return Weights(_words(whole, arena), bias, weight.dtype, scales, ZERO_POINT * whole.sum(1, dtype=torch.int32))


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8, symmetric, and the scale of each output, (out,) float32."""
    scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12)
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def _words(weight: Tensor, arena: Arena) -> Tensor:
    words = weight.contiguous().view(torch.int32)  # (out, in / values in a word)
    panels = words.view(-1, PANEL, words.shape[1]).transpose(1, 2)
    return arena.zeros(panels.shape, torch.int32).copy_(panels)


_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def pointer(tensor: Tensor | None) -> int | None:
    """Where its values lie."""
    return None if tensor is None else tensor.data_ptr()


def _as_c(value: Tensor | ctypes.Structure | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return None if value is None else ctypes.c_long(value)


def _sink(like: Tensor, width: int, *, quantize: bool) -> Scaled:
    if not quantize:
        return Scaled(like.new_empty(len(like), width))
    return Scaled(like.new_empty(len(like), width, dtype=torch.uint8), like.new_empty(len(like), dtype=torch.float32))


def _targets(out: Scaled) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (out.values, None, None) if out.scales is None else (None, out.values, out.scales)


class CpuKernels:
    """Attention that reads each key and value once for all heads that share it, where it lies. See `Kernels`."""

    def __init__(self, ops: CompiledOps) -> None:
        self._ops = ops
        self._reference = Reference()

    def decode(self, query: Tensor, step: Step, layer: int, rules: AttentionRules) -> Tensor:
        """See `Kernels`."""
        if not _takes(query, step, layer):
            return self._reference.decode(query, step, layer, rules)
        return self._attend(query, step, layer, rules, range(step.decode_rows))

    def prefill(self, query: Tensor, step: Step, layer: int, rules: AttentionRules, chunk: Chunk) -> Tensor:
        """See `Kernels`."""
        if not _takes(query, step, layer):
            return self._reference.prefill(query, step, layer, rules, chunk)
        own = query[chunk.first : chunk.first + chunk.tokens]
        return self._attend(own, step, layer, rules, range(chunk.row, chunk.row + 1))

    def _attend(self, query: Tensor, step: Step, layer: int, rules: AttentionRules, rows: range) -> Tensor:
        """All tokens of `query`, (tokens, heads, dim), equally many of each of these rows."""
        if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
            query = query.contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        keys, tables = step.pool.keys[layer], step.block_tables[rows.start :]
        sinks = None if rules.sinks is None else rules.sinks.float()
        self._ops.call(
            "attention", query.dtype, query, query.stride(0), out, keys, step.pool.values[layer], tables,
            step.context_tokens[rows.start :], tables.stride(0), len(rows), len(query) // len(rows),
            step.pool.block_tokens, rules.sliding_window or 0, query.shape[1], keys.shape[1], query.shape[2],
            float(rules.scaling), float(rules.softcap or 0), sinks,
        )  # fmt: skip
        return out


def _takes(query: Tensor, step: Step, layer: int) -> bool:
    keys, values = step.pool.keys[layer], step.pool.values[layer]
    fits = keys.shape == values.shape and keys.shape[-1] % (2 * _LANES) == 0 and step.pool.block_tokens % _LANES == 0
    return fits and query.dtype == keys.dtype and query.dtype in _NAMES


@cache
def compiled() -> CompiledOps | None:
    """The compiled operations, built if this is the first use on this machine; None, and why in the log, if not."""
    try:
        return CompiledOps(ctypes.CDLL(str(_built())))
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    _log.warning("CPU kernels: plain torch, which is slower, because %s", reason)
    return None


def _built() -> Path:
    """The library for this source and this CPU. Raises `OSError`, `CalledProcessError` or `TimeoutExpired`."""
    folder = Path.home() / ".cache" / "headrace"
    key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), *map(str.encode, _FLAGS), _cpu().encode()])).hexdigest()
    library = folder / f"cpu-{key[:20]}.so"
    if not library.exists():
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise FileNotFoundError("there is no C++ compiler (g++)")
        folder.mkdir(parents=True, exist_ok=True)
        # renamed when whole: builds side by side, or one that is killed, leave no half of a library behind
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / library.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            os.replace(made, library)  # noqa: PTH105  replaces, where Path.rename may refuse
    _log.info("CPU kernels: compiled, %s", library)
    return library


def _cpu() -> str:
    """What the code is compiled for: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
