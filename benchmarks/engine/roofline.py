"""What the processor can do at best: `python -m benchmarks.engine.roofline` prints it as JSON.

A token costs two operations for each weight it is multiplied with. The ideal time of a workload is all its tokens at
the best rate that a matrix product reaches here, with nothing spent on attention, norms, sampling or Python.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.engine.mixed import mixed_loads
from benchmarks.engine.model import FULL, ModelShape
from benchmarks.engine.run_one import THREADS

ROWS = (16, 32, 64, 256)
_MATRICES = 24  # as many as layers, so that no cache holds them all
_SECONDS = 0.6  # for each rate
_STREAM_BYTES = 2**29


def measure() -> dict[str, Any]:
    """Rates of this machine: GB/s, and GFLOP/s by precision and rows."""
    import torch

    torch.set_num_threads(THREADS)
    return {
        "read_gb_per_second": round(_read_rate() / 1e9, 1),
        "gemm_gflops": {
            name: {str(rows): round(_gemm_rate(make, rows) / 1e9) for rows in ROWS} for name, make in _PRODUCTS.items()
        },
    }


def ideal_seconds(gemm_gflops: Mapping[str, float], *, quick: bool = False, shape: ModelShape = FULL) -> float:
    """Of `mixed`, at the best of these rates."""
    loads = mixed_loads(quick=quick)
    output_tokens = sum(one.max_tokens for one in loads)
    tokens = output_tokens + sum(len(one.prompt_token_ids) for one in loads)
    products = shape.layers * shape.layer_parameters * tokens + shape.head_parameters * output_tokens
    return 2 * products / (max(gemm_gflops.values()) * 1e9)


def _read_rate() -> float:
    """Bytes per second, all threads reading."""
    import torch

    data = torch.ones(_STREAM_BYTES // 4)
    return _STREAM_BYTES * _calls_per_second(data.sum)


def _gemm_rate(make: Callable[[Any, Any], Callable[[], Any]], rows: int) -> float:
    """Operations per second of the gate's and up's product, the model's largest."""
    import torch

    inputs = torch.randn(rows, FULL.hidden)
    products = [make(inputs, torch.randn(FULL.intermediate, FULL.hidden)) for _ in range(_MATRICES)]

    def all_of_them() -> None:
        for product in products:
            product()

    return 2 * rows * FULL.hidden * FULL.intermediate * _MATRICES * _calls_per_second(all_of_them)


def _bf16(inputs: Any, weight: Any) -> Callable[[], Any]:
    """OneDNN's, over prepacked weights."""
    import torch

    inputs = inputs.bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), len(inputs))
    return lambda: torch.ops.mkldnn._linear_pointwise(inputs, packed, None, "none", [], "")


def _int8(inputs: Any, weight: Any) -> Callable[[], Any]:
    """OneDNN's: 8-bit activations and weights, a scale for each output."""
    import torch

    activations = inputs.mul(40).add(128).round().clamp(0, 255).to(torch.uint8)  # signed ones have no fast kernel
    packed = torch.ops.onednn.qlinear_prepack(weight.mul(40).round().clamp(-128, 127).to(torch.int8), None)
    scales, zeros = torch.full((len(weight),), 0.025), torch.zeros(len(weight), dtype=torch.int32)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        activations, 0.025, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )


_PRODUCTS = {"bf16": _bf16, "int8": _int8}


def _calls_per_second(call: Callable[[], Any]) -> float:
    call()
    calls, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _SECONDS:
        call()
        calls += 1
    return calls / elapsed


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()) + "\n")
