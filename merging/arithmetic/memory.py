"""Memory of tensors that is used again: new pages can take as long as all the arithmetic.

Only on the CPU: torch itself keeps the memory of accelerators.
"""

import threading

import torch
from torch import Tensor

SMALLEST = 1 << 18  # bytes of a tensor; the C library keeps smaller pieces by itself
KEPT = 1 << 27  # bytes that may lie unused

_LOCK = threading.Lock()
_unused: list[Tensor] = []  # blocks of bytes, the last one used last


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of any values, in memory that was released, if some has about its size."""
    nbytes = count * dtype.itemsize
    if device.type == "cpu" and nbytes >= SMALLEST:
        with _LOCK:
            for i in reversed(range(len(_unused))):
                if nbytes <= _unused[i].nbytes <= nbytes + nbytes // 4:
                    return _unused.pop(i)[:nbytes].view(dtype)
    return torch.empty(count, dtype=dtype, device=device)


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
