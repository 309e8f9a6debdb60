"""The tensor maths of model merging: linear, slerp and ties. Tensors and numbers in, tensor out.

Each function combines the same-named tensor of several models:

    merged = ties(base, [math, code], weights=[1.0, 1.0], densities=[0.5, 0.5])

Inputs may have any shape and any floating dtype, mixed, on one device; they are never modified. The
arithmetic is done in at least float32, sums of terms that may cancel in float64, and the result is
rounded to `dtype`, which defaults to the dtype of the first tensor (of the base, for ties). It is
on the inputs' device; given another `device`, the arithmetic goes there, a chunk at a time.

Work goes through the flattened tensors in chunks, so that only a few megabytes are needed besides
the result. Every step is element by element, or a count of integers, or a sum over blocks of fixed
size, so the size of the chunks does not change a bit of the result. NaN and infinities in the input
reach the output.
"""

import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CPU_CHUNK = 1 << 18  # elements: a dozen scratch tensors of this size stay near the cache
COUNT_CHUNK = 1 << 19  # elements: larger, as each chunk's counts take time to add
SMALL = 1 << 15  # elements: so few that selecting is faster than anything else
SAMPLE = 1 << 16  # elements that tell about where the k-th largest lies
MOST_BETWEEN = 1 << 23  # elements that may be selected among
LARGEST_WEIGHT = 1e30  # in float32, larger ones would overflow
DIGITS = 1 << 16  # values of the 16 bits that are counted at a time
DEVICE_CHUNK = 1 << 24  # elements: enough to keep an accelerator busy between kernel launches
DOT_BLOCK = 1 << 12  # elements: so few that torch sums them on one thread, always in one order
PARALLEL_THRESHOLD = 0.9995  # |cos| above which slerp interpolates linearly
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}  # integers of the same width


def _work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_same_shape(tensors: Sequence[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"expected tensors of one shape, got {shapes}")


def _chunk_size(count: int, device: torch.device) -> int:
    """Return how many entries to take at once."""
    return min(count, CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size or 1))


def _scratch(size: int, dtype: torch.dtype, device: torch.device, count: int) -> list[Tensor]:
    return [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]


def _load(buffer: Tensor, values: Tensor) -> Tensor:
    """Copy values into a buffer; to another device in their own dtype, to be cast there."""
    return buffer.copy_(values.to(buffer.device))


def _store(out: Tensor, values: Tensor) -> None:
    """Copy values out of a buffer; to another device in the dtype of the output."""
    out.copy_(values if out.device == values.device else values.to(out.dtype))


def _weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """Return the sum of weights[i] * tensors[i], summed in float64.

    In float32, terms that nearly cancel would leave an error of many units in the last place of
    even a bfloat16 result; float64 costs no more time than the tricks that avoid it.
    """
    flat = [t.reshape(-1) for t in tensors]
    out = torch.empty_like(flat[0], dtype=dtype or tensors[0].dtype)
    size = _chunk_size(out.numel(), device)
    scratch = _scratch(size, torch.float64, device, 2)
    for chunk in _chunks(out.numel(), size):
        total, term = (s[: chunk.stop - chunk.start] for s in scratch)
        _load(total, flat[0][chunk]).mul_(weights[0])
        for tensor, weight in zip(flat[1:], weights[1:], strict=True):
            total.add_(_load(term, tensor[chunk]).mul_(weight))
        _store(out[chunk], total)
    return out.view(tensors[0].shape)


@torch.no_grad()
def linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Average the tensors: sum_i w_i * theta_i, over sum_i w_i when normalising (arXiv 2203.05482).

    Weights may be negative. Raises ValueError if the shapes differ, or if normalising by weights
    whose sum is about zero.
    """
    _check_same_shape(tensors)
    if normalize:
        total = check_normalizable(weights)
        weights = [w / total for w in weights]
    return _weighted_sum(tensors, weights, dtype, device or tensors[0].device)


def check_normalizable(weights: Sequence[float]) -> float:
    """Return the sum of the weights; ValueError if it is about zero, compared with their sizes."""
    total = sum(weights)
    if not abs(total) > 1e-6 * sum(abs(w) for w in weights) or math.isinf(total):
        raise ValueError(f"weights {list(weights)} sum to {total:g} and cannot be normalised")
    return total


def _cosine(a: Tensor, b: Tensor, device: torch.device) -> float:
    """Return the cosine of two flat tensors, 0 if a norm is zero.

    Products of 16-bit floats are exact in float32, and its sums of small blocks good enough. Other
    inputs take float64, and so do those whose squares leave the range of float32, and those that
    point away from each other, where slerp's terms cancel.
    """
    aa = ab = bb = 0.0
    if all(t.dtype in (torch.bfloat16, torch.float16) for t in (a, b)):
        aa, ab, bb = _dots(a, b, torch.float32, device)
    in_range = 1e-20 < min(aa, bb) and max(aa, bb) < 1e38
    if not in_range or ab < -0.5 * math.sqrt(aa) * math.sqrt(bb):
        aa, ab, bb = _dots(a, b, torch.float64, device)
    norms = math.sqrt(aa) * math.sqrt(bb)
    return ab / norms if norms != 0 else 0.0


def _dots(
    a: Tensor, b: Tensor, work: torch.dtype, device: torch.device
) -> tuple[float, float, float]:
    """Return a.a, a.b and b.b: products and sums of blocks in `work`, the sum of those exact."""
    blocks = max(1, -(-_chunk_size(a.numel(), device) // DOT_BLOCK))
    size = blocks * DOT_BLOCK
    chunk_a, chunk_b, product = _scratch(size, work, device, 3)
    pairs = ((chunk_a, chunk_a), (chunk_a, chunk_b), (chunk_b, chunk_b))
    sums = [torch.zeros(1, dtype=work, device=device)] * 3
    for chunk in _chunks(a.numel(), size):
        n = chunk.stop - chunk.start
        for buffer, tensor in ((chunk_a, a), (chunk_b, b)):
            _load(buffer[:n], tensor[chunk])
            buffer[n:].zero_()
        sums += [torch.mul(x, y, out=product).view(blocks, DOT_BLOCK).sum(1) for x, y in pairs]
    aa, ab, bb = (math.fsum(torch.cat(sums[i::3]).tolist()) for i in range(3))
    return aa, ab, bb


@torch.no_grad()
def slerp(
    a: Tensor,
    b: Tensor,
    t: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Interpolate on the arc from a (t = 0) to b (t = 1), each tensor taken as one long vector.

        (sin((1-t) theta) * a + sin(t theta) * b) / sin(theta),   cos(theta) = a.b / (|a| |b|)

    (Shoemake 1985.) Where |cos(theta)| > 0.9995, or a norm is zero, the arc is not defined well:
    (1-t) * a + t * b. Raises ValueError if t is outside [0, 1] or the shapes differ.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"slerp needs t in [0, 1], got {t}")
    _check_same_shape([a, b])
    device = device or a.device
    cosine = _cosine(a.reshape(-1), b.reshape(-1), device)
    if abs(cosine) > PARALLEL_THRESHOLD or cosine == 0 and not (a.any() and b.any()):
        weights = [1 - t, t]
    else:
        theta = math.acos(cosine)
        weights = [
            math.sin((1 - t) * theta) / math.sin(theta),
            math.sin(t * theta) / math.sin(theta),
        ]
    return _weighted_sum([a, b], weights, dtype, device)


def _kth_largest_magnitude(
    base: Tensor, tensor: Tensor, k: int, work: torch.dtype, device: torch.device
) -> float:
    """Return the k-th largest |tensor - base|, exactly, of two flat tensors; NaN is largest."""
    if base.numel() <= SMALL:
        magnitudes = _magnitudes(base.to(device), tensor.to(device), work)
        return float(magnitudes.kthvalue(base.numel() - k + 1).values)
    selected = _kth_by_sample(base, tensor, k, work) if device.type == "cpu" else None
    return _kth_by_counting(base, tensor, k, work, device) if selected is None else selected


def _magnitudes(base: Tensor, tensor: Tensor, work: torch.dtype) -> Tensor:
    return (tensor.to(work) - base.to(work)).abs_()


def _magnitude_chunks(
    base: Tensor, tensor: Tensor, size: int, work: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Yield |tensor - base| in chunks, all in one buffer."""
    delta, other = _scratch(size, work, device, 2)
    for chunk in _chunks(base.numel(), size):
        n = chunk.stop - chunk.start
        yield _load(delta[:n], tensor[chunk]).sub_(_load(other[:n], base[chunk])).abs_()


def _kth_by_sample(base: Tensor, tensor: Tensor, k: int, work: torch.dtype) -> float | None:
    """Find the k-th largest between two values that a sample suggests (Floyd and Rivest 1975).

    Whatever the sample is, what is returned is right: entries above, at and between the two values
    are counted. None if the k-th is not among them, or if so many are between that selecting among
    them would take much memory. By numpy, whose comparisons are several times as fast as torch's.
    """
    n = base.numel()
    step = n // max(SAMPLE, n >> 10) | 1  # odd, so as not to stay in a few columns of a matrix
    sample = np.sort(_magnitudes(base[::step], tensor[::step], work).numpy())[::-1]
    place = k / n * len(sample)
    margin = 4 * math.sqrt(place * (1 - place / len(sample))) + 1
    first, last = math.floor(place - margin), math.ceil(place + margin)
    high = sample[first] if first >= 0 else np.inf
    low = sample[last] if last < len(sample) else -1
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


def _kth_by_counting(
    base: Tensor, tensor: Tensor, k: int, work: torch.dtype, device: torch.device
) -> float:
    """Find the k-th largest by its digits.

    The bits of a float that is not negative are ordered like its value, so the answer is found 16
    bits at a time: count how often each value of the upper bits occurs, see in which the k-th
    largest lies, and go on with the next bits of the entries that share them.
    """
    width = 8 * work.itemsize
    size = min(base.numel(), COUNT_CHUNK if device.type == "cpu" else DEVICE_CHUNK)
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


def _trim_threshold(
    base: Tensor, tensor: Tensor, density: float, work: torch.dtype, device: torch.device
) -> float:
    """Return the largest float below the k-th largest |delta|, k = max(1, floor(density * n))."""
    k = max(1, math.floor(density * base.numel()))
    if k >= base.numel():
        return 0.0
    kth = torch.tensor(_kth_largest_magnitude(base, tensor, k, work, device), dtype=work)
    return float(torch.nextafter(kth, torch.zeros_like(kth)))


@torch.no_grad()
def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
    naive_count: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Merge what each tensor changed of the base, by TIES (arXiv 2306.01708, section 4).

    With delta_t = theta_t - base:

    1. Trim: keep the entries of delta_t whose magnitude is at least its k-th largest,
       k = max(1, floor(density_t * n)); equal magnitudes at the threshold are all kept.
    2. Elect: per entry, the sign of sum_t w_t * delta_t, or with `naive_count` the sign of
       sum_t sign(w_t * delta_t); zero counts as +.
    3. Merge: per entry, the sum of the w_t * delta_t that have the elected sign, divided by the sum
       of their w_t when normalising; 0 where none has it.

    Returns base + merged. Raises ValueError if the shapes differ, a density is outside (0, 1], or a
    weight is negative while normalising.
    """
    _check_same_shape([base, *tensors])
    if not all(0 < density <= 1 for density in densities):
        raise ValueError(f"ties needs densities in (0, 1], got {list(densities)}")
    if normalize and any(w < 0 for w in weights):
        raise ValueError(f"ties with negative weights {list(weights)} cannot be normalised")
    work = _work_dtype([base, *tensors])
    device = device or base.device
    flat_base = base.reshape(-1)
    flat = [t.reshape(-1) for t in tensors]
    thresholds = [
        _trim_threshold(flat_base, t, d, work, device)
        for t, d, _ in zip(flat, densities, weights, strict=True)
    ]
    if normalize and max(weights) > 0:  # by a power of two, which changes no bit of the result
        scale = 2.0 ** -math.frexp(max(weights))[1]
        weights = [w * scale for w in weights]
    if any(abs(w) > LARGEST_WEIGHT for w in weights):
        raise ValueError(f"ties needs weights up to {LARGEST_WEIGHT:g}, got {list(weights)}")
    smallest = max(min((w for w in weights if w > 0), default=1.0), torch.finfo(work).tiny)
    out = torch.empty_like(flat_base, dtype=dtype or base.dtype)
    size = _chunk_size(out.numel(), device)
    scratch = _scratch(size, work, device, 4 + len(tensors))
    ballots = _scratch(size, torch.float64, device, 2)  # float32 could turn a tie into a vote
    for chunk in _chunks(out.numel(), size):
        n = chunk.stop - chunk.start
        origin, elected, weight_sum, term, *deltas = (s[:n] for s in scratch)
        votes, ballot = (s[:n] for s in ballots)
        _load(origin, flat_base[chunk])
        for i, delta in enumerate(deltas):
            _load(delta, flat[i][chunk]).sub_(origin)
            torch.hardshrink(delta, thresholds[i], out=delta)
            vote = (ballot if i else votes).copy_(delta).mul_(weights[i])
            if naive_count:
                vote.copy_(torch.sign(vote) + vote * 0)  # an infinity has no vote, and becomes NaN
            if i:
                votes.add_(ballot)
            delta.mul_(weights[i])
        sign_bits = elected.copy_(votes).view(BITS[work]).bitwise_and_(torch.iinfo(BITS[work]).min)
        for i, delta in enumerate(deltas):
            delta.view(BITS[work]).bitwise_xor_(sign_bits)
            torch.sign(delta.relu_(), out=term)
            if i:
                weight_sum.add_(term.mul_(weights[i]))
                deltas[0].add_(delta)
            else:
                torch.mul(term, weights[0], out=weight_sum)
        merged = deltas[0]
        if normalize:
            merged.div_(weight_sum.clamp_min_(smallest))  # where none agrees, 0 by anything
        merged.view(BITS[work]).bitwise_xor_(sign_bits)
        if naive_count:
            merged.add_(votes.mul_(0))
        _store(out[chunk], merged.add_(origin))
    return out.view(base.shape)
