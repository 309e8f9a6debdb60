"""Memory of tensors that is used again: new pages can take as long as all the arithmetic.

Only on the CPU: torch itself keeps the memory of accelerators.
"""

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

SMALLEST = 1 << 18  # bytes of a tensor; the C library keeps smaller pieces by itself
KEPT = (1 << 27) + mmap.PAGESIZE  # bytes that may lie unused; of a result, with room to place it

_LOCK = threading.Lock()
_unused: list[Tensor] = []  # blocks of bytes, the last one used last
_PLACE: ContextVar[int | None] = ContextVar("place", default=None)


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of any values, in memory that was released, if some has about its size."""
    nbytes = count * dtype.itemsize
    if device.type == "cpu" and nbytes >= SMALLEST:
        with _LOCK:
            for i in reversed(range(len(_unused))):
                if nbytes <= _unused[i].nbytes <= nbytes + nbytes // 4:
                    return _unused.pop(i)[:nbytes].view(dtype)
    return torch.empty(count, dtype=dtype, device=device)


@contextmanager
def placed(place: int | None) -> Iterator[None]:
    """Let results lie in memory as they will in a file, from a byte on: so far from a page's start.

    Then a file can be written from there directly. In this thread; None if they may lie anywhere.
    """
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def empty_result(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of any values, as `empty` does, which lies as a result is to lie."""
    nbytes, place = count * dtype.itemsize, _PLACE.get()
    if device.type != "cpu" or nbytes < SMALLEST or place is None or place % dtype.itemsize:
        return empty(count, dtype, device)
    block = empty(nbytes + mmap.PAGESIZE, torch.uint8, device)
    first = (place - block.data_ptr()) % mmap.PAGESIZE
    return block[first : first + nbytes].view(dtype)


def release(tensor: Tensor) -> None:
    """Let the memory of a tensor be used again. Nobody may use it any more, by any name.

    Tensors without entries are left alone: they may be views of anything.
    """
    storage = tensor.untyped_storage()
    has_room = tensor.numel() > 0 and SMALLEST <= storage.nbytes() <= KEPT
    if tensor.device.type != "cpu" or not has_room:
        return
    block = torch.empty(0, dtype=torch.uint8).set_(storage)
    with _LOCK:
        _unused.append(block)
        while sum(each.nbytes for each in _unused) > KEPT:
            _unused.pop(0)
