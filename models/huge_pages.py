"""Memory in pages of 2 MiB, where Linux gives them: a step reads all weights, from too many small ones to remember.

Translating an address that the CPU has not met lately takes several reads of memory, in a virtual machine dozens.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 32 << 20  # small tensors share pages
_LINE_BYTES = 64


class Arena:
    """Tensors one after the other, which live as long as any tensor that shares their chunk."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As torch's, on the CPU. Memory is taken once it is written."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._left):
            self._left = _chunk(max(size, _CHUNK_BYTES))
        own, self._left = self._left[:size], self._left[-(-size // _LINE_BYTES) * _LINE_BYTES :]
        return own.view(dtype).view(*shape)


def _chunk(size: int) -> Tensor:
    """So many bytes, at the beginning of a page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # holds the mapping
    return whole[-whole.data_ptr() % _PAGE_BYTES :][:size]
