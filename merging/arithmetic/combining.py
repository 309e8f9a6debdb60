"""Combine sparsified changes, and add what comes out to the base."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, add_to_base
from merging.arithmetic.signs import disjoint_sum, elected_signs
from merging.arithmetic.sums import weighted_total
from merging.arithmetic.watching import show_kept
from merging.arithmetic.weights import LARGEST_WEIGHT, normalized

# Makes zeros of what is not kept of the delta of model t, in place, given the place of the chunk.
Sparsify = Callable[[int, Tensor, slice, Scratch], None]
# Makes one change of the deltas of a chunk, which it may change.
Combine = Callable[[list[Tensor], Scratch], Tensor]


def combined(
    base: Tensor,
    tensors: Sequence[Tensor],
    sparsify: Sparsify,
    combine: Combine,
    lambda_: float,
    dtype: torch.dtype | None,
    device: torch.device | None,
    *,
    whole_rows: bool = False,
    work: torch.dtype | None = None,
    keeps_infinities: bool = False,
) -> Tensor:
    """Return base + lambda combine(sparsify(delta_t)), rounded once.

    Where NaN and infinities might be dropped on the way, they are looked for before.
    """

    def merge(deltas: list[Tensor], part: slice, scratch: Scratch) -> Tensor:
        nothing = [] if keeps_infinities else [_zero_if_finite(delta) for delta in deltas]
        for t, delta in enumerate(deltas):
            sparsify(t, delta, part, scratch)
        show_kept(deltas)
        merged = combine(deltas, scratch)
        return merged.add_(sum(nothing)) if nothing else merged

    return add_to_base(merge, base, tensors, lambda_, dtype, device, whole_rows, work)


def _zero_if_finite(delta: Tensor) -> Tensor:
    """Return 0, or NaN if any entry is NaN or infinite; without waiting for a device."""
    smallest, largest = torch.aminmax(delta)
    return smallest * 0 + largest * 0


def addition(weights: Sequence[float], normalize: bool) -> Combine:
    """Return what computes sum_t w_t delta_t, over sum_t w_t when normalising."""
    factors = normalized(weights) if normalize else weights
    return lambda deltas, scratch: weighted_total(deltas, factors, scratch)


def election(weights: Sequence[float], normalize: bool, naive_count: bool = False) -> Combine:
    """Return what elects a sign per entry, and computes the sum of the w_t delta_t that have it.

    The sign is that of sum_t w_t delta_t, or with `naive_count` of sum_t sign(w_t delta_t); zero
    counts as +. The sum is divided by that of the w_t of those that have it when normalising, and 0
    where none has.
    """
    if normalize and any(w < 0 for w in weights):
        raise ValueError(f"negative weights {list(weights)} cannot be normalised after an election")
    scaled = _in_range(weights, normalize)

    def elect(deltas: list[Tensor], scratch: Scratch) -> Tensor:
        signs = elected_signs(deltas, scaled, naive_count, scratch)
        return disjoint_sum(deltas, scaled, signs, normalize, scratch)

    return elect


def _in_range(weights: Sequence[float], normalize: bool) -> Sequence[float]:
    """Return weights that float32 can compute with; what is divided by their sum stays the same."""
    if normalize and max(weights) > 0:  # by a power of two, which changes no bit of the result
        weights = [math.ldexp(w, -math.frexp(max(weights))[1]) for w in weights]
    if any(abs(w) > LARGEST_WEIGHT for w in weights):
        raise ValueError(f"elections need weights up to {LARGEST_WEIGHT:g}, got {list(weights)}")
    return weights
