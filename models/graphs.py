"""CUDA graphs of steps in which every row decodes: one launch instead of a thousand.

A graph is captured for each number of rows in a list of sizes; a step takes the next larger one, filled up with rows
that attend to one token of the pool's last block, which no row is ever given. What a graph reads lies in buffers that
are written before each replay.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.attention import Step

log = logging.getLogger(__name__)

_WARM_UPS = 2  # kernels compile and libraries choose their algorithms in the first passes


class DecodeGraphs:
    """Graphs of one model's forward pass over one pool."""

    def __init__(self, forward: Callable[[Step, Tensor], Tensor], slots: int, blocks: int) -> None:
        self._forward = forward
        self._table_blocks = blocks  # of the longest row there can be
        self._sizes = [size for size in _sizes() if size < slots] + [slots]
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Step, Tensor]] = {}
        self._wanted: dict[int, Tensor] = {}  # kept: a graph reads its inputs where they were
        self._memory: Any = None  # shared by all graphs
        self._works = True

    def run(self, step: Step) -> Tensor | None:
        """Logits, (rows, vocab), valid until the next call; None if this step needs the eager way."""
        if step.chunks or not self._works or step.decode_rows > self._sizes[-1]:
            return None
        size = next(size for size in self._sizes if size >= step.decode_rows)
        if size not in self._captured and not self._capture(size, step):
            return None
        graph, static, logits = self._captured[size]
        _fill(static, step)
        graph.replay()
        return logits[: step.decode_rows]

    def _capture(self, size: int, step: Step) -> bool:
        static = self._static(size, step)
        _fill(static, step)
        wanted = self._wanted[size] = torch.arange(size, device=step.token_ids.device)
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._forward(static, wanted)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                logits = self._forward(static, wanted)
        except Exception as error:  # noqa: BLE001  whatever it is, the eager way is still there
            log.warning("no CUDA graphs for this model: %s", error)
            self._works = False
            torch.cuda.synchronize()
            return False
        self._memory = graph.pool()
        self._captured[size] = (graph, static, logits)
        return True

    def _static(self, size: int, step: Step) -> Step:
        """Buffers for `size` rows."""
        return replace(
            step,
            token_ids=step.token_ids.new_empty(size),
            positions=step.positions.new_empty(size),
            slots=step.slots.new_empty(size),
            block_tables=step.block_tables.new_zeros(size, self._table_blocks),
            context_tokens=step.context_tokens.new_empty(size),
            decode_rows=size,
            longest_decode=self._table_blocks * step.pool.block_tokens,
        )


def _fill(static: Step, step: Step) -> None:
    """Put a step's rows into the buffers; the rows behind them idle again."""
    rows, blocks = step.block_tables.shape
    for name, idle in (("token_ids", 0), ("positions", 0), ("context_tokens", 1)):
        getattr(static, name)[:rows] = getattr(step, name)
        getattr(static, name)[rows:] = idle
    scratch_block = static.pool.blocks - 1
    static.slots[:rows] = step.slots
    static.slots[rows:] = scratch_block * static.pool.block_tokens
    static.block_tables[:rows, :blocks] = step.block_tables
    static.block_tables[rows:] = scratch_block


def _sizes() -> list[int]:
    return [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4_097, 64)]
