"""Find the k-th largest of the numbers of a tensor's entries exactly, without sorting them.

By a sample that brackets it, or by counting the digits of floats, whose bits are ordered like their
values. The numbers, such as magnitudes of changes, are computed anew each time they are looked at.
"""

import math
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from merging.arithmetic.chunks import BITS, CPU_CHUNK, Scratch, chunk_size, chunks
from merging.arithmetic.entries import Entries, magnitudes

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
    equal magnitudes all alike. NaN is largest; of density 0, nothing finite is above the result.
    Changes are computed in `work`, in which they must then be compared.
    """
    entries = magnitudes(base, tensor, device, work)
    if density == 0:
        return torch.finfo(entries.work).max
    k = max(1, math.floor(density * entries.number))
    return 0.0 if k >= entries.number else float_below(kth_largest(entries, k), entries.work)


def float_below(value: float, dtype: torch.dtype) -> float:
    """Return the largest float of a dtype that is below a positive value; 0 of 0."""
    found = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(found, torch.zeros_like(found)))


def float_below_rounded(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest float of a dtype whose rounding to float32 is below a threshold, or 0.

    The threshold is a float32, of at least 0.
    """
    below = float_below(threshold, torch.float32)
    if dtype == torch.float32 or threshold == 0 or not math.isfinite(threshold):
        return below
    middle = (below + threshold) / 2  # exact in float64, and rounded to an even last bit
    rounded = float(torch.tensor(middle, dtype=torch.float64).float())
    return float_below(middle, dtype) if rounded == threshold else middle


def kth_largest(entries: Entries, k: int) -> float:
    """Return the k-th largest number, for k from 1 to their count."""
    found = None
    if entries.number <= SMALL:
        values = entries.of(slice(0, entries.number), None)
        found = float(values.kthvalue(entries.number - k + 1).values)
    elif entries.device.type == "cpu":
        found = _kth_by_sample(entries, k)
    return _kth_by_counting(entries, k) if found is None else found


def quantile(entries: Entries, share: float) -> float:
    """Return the number that a share of all numbers is below, interpolated between two of them."""
    place = share * (entries.number - 1)  # counted from the smallest
    before = math.floor(place)
    low = kth_largest(entries, entries.number - before)
    if place == before:
        return low
    return low + (place - before) * (kth_largest(entries, entries.number - before - 1) - low)


def count_nonzero(entries: Entries) -> int:
    n = entries.number
    counted = [torch.count_nonzero(c) for c in in_chunks(entries, chunk_size(n, entries.device))]
    return int(sum(counted))


def in_chunks(entries: Entries, size: int) -> Iterator[Tensor]:
    """Yield the numbers in chunks, all in one buffer, which is gone when the last was used."""
    with Scratch(min(size, entries.number), entries.device) as scratch:
        for part in chunks(entries.number, scratch.size):
            yield entries.of(part, scratch)


def _kth_by_sample(entries: Entries, k: int) -> float | None:
    """Find the k-th largest between two values that a sample suggests (Floyd and Rivest 1975).

    Whatever the sample is, what is returned is right: entries above, at and between the two values
    are counted. None if the k-th is not among them, or if so many are between that selecting among
    them would take much memory. By numpy, whose comparisons are several times as fast as torch's.
    """
    n = entries.number
    low, high = _bracket(entries, k)
    size = min(n, CPU_CHUNK)
    masks = np.empty((4, size), dtype=bool)  # which entries are < high, <= high, < low, <= low
    below = [0, 0, 0, 0]  # how many
    between: list[np.ndarray] = []
    for chunk in in_chunks(entries, size):
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


def _bracket(entries: Entries, k: int) -> tuple[float, float]:
    """Return two values between which a sample says that the k-th largest lies, very likely."""
    n = entries.number
    step = n // max(SAMPLE, n >> 10) | 1  # odd, so as not to stay in a few columns of a matrix
    sample = np.sort(entries.of(slice(0, n, step), None).numpy())[::-1]
    place = k / n * len(sample)
    margin = 4 * math.sqrt(place * (1 - place / len(sample))) + 1
    first, last = math.floor(place - margin), math.ceil(place + margin)
    high = float(sample[first]) if first >= 0 else math.inf
    return (float(sample[last]) if last < len(sample) else -1.0), high


def _kth_by_counting(entries: Entries, k: int) -> float:
    """Find the k-th largest by its digits, 16 bits at a time.

    Count how often each value of the upper bits occurs, see in which the k-th largest lies, and go
    on with the next bits of the entries that share them.
    """
    width = 8 * entries.work.itemsize
    prefix = 0
    for shift in range(width - 16, -1, -16):
        digit, k = find_digit(count_digits(entries, prefix, shift), k)
        prefix = prefix << 16 | digit
    code = "<d" if width == 64 else "<f"
    return float(struct.unpack(code, prefix.to_bytes(width // 8, "little"))[0])


def count_digits(entries: Entries, prefix: int, shift: int) -> Tensor:
    """Return how often each value of 16 bits occurs, above the lowest `shift` ones.

    Of numbers whose bits above those are the prefix. Before the first count stands that of all
    smaller numbers, and after the last that of all larger ones.
    """
    counts = torch.zeros(DIGITS + 2, dtype=torch.int64, device=entries.device)
    for chunk in in_chunks(entries, chunk_size(entries.number, entries.device, COUNT_CHUNK)):
        digits = chunk.view(BITS[entries.work]).bitwise_right_shift_(shift)
        digits.sub_((prefix << 16) - 1).clamp_(0, DIGITS + 1)
        if counts.device.type == "cpu":
            counts += torch.bincount(digits, minlength=len(counts))
        else:  # where bincount would wait for the device to learn the largest digit
            counts.index_add_(0, digits, counts.new_ones(1).expand(len(digits)))
    return counts


def find_digit(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the digit of the k-th largest, and its place among those that share the digit."""
    at_least = counts[1:-1].flip(0).cumsum(0)  # entries with this digit, from the top, or above
    place = int(torch.searchsorted(at_least, k))
    return DIGITS - 1 - place, k - (int(at_least[place - 1]) if place else 0)
