"""Go through flattened tensors a chunk at a time, on the inputs' device or another.

A chunk is so small that all scratch memory stays in the cache of a processor, and so large that an
accelerator is kept busy. Only numbers of entries depend on its size, never a bit of a result.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from merging.arithmetic.memory import empty, empty_result, release
from merging.arithmetic.watching import current_watcher

CPU_CHUNK = 1 << 18  # elements: a dozen scratch tensors of this size stay near the cache
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}  # integers of the same width
DEVICE_CHUNK = 1 << 24  # elements: enough to keep an accelerator busy between kernel launches
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Makes of the deltas of a chunk, which it may change, what is to be added to the base there.
Merge = Callable[[list[Tensor], slice, "Scratch"], Tensor]


class Scratch:
    """Tensors to compute in, by name, that are made once and used for every chunk.

    At the end of a `with` their memory is released: none of them may be used after that.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._tensors: dict[object, Tensor] = {}

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        while self._tensors:
            release(self._tensors.popitem()[1])

    def __call__(self, name: object, dtype: torch.dtype, length: int | None = None) -> Tensor:
        """Return the tensor of a name, of what it held before, cut to a length."""
        key = name, dtype
        if key not in self._tensors:
            self._tensors[key] = empty(self.size, dtype, self.device)
        tensor = self._tensors[key]
        return tensor if length in (None, self.size) else tensor[:length]


def work_dtype(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype to compute in: float32 if inputs and output have 16 bits, else float64."""
    dtypes = {*(t.dtype for t in tensors), dtype or tensors[0].dtype}
    return torch.float32 if dtypes <= {*SIXTEEN_BITS} else torch.float64


def check_same_shape(tensors: Sequence[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"expected tensors of one shape, got {shapes}")


def chunk_size(
    count: int,
    device: torch.device,
    on_cpu: int | None = None,
    row_length: int = 1,
    work: torch.dtype = torch.float64,
) -> int:
    """Return how many of `count` entries to take at once: whole rows; more if all is narrow."""
    fitting = CPU_CHUNK * torch.float64.itemsize // work.itemsize
    size = (on_cpu or fitting) if device.type == "cpu" else DEVICE_CHUNK
    return min(count, max(1, size // row_length) * row_length)


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size or 1))


def row_length(tensor: Tensor) -> int:
    """Return the length of a row, the last dimension; at least 1."""
    return max(1, tensor.shape[-1]) if tensor.dim() else 1


def load(buffer: Tensor, values: Tensor) -> Tensor:
    """Copy values into a buffer; to another device in their own dtype, to be cast there."""
    return buffer.copy_(values if values.device == buffer.device else values.to(buffer.device))


def store(out: Tensor, values: Tensor) -> None:
    """Copy values out of a buffer; to another device in the dtype of the output."""
    out.copy_(values if out.device == values.device else values.to(out.dtype))


def load_deltas(
    flat: Sequence[Tensor], part: slice, work: torch.dtype, scratch: Scratch
) -> list[Tensor]:
    """Return the base's entries of a chunk, and the others' differences from them."""
    length = part.stop - part.start
    origin = load(scratch("origin", work, length), flat[0][part])
    deltas = [
        load(scratch(i, work, length), other[part]).sub_(origin) for i, other in enumerate(flat[1:])
    ]
    return [origin, *deltas]


def add_to_base(
    merge: Merge,
    base: Tensor,
    tensors: Sequence[Tensor],
    lambda_: float,
    dtype: torch.dtype | None,
    device: torch.device | None,
    whole_rows: bool = False,
    work: torch.dtype | None = None,
) -> Tensor:
    """Return base + lambda merge(deltas), where delta_t = theta_t - base, rounded once to `dtype`.

    `merge` is called with the deltas of each chunk, in `work`, its place and scratch to compute in.
    """
    check_same_shape([base, *tensors])
    device = device or base.device
    work = work or work_dtype([base, *tensors], dtype)
    flat = [t.reshape(-1) for t in (base, *tensors)]
    out = empty_result(base.numel(), dtype or base.dtype, base.device)
    size = chunk_size(len(out), device, row_length=row_length(base) if whole_rows else 1)
    watcher = current_watcher()
    with Scratch(size, device) as scratch:
        for part in chunks(len(out), size):
            origin, *deltas = load_deltas(flat, part, work, scratch)
            if watcher is not None:
                watcher.before(part, origin, deltas, scratch)
            merged = merge(deltas, part, scratch)
            if lambda_ != 1:
                merged.mul_(lambda_)
            store(out[part], merged.add_(origin))
            if watcher is not None:
                watcher.after(out[part])
    return out.view(base.shape)
