"""Numbers that belong to the entries of a tensor, computed anew each time they are looked at."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merging.arithmetic.chunks import (
    Scratch,
    check_same_shape,
    chunk_size,
    chunks,
    load,
    row_length,
    work_dtype,
)


class Entries(NamedTuple):
    """Numbers, one for each of a tensor's entries, none of them negative; NaN is largest.

    `of` computes those of a slice, which may have a step, in the dtype `work` on the device; it may
    use what the scratch, if any, holds under "entries" and names of its own.
    """

    number: int
    work: torch.dtype
    device: torch.device
    of: Callable[[slice, Scratch | None], Tensor]


def magnitudes(
    base: Tensor,
    tensor: Tensor,
    device: torch.device | None = None,
    work: torch.dtype | None = None,
) -> Entries:
    """Return |tensor - base|, entry by entry."""
    check_same_shape([base, tensor])
    to, dtype = device or base.device, work or work_dtype([base, tensor])
    flat, origin = tensor.reshape(-1), base.reshape(-1)

    def of(part: slice, scratch: Scratch | None) -> Tensor:
        values, other = flat[part], origin[part]
        if scratch is None:
            return (values.to(to).to(dtype) - other.to(to).to(dtype)).abs_()
        delta = load(scratch("entries", dtype, len(values)), values)
        return delta.sub_(load(scratch("other", dtype, len(values)), other)).abs_()

    return Entries(base.numel(), dtype, to, of)


def in_float32(entries: Entries) -> Entries:
    """Return the same numbers, rounded."""
    if entries.work == torch.float32:
        return entries
    return entries._replace(
        work=torch.float32, of=lambda part, scratch: entries.of(part, scratch).float()
    )


def variances(base: Tensor, tensors: Sequence[Tensor], device: torch.device) -> Entries:
    """Return the variance of the tensors' changes times N^2, entry by entry, in float64."""
    flat = [t.reshape(-1) for t in (base, *tensors)]

    def of(part: slice, scratch: Scratch | None) -> Tensor:
        parts = [t[part] for t in flat]
        count = len(parts[0])
        scratch = scratch or Scratch(count, device)
        origin, *others = (
            load(scratch(i, torch.float64, count), values) for i, values in enumerate(parts)
        )
        return variance([other.sub_(origin) for other in others], scratch)

    return Entries(base.numel(), torch.float64, device, of)


def variance(deltas: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """Return the variance of deltas times N^2, entry by entry; 0 where all are equal.

    N sum_i x_i^2 - (sum_i x_i)^2, with x_i = delta_i - delta_1. As x_1 = 0 this is at least
    sum_i x_i^2, so little cancels; and in float64 it is exact for changes of few digits, so that
    the order of the models does not make equal variances unequal.
    """
    names = ("entries", "total", "other")
    squares, total, other = (scratch(name, deltas[0].dtype, len(deltas[0])) for name in names)
    squares.zero_()
    total.zero_()
    for delta in deltas[1:]:
        torch.sub(delta, deltas[0], out=other)
        total.add_(other)
        squares.add_(other.square_())
    return squares.mul_(len(deltas)).sub_(total.square_())


def weighted_magnitudes(
    base: Tensor, tensor: Tensor, of_rows: Tensor, device: torch.device
) -> Entries:
    """Return |tensor - base| times the number of each row, in float64."""
    found = magnitudes(base, tensor, device, torch.float64)
    length = max(1, base.numel() // max(1, len(of_rows)))

    def of(part: slice, scratch: Scratch | None) -> Tensor:
        start, stop, step = part.indices(found.number)
        count = len(range(start, stop, step))
        buffers = scratch or Scratch(count, device)
        rows = torch.arange(start, stop, step, out=buffers("rows", torch.int64, count))
        rows.div_(length, rounding_mode="floor")
        factors = buffers("factors", torch.float64, count)
        torch.index_select(of_rows, 0, rows, out=factors)
        return found.of(part, scratch).mul_(factors)

    return found._replace(of=of)


def divergences(base: Tensor, tensor: Tensor, device: torch.device) -> Tensor:
    """Return KL(softmax(row of the tensor) || softmax(row of the base)) of each row, in float64.

    = sum_i p_i delta_i - log(1 + sum_i q_i (exp(delta_i) - 1)), the same for delta_i + c. With a c
    of which the sum of the q_i delta_i is 0 nothing small is lost; and a row that moves as a whole
    has none at all, not what rounding makes of it.
    """
    length = row_length(base)
    rows = [t.reshape(-1, length) for t in (base, tensor)]
    found = torch.empty(len(rows[0]), dtype=torch.float64, device=device)
    for part in chunks(len(found), max(1, chunk_size(base.numel(), device) // length)):
        origin, values = (t[part].to(device).double() for t in rows)
        before = origin.softmax(1)
        delta = values - origin
        delta.sub_(delta[:, :1].clone())
        delta.sub_((before * delta).sum(1, keepdim=True))
        after = torch.log1p((before * delta.expm1()).sum(1))
        torch.sub((values.softmax(1) * delta).sum(1), after, out=found[part]).clamp_min_(0)
    return found
