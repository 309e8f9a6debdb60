"""The methods of model merging, each beside its paper: tensors and numbers in, tensor out.

Each function combines the same-named tensor of several models:

    merged = ties(base, [math, code], weights=[1.0, 1.0], densities=[0.5, 0.5])

Inputs may have any shape and any floating dtype, mixed, on one device; they are never modified. The
arithmetic is done in at least float32, sums of terms that may cancel in float64, and the result is
rounded once, to `dtype`, which defaults to that of the base or the first tensor. It is on the
inputs' device; given another `device`, the arithmetic goes there, a chunk at a time. NaN and
infinities in the input reach the output.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, add_to_base, work_dtype
from merging.arithmetic.selection import trim_threshold
from merging.arithmetic.signs import disjoint_sum, elected_signs
from merging.arithmetic.sums import Gram, cosine, gram_matrix, weighted_sum
from merging.arithmetic.weights import normalized

PARALLEL = 0.9995  # |cos| above which slerp interpolates linearly
LARGEST_WEIGHT = 1e30  # of ties: in float32, larger ones would overflow


@torch.no_grad()
def linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Average the tensors: sum_i w_i theta_i, over sum_i w_i when normalising (arXiv 2203.05482).

    Weights may be negative. Raises ValueError if the shapes differ, or if normalising by weights
    whose sum is about zero.
    """
    return weighted_sum(tensors, normalized(weights) if normalize else weights, dtype, device)


@torch.no_grad()
def slerp(
    tensors: Sequence[Tensor],
    t: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Interpolate on the arc from a (t = 0) to b (t = 1), each tensor taken as one long vector.

        (sin((1-t) theta) a + sin(t theta) b) / sin(theta),   cos(theta) = a.b / (|a| |b|)

    (Shoemake 1985.) Where |cos(theta)| > 0.9995, or a norm is zero, the arc is not defined well:
    (1-t) a + t b. Raises ValueError if t is outside [0, 1], there are not two tensors, or their
    shapes differ.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"slerp needs t in [0, 1], got {t}")
    if len(tensors) != 2:
        raise ValueError(f"slerp needs two tensors, got {len(tensors)}")
    return weighted_sum(tensors, _on_the_arc(gram_matrix(tensors, device), t), dtype, device)


def _on_the_arc(gram: Gram, t: float) -> list[float]:
    cos = cosine(gram, 0, 1)
    if abs(cos) > PARALLEL or 0 in (gram[0][0], gram[1][1]):
        return [1 - t, t]
    theta = math.acos(cos)
    return [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]


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
       k = max(1, floor(density_t n)); equal magnitudes at the threshold are all kept.
    2. Elect: per entry, the sign of sum_t w_t delta_t, or with `naive_count` the sign of
       sum_t sign(w_t delta_t); zero counts as +.
    3. Merge: per entry, the sum of the w_t delta_t that have the elected sign, divided by the sum
       of their w_t when normalising; 0 where none has it.

    Returns base + merged. Raises ValueError if the shapes differ, a density is outside (0, 1], or a
    weight is negative while normalising.
    """
    if not all(0 < density <= 1 for density in densities):
        raise ValueError(f"ties needs densities in (0, 1], got {list(densities)}")
    if normalize and any(w < 0 for w in weights):
        raise ValueError(f"ties with negative weights {list(weights)} cannot be normalised")
    scaled = _in_range(weights, normalize)
    work = work_dtype([base, *tensors])
    thresholds = [
        trim_threshold(base, tensor, density, device, work)
        for tensor, density, _ in zip(tensors, densities, weights, strict=True)
    ]

    def merge(deltas: list[Tensor], scratch: Scratch) -> Tensor:
        for delta, threshold in zip(deltas, thresholds, strict=True):
            torch.hardshrink(delta, threshold, out=delta)
        signs, votes = elected_signs(deltas, scaled, naive_count, scratch)
        merged = disjoint_sum(deltas, scaled, signs, normalize, scratch)
        return merged.add_(votes.mul_(0)) if naive_count else merged  # for NaN to be seen

    return add_to_base(merge, base, tensors, dtype, device)


def _in_range(weights: Sequence[float], normalize: bool) -> Sequence[float]:
    """Return weights that float32 can compute with; what is divided by their sum stays the same."""
    if normalize and max(weights) > 0:  # by a power of two, which changes no bit of the result
        weights = [math.ldexp(w, -math.frexp(max(weights))[1]) for w in weights]
    if any(abs(w) > LARGEST_WEIGHT for w in weights):
        raise ValueError(f"ties needs weights up to {LARGEST_WEIGHT:g}, got {list(weights)}")
    return weights


@torch.no_grad()
def passthrough(
    tensors: Sequence[Tensor],
    scale: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Multiply the only tensor by a number, as a slice of a layer stack may ask for."""
    (tensor,) = tensors
    return weighted_sum([tensor], [scale], dtype, device)
