"""The tensor maths of model merging: linear, slerp and ties. Tensors and numbers in, tensor out.

Each function combines the same-named tensor of several models:

    merged = ties(base, [math, code], weights=[1.0, 1.0], densities=[0.5, 0.5])

Inputs may have any shape and any floating dtype, mixed, on one device; they are never modified. The
arithmetic is done in at least float32, sums of terms that may cancel in float64, and the result is
rounded to `dtype`, which defaults to the dtype of the first tensor (of the base, for ties).

Work goes through the flattened tensors in chunks, so that only a few megabytes are needed besides
the result. Every step is element by element, or a count of integers, or a sum over blocks of fixed
size, so the size of the chunks does not change a bit of the result. NaN and infinities in the input
reach the output.
"""

import math
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CPU_CHUNK = 1 << 18  # elements: a dozen scratch tensors of this size stay near the cache
COUNT_CHUNK = 1 << 19  # elements: larger, as each chunk's counts take time to add
SMALL = 1 << 15  # elements: so few that selecting is faster than counting
DIGITS = 1 << 16  # values of the 16 bits that are counted at a time
DEVICE_CHUNK = 1 << 24  # elements: enough to keep an accelerator busy between kernel launches
DOT_BLOCK = 1 << 14  # elements: so few that torch sums them on one thread, always in one order
PARALLEL_THRESHOLD = 0.9995  # |cos| above which slerp interpolates linearly


def _work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_same_shape(tensors: Sequence[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"expected tensors of one shape, got {shapes}")


def _chunk_size(tensor: Tensor) -> int:
    """Return how many entries to take at once: more with more threads, each with its share."""
    if tensor.device.type == "cpu":
        return min(tensor.numel(), CPU_CHUNK * torch.get_num_threads())
    return min(tensor.numel(), DEVICE_CHUNK)


def _chunks(tensor: Tensor) -> Iterator[slice]:
    size = _chunk_size(tensor)
    return (slice(start, start + size) for start in range(0, tensor.numel(), size or 1))


def _scratch(like: Tensor, work: torch.dtype, count: int) -> list[Tensor]:
    """Return `count` uninitialised buffers of `like`'s largest chunk."""
    size = _chunk_size(like)
    return [torch.empty(size, dtype=work, device=like.device) for _ in range(count)]


def _weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype | None
) -> Tensor:
    """Return the sum of weights[i] * tensors[i], summed in float64.

    In float32, terms that nearly cancel would leave an error of many units in the last place of
    even a bfloat16 result; float64 costs no more time than the tricks that avoid it.
    """
    flat = [t.reshape(-1) for t in tensors]
    out = torch.empty(flat[0].numel(), dtype=dtype or tensors[0].dtype, device=flat[0].device)
    scratch = _scratch(out, torch.float64, 2)
    for chunk in _chunks(out):
        total, term = (s[: out[chunk].numel()] for s in scratch)
        for i, (tensor, weight) in enumerate(zip(flat, weights, strict=True)):
            if i == 0:
                total.copy_(tensor[chunk]).mul_(weight)
            else:
                total.add_(term.copy_(tensor[chunk]).mul_(weight))
        out[chunk].copy_(total)
    return out.view(tensors[0].shape)


def linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Average the tensors: sum_i w_i * theta_i, over sum_i w_i when normalising (arXiv 2203.05482).

    Weights may be negative. Raises ValueError if the shapes differ, or if normalising by weights
    whose sum is about zero.
    """
    _check_same_shape(tensors)
    if normalize:
        total = check_normalizable(weights)
        weights = [w / total for w in weights]
    return _weighted_sum(tensors, weights, dtype)


def check_normalizable(weights: Sequence[float]) -> float:
    """Return the sum of the weights; ValueError if it is about zero, compared with their sizes."""
    total = sum(weights)
    if not abs(total) > 1e-6 * sum(abs(w) for w in weights) or math.isinf(total):
        raise ValueError(f"weights {list(weights)} sum to {total:g} and cannot be normalised")
    return total


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two flat tensors, 0 if a norm is zero; float64 sums of fixed blocks."""
    if a.numel() == 0:
        return 0.0
    blocks = -(-_chunk_size(a) // DOT_BLOCK)
    chunk_a, chunk_b, product = (
        torch.empty(blocks * DOT_BLOCK, dtype=torch.float64, device=a.device) for _ in range(3)
    )
    sums: list[list[float]] = [[], [], []]
    for start in range(0, a.numel(), len(product)):
        n = min(len(product), a.numel() - start)
        for chunk, tensor in ((chunk_a, a), (chunk_b, b)):
            chunk[:n].copy_(tensor[start : start + n])
            chunk[n:].zero_()
        pairs = ((chunk_a, chunk_a), (chunk_a, chunk_b), (chunk_b, chunk_b))
        for total, (x, y) in zip(sums, pairs, strict=True):
            total += torch.mul(x, y, out=product).view(blocks, DOT_BLOCK).sum(1).tolist()
    aa, ab, bb = map(math.fsum, sums)
    norms = math.sqrt(aa) * math.sqrt(bb)
    return ab / norms if norms != 0 else 0.0


def slerp(a: Tensor, b: Tensor, t: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Interpolate on the arc from a (t = 0) to b (t = 1), each tensor taken as one long vector.

        (sin((1-t) theta) * a + sin(t theta) * b) / sin(theta),   cos(theta) = a.b / (|a| |b|)

    (Shoemake 1985.) Where |cos(theta)| > 0.9995, or a norm is zero, the arc is not defined well:
    (1-t) * a + t * b. Raises ValueError if t is outside [0, 1] or the shapes differ.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"slerp needs t in [0, 1], got {t}")
    _check_same_shape([a, b])
    cosine = _cosine(a.reshape(-1), b.reshape(-1))
    if abs(cosine) > PARALLEL_THRESHOLD or cosine == 0 and not (a.any() and b.any()):
        weights = [1 - t, t]
    else:
        theta = math.acos(cosine)
        weights = [
            math.sin((1 - t) * theta) / math.sin(theta),
            math.sin(t * theta) / math.sin(theta),
        ]
    return _weighted_sum([a, b], weights, dtype)


def _kth_largest_magnitude(base: Tensor, tensor: Tensor, k: int) -> float:
    """Return the k-th largest |tensor - base|, exactly, of two flat tensors.

    The bits of a float that is not negative are ordered like its value, so the answer is found 16
    bits at a time: count how often each value of the upper bits occurs, see in which the k-th
    largest lies, and go on with the next bits of the entries that share them.
    """
    work = _work_dtype([base, tensor])
    if base.numel() <= SMALL:
        magnitudes = (tensor.to(work) - base.to(work)).abs_()
        return float(magnitudes.kthvalue(base.numel() - k + 1).values)
    bits_dtype, width = (torch.int64, 64) if work == torch.float64 else (torch.int32, 32)
    size = min(base.numel(), COUNT_CHUNK if base.device.type == "cpu" else DEVICE_CHUNK)
    delta, other = (torch.empty(size, dtype=work, device=base.device) for _ in range(2))
    prefix = 0
    for shift in range(width - 16, -1, -16):
        # Digits are counted from 1, and all that is below or above them as 0 and DIGITS + 1.
        counts = torch.zeros(DIGITS + 2, dtype=torch.int64, device=base.device)
        for start in range(0, base.numel(), size):
            chunk = slice(start, start + size)
            n = base[chunk].numel()
            delta[:n].copy_(tensor[chunk]).sub_(other[:n].copy_(base[chunk])).abs_()
            digits = delta[:n].view(bits_dtype).bitwise_right_shift_(shift)
            digits.sub_((prefix << 16) - 1).clamp_(0, DIGITS + 1)
            counts += torch.bincount(digits, minlength=DIGITS + 2)
        at_least = counts[1:-1].flip(0).cumsum(0)  # entries with this digit, from the top, or above
        place = int(torch.searchsorted(at_least, k))
        k -= int(at_least[place - 1]) if place else 0
        prefix = prefix << 16 | DIGITS - 1 - place
    code = "<d" if width == 64 else "<f"
    return float(struct.unpack(code, prefix.to_bytes(width // 8, "little"))[0])


def _trim_threshold(base: Tensor, tensor: Tensor, density: float) -> float:
    """Return the largest float below the k-th largest |delta|, k = max(1, floor(density * n))."""
    k = max(1, math.floor(density * base.numel()))
    if k >= base.numel():
        return 0.0
    kth = torch.tensor(_kth_largest_magnitude(base, tensor, k), dtype=_work_dtype([base, tensor]))
    return float(torch.nextafter(kth, torch.zeros_like(kth)))


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
    naive_count: bool = False,
    dtype: torch.dtype | None = None,
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
    flat_base = base.reshape(-1)
    flat = [t.reshape(-1) for t in tensors]
    thresholds = [_trim_threshold(flat_base, t, d) for t, d in zip(flat, densities, strict=True)]
    out = torch.empty(base.numel(), dtype=dtype or base.dtype, device=base.device)
    scratch = _scratch(out, work, 5 + len(tensors))
    ballots = _scratch(out, torch.float64, 2)  # float32 rounding could turn a tie into a vote
    for chunk in _chunks(out):
        origin, elected, term, merged, weight_sum, *deltas = (
            s[: out[chunk].numel()] for s in scratch
        )
        votes, ballot = (s[: out[chunk].numel()] for s in ballots)
        origin.copy_(flat_base[chunk])
        votes.zero_()
        for delta, tensor, weight, threshold in zip(deltas, flat, weights, thresholds, strict=True):
            delta.copy_(tensor[chunk]).sub_(origin)
            torch.hardshrink(delta, threshold, out=delta)
            ballot.copy_(delta).mul_(weight)
            if naive_count:  # NaN, for an infinity, has no sign and stays NaN
                ballot.copy_(torch.sign(ballot) + ballot * 0)
            votes.add_(ballot)
            delta.mul_(weight)
        elected.copy_(
            torch.where(votes.isnan(), votes, votes >= 0) if naive_count else votes.ge_(0)
        )
        elected.mul_(2).sub_(1)
        merged.zero_()
        weight_sum.zero_()
        for delta, weight in zip(deltas, weights, strict=True):
            agreeing = delta.mul_(elected).relu_()
            merged.add_(agreeing)
            weight_sum.add_(torch.sign(agreeing, out=term).mul_(weight))
        if normalize:
            merged.div_(weight_sum.add_(torch.eq(weight_sum, 0, out=term)))
        out[chunk].copy_(merged.mul_(elected).add_(origin))
    return out.view(base.shape)
