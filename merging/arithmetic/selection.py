"""Find the k-th largest change of a tensor exactly, without sorting it.

By a sample that brackets it, or by counting the digits of floats, whose bits are ordered like their
values.
"""

import math
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from merging.arithmetic.chunks import (
    BITS,
    CPU_CHUNK,
    Scratch,
    check_same_shape,
    chunk_size,
    chunks,
    load,
    work_dtype,
)

COUNT_CHUNK = 1 << 19  # elements: larger, as each chunk's counts take time to add
SMALL = 1 << 15  # elements: so few that selecting is faster than anything else
SAMPLE = 1 << 16  # elements that tell about where the k-th largest lies
MOST_BETWEEN = 1 << 23  # elements that may be selected among
DIGITS = 1 << 16  # values of the 16 bits that are counted at a time


def trim_threshold(
    base: Tensor,
    tensor: Tensor,
    density: float,
    device: torch.device | None = None,
    work: torch.dtype | None = None,
) -> float:
    """Return the largest float below the k-th largest |tensor - base|.

    k = max(1, floor(density n)) for a density in (0, 1]: those above the result are to be kept,
    equal magnitudes all alike. NaN is largest. Changes are computed in `work` (by default the wider
    of the two), in which they must then be compared.
    """
    check_same_shape([base, tensor])
    device = device or base.device
    work = work or work_dtype([base, tensor])
    count = base.numel()
    k = max(1, math.floor(density * count))
    if k >= count:
        return 0.0
    base, tensor = base.reshape(-1), tensor.reshape(-1)
    kth = None
    if count <= SMALL:
        magnitudes = _magnitudes(base.to(device), tensor.to(device), work)
        kth = float(magnitudes.kthvalue(count - k + 1).values)
    elif device.type == "cpu":
        kth = _kth_by_sample(base, tensor, k, work)
    if kth is None:
        kth = _kth_by_counting(base, tensor, k, work, device)
    found = torch.tensor(kth, dtype=work)
    return float(torch.nextafter(found, torch.zeros_like(found)))


def _magnitudes(base: Tensor, tensor: Tensor, work: torch.dtype) -> Tensor:
    return (tensor.to(work) - base.to(work)).abs_()


def _magnitude_chunks(
    base: Tensor, tensor: Tensor, size: int, work: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Yield |tensor - base| in chunks, all in one buffer."""
    scratch = Scratch(size, device)
    for chunk in chunks(base.numel(), size):
        delta, other = (scratch(i, work, chunk.stop - chunk.start) for i in range(2))
        yield load(delta, tensor[chunk]).sub_(load(other, base[chunk])).abs_()


def _kth_by_sample(base: Tensor, tensor: Tensor, k: int, work: torch.dtype) -> float | None:
    """Find the k-th largest between two values that a sample suggests (Floyd and Rivest 1975).

    Whatever the sample is, what is returned is right: entries above, at and between the two values
    are counted. None if the k-th is not among them, or if so many are between that selecting among
    them would take much memory. By numpy, whose comparisons are several times as fast as torch's.
    """
    n = base.numel()
    low, high = _bracket(base, tensor, k, work)
    size = min(n, CPU_CHUNK)
    masks = np.empty((4, size), dtype=bool)  # which entries are < high, <= high, < low, <= low
    below = [0, 0, 0, 0]  # how many
    between: list[np.ndarray] = []
    for chunk in _magnitude_chunks(base, tensor, size, work, base.device):
        inside = masks[:, : len(chunk)]
        for i, pivot in enumerate((high, high, low, low)):
            compare = np.less_equal if i % 2 else np.less
            below[i] += int(np.count_nonzero(compare(chunk.numpy(), pivot, out=inside[i])))
        between.append(chunk.numpy()[np.greater(inside[0], inside[3], out=inside[0])])
        if below[0] - below[3] > min(n // 16, MOST_BETWEEN):
            return None
    from_high, above_high, from_low, above_low = (n - count for count in below)
    if above_high < k <= from_high:
        return float(high)
    if from_high < k <= above_low:
        rest = np.concatenate(between)
        place = len(rest) - (k - from_high)
        rest.partition(place)
        return float(rest[place])
    return float(low) if above_low < k <= from_low else None


def _bracket(base: Tensor, tensor: Tensor, k: int, work: torch.dtype) -> tuple[float, float]:
    """Return two values between which a sample says that the k-th largest lies, very likely."""
    n = base.numel()
    step = n // max(SAMPLE, n >> 10) | 1  # odd, so as not to stay in a few columns of a matrix
    sample = np.sort(_magnitudes(base[::step], tensor[::step], work).numpy())[::-1]
    place = k / n * len(sample)
    margin = 4 * math.sqrt(place * (1 - place / len(sample))) + 1
    first, last = math.floor(place - margin), math.ceil(place + margin)
    high = float(sample[first]) if first >= 0 else math.inf
    return (float(sample[last]) if last < len(sample) else -1.0), high


def _kth_by_counting(
    base: Tensor, tensor: Tensor, k: int, work: torch.dtype, device: torch.device
) -> float:
    """Find the k-th largest by its digits, 16 bits at a time.

    Count how often each value of the upper bits occurs, see in which the k-th largest lies, and go
    on with the next bits of the entries that share them.
    """
    width = 8 * work.itemsize
    size = chunk_size(base.numel(), device, COUNT_CHUNK)
    prefix = 0
    for shift in range(width - 16, -1, -16):
        # Digits are counted from 1, and all that is below or above them as 0 and DIGITS + 1.
        counts = torch.zeros(DIGITS + 2, dtype=torch.int64, device=device)
        for chunk in _magnitude_chunks(base, tensor, size, work, device):
            digits = chunk.view(BITS[work]).bitwise_right_shift_(shift)
            _count(counts, digits.sub_((prefix << 16) - 1).clamp_(0, DIGITS + 1))
        at_least = counts[1:-1].flip(0).cumsum(0)  # entries with this digit, from the top, or above
        place = int(torch.searchsorted(at_least, k))
        k -= int(at_least[place - 1]) if place else 0
        prefix = prefix << 16 | DIGITS - 1 - place
    code = "<d" if width == 64 else "<f"
    return float(struct.unpack(code, prefix.to_bytes(width // 8, "little"))[0])


def _count(counts: Tensor, digits: Tensor) -> None:
    """Add to counts[d] how often d occurs."""
    if counts.device.type == "cpu":
        counts += torch.bincount(digits, minlength=len(counts))
    else:  # where bincount would wait for the device to learn the largest digit
        counts.index_add_(0, digits, counts.new_ones(1).expand(len(digits)))
