"""Go through flattened tensors a chunk at a time, on the inputs' device or another.

A chunk is so small that all scratch memory stays in the cache of a processor, and so large that an
accelerator is kept busy. Only numbers of entries depend on its size, never a bit of a result.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CPU_CHUNK = 1 << 18  # elements: a dozen scratch tensors of this size stay near the cache
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}  # integers of the same width
DEVICE_CHUNK = 1 << 24  # elements: enough to keep an accelerator busy between kernel launches


class Scratch:
    """Tensors to compute in, by name, that are made once and used for every chunk."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._tensors: dict[object, Tensor] = {}

    def __call__(self, name: object, dtype: torch.dtype, length: int | None = None) -> Tensor:
        """Return the tensor of a name, of what it held before, cut to a length."""
        if name not in self._tensors:
            self._tensors[name] = torch.empty(self.size, dtype=dtype, device=self.device)
        return self._tensors[name][:length]


def work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype to compute in: float64 if any of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_same_shape(tensors: Sequence[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"expected tensors of one shape, got {shapes}")


def chunk_size(count: int, device: torch.device, on_cpu: int | None = None) -> int:
    """Return how many of `count` entries to take at once."""
    return min(count, (on_cpu or CPU_CHUNK) if device.type == "cpu" else DEVICE_CHUNK)


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size or 1))


def load(buffer: Tensor, values: Tensor) -> Tensor:
    """Copy values into a buffer; to another device in their own dtype, to be cast there."""
    return buffer.copy_(values.to(buffer.device))


def store(out: Tensor, values: Tensor) -> None:
    """Copy values out of a buffer; to another device in the dtype of the output."""
    out.copy_(values if out.device == values.device else values.to(out.dtype))


def add_to_base(
    merge: Callable[[list[Tensor], Scratch], Tensor],
    base: Tensor,
    tensors: Sequence[Tensor],
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Tensor:
    """Return base + merge(deltas), where delta_t = theta_t - base, rounded once to `dtype`.

    `merge` is called with the deltas of each chunk, which it may change, and a place to compute in.
    """
    check_same_shape([base, *tensors])
    device = device or base.device
    work = work_dtype([base, *tensors])
    flat, *others = (t.reshape(-1) for t in (base, *tensors))
    out = torch.empty_like(flat, dtype=dtype or base.dtype)
    size = chunk_size(len(flat), device)
    scratch = Scratch(size, device)
    for chunk in chunks(len(flat), size):
        length = chunk.stop - chunk.start
        origin = load(scratch("origin", work, length), flat[chunk])
        deltas = [
            load(scratch(i, work, length), other[chunk]).sub_(origin)
            for i, other in enumerate(others)
        ]
        store(out[chunk], merge(deltas, scratch).add_(origin))
    return out.view(base.shape)
