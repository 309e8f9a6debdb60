"""Methods that add to a base what others changed of it: base + lambda combine(sparsify(delta_t)).

With delta_t = theta_t - base, entry by entry: `sparsify` keeps some entries of each change, and
`combine` adds the w_t delta_t up, or elects a sign for each entry and adds those that have it.
See merge_methods.py for what all functions have in common.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, row_length, work_dtype
from merging.arithmetic.combining import Sparsify, addition, combined, election
from merging.arithmetic.entries import magnitudes
from merging.arithmetic.masks import keep_at_random, keep_by_rank
from merging.arithmetic.selection import (
    float_below,
    float_below_rounded,
    kth_largest,
    trim_threshold,
)
from merging.arithmetic.weights import (
    are_probabilities,
    check_densities,
    check_one_each,
    check_range,
)


@torch.no_grad()
def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
    naive_count: bool = False,
    lambda_: float = 1.0,
    thresholds: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Merge what each tensor changed of the base, by TIES (arXiv 2306.01708, section 4).

    1. Trim: keep the entries of delta_t whose magnitude is at least its k-th largest,
       k = max(1, floor(density_t n)), or none of density 0; equal magnitudes at the threshold are
       all kept. Given `thresholds`, one a tensor, keep instead those that are at least that, in
       float32.
    2. Elect: per entry, the sign of sum_t w_t delta_t, or with `naive_count` the sign of
       sum_t sign(w_t delta_t); zero counts as +.
    3. Merge: per entry, the sum of the w_t delta_t that have the elected sign, divided by the sum
       of their w_t when normalising; 0 where none has it.

    Returns base + lambda merged. Raises ValueError if a density is outside [0, 1], or a weight is
    negative while normalising.
    """
    check_densities(densities)
    work = work_dtype([base, *tensors], dtype)
    if thresholds is None:
        limits = [
            trim_threshold(base, tensor, density, device, work)
            for tensor, density in zip(tensors, densities, strict=True)
        ]
    else:
        limits = [float_below_rounded(threshold, work) for threshold in thresholds]

    def trim(t: int, delta: Tensor, part: slice, scratch: Scratch) -> None:
        torch.hardshrink(delta, limits[t], out=delta)

    elect = election(weights, normalize, naive_count)
    keeps = not naive_count  # where an infinity has one vote, it can lose
    return combined(base, tensors, trim, elect, lambda_, dtype, device, keeps_infinities=keeps)


@torch.no_grad()
def dare_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    *,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Drop entries of the changes at random, rescale the others, add them up (arXiv 2311.03099).

    base + lambda sum_t w_t m_t delta_t / density_t, where m_t is 1 with the probability density_t
    in [0, 1], else 0, as a function of keys[t], an integer, and the entry's index alone. Over
    sum_t w_t when normalising; not divided by the density without `rescale`.
    """
    drop = _dropping(tensors, densities, keys, rescale)
    return combined(base, tensors, drop, addition(weights, normalize), lambda_, dtype, device)


@torch.no_grad()
def dare_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    *,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Drop entries of the changes at random as dare_linear, and merge the others as ties does.

    By the sign of their weighted sum; divided by the weights that agree when normalising.
    """
    drop = _dropping(tensors, densities, keys, rescale)
    return combined(base, tensors, drop, election(weights, normalize), lambda_, dtype, device)


def _dropping(
    tensors: Sequence[Tensor], densities: Sequence[float], keys: Sequence[int], rescale: bool
) -> Sparsify:
    check_one_each(tensors, densities, keys)
    check_densities(densities)

    def drop(t: int, delta: Tensor, part: slice, scratch: Scratch) -> None:
        keep_at_random(delta, densities[t], keys[t], part, rescale, scratch)

    return drop


@torch.no_grad()
def della_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    keys: Sequence[int],
    *,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Drop small changes more often than large ones, rescale, add up (MAGPRUNE, arXiv 2406.11617).

    An entry of delta_t is kept with a probability p that rises evenly with the rank of its
    magnitude in its row (the last dimension; a tensor of one dimension is one row), from
    density_t - epsilon_t to density_t + epsilon_t, both in (0, 1); what is kept is divided by p,
    unless not to `rescale`. Of equal magnitudes the later one has the higher rank. Whether an entry
    is kept is a function of keys[t], its index and its p alone. A density_t of 1 keeps all, one of
    0 nothing, whatever epsilon_t is. Over sum_t w_t when normalising.
    """
    prune = _pruning(tensors, densities, epsilons, keys, rescale)
    add = addition(weights, normalize)
    return combined(base, tensors, prune, add, lambda_, dtype, device, whole_rows=True)


@torch.no_grad()
def della(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    keys: Sequence[int],
    *,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Drop small changes more often than large ones as della_linear, merge the others as ties does.

    By the sign of their weighted sum; divided by the weights that agree when normalising
    (arXiv 2406.11617).
    """
    prune = _pruning(tensors, densities, epsilons, keys, rescale)
    elect = election(weights, normalize)
    return combined(base, tensors, prune, elect, lambda_, dtype, device, whole_rows=True)


def _pruning(
    tensors: Sequence[Tensor],
    densities: Sequence[float],
    epsilons: Sequence[float],
    keys: Sequence[int],
    rescale: bool,
) -> Sparsify:
    check_one_each(tensors, densities, epsilons, keys)
    check_range(epsilons, "epsilons of at least 0", lambda epsilon: epsilon >= 0)
    for density, epsilon in zip(densities, epsilons, strict=True):
        if not are_probabilities(density, epsilon):
            raise ValueError(
                f"della needs density - epsilon and density + epsilon in (0, 1), got a density of "
                f"{density} and an epsilon of {epsilon}"
            )
    length = row_length(tensors[0])

    def prune(t: int, delta: Tensor, part: slice, scratch: Scratch) -> None:
        keep_by_rank(delta, length, densities[t], epsilons[t], keys[t], part, rescale, scratch)

    return prune


@torch.no_grad()
def breadcrumbs(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Drop the largest and the smallest entries of the changes, add the others (arXiv 2312.06795).

    Of the n magnitudes of delta_t, the floor(gamma_t n) largest are dropped, and the smallest until
    floor(density_t n) are left, at least 1 unless density_t is 0; if there are too few, fewer of
    the largest are dropped. Equal magnitudes at either end are all kept. base + lambda sum_t w_t of
    what is left, over sum_t w_t when normalising.
    """
    keep = _between(base, tensors, densities, gammas, device, dtype)
    return combined(base, tensors, keep, addition(weights, normalize), lambda_, dtype, device)


@torch.no_grad()
def breadcrumbs_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Drop the largest and the smallest entries as breadcrumbs, and merge the others as ties does.

    By the sign of their weighted sum; divided by the weights that agree when normalising.
    """
    keep = _between(base, tensors, densities, gammas, device, dtype)
    return combined(base, tensors, keep, election(weights, normalize), lambda_, dtype, device)


def _between(
    base: Tensor,
    tensors: Sequence[Tensor],
    densities: Sequence[float],
    gammas: Sequence[float],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Sparsify:
    check_densities(densities)
    check_range(gammas, "gammas in [0, 1)", lambda gamma: 0 <= gamma < 1)
    work, count = work_dtype([base, *tensors], dtype), base.numel()
    bounds = []
    for tensor, density, gamma in zip(tensors, densities, gammas, strict=True):
        entries = magnitudes(base, tensor, device, work)
        if density == 0:
            bounds.append((math.inf, math.inf))
            continue
        kept = max(1, math.floor(density * count))
        above = max(0, min(math.floor(gamma * count), count - kept))
        low = float_below(kth_largest(entries, above + kept), work) if above + kept < count else 0
        bounds.append((low, kth_largest(entries, above + 1) if above else math.inf))

    def keep(t: int, delta: Tensor, part: slice, scratch: Scratch) -> None:
        low, high = bounds[t]
        torch.hardshrink(delta, low, out=delta)
        if high < math.inf:
            largest = scratch("largest", work, len(delta))
            delta.sub_(torch.hardshrink(delta, high, out=largest))

    return keep
