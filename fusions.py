"""Methods that need no weights: they decide by what the models changed what to keep, and how much.

With delta_t = theta_t - base, and lambda times the result added to the base, as in task_vectors.py.
See merge_methods.py for what all functions have in common.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, add_to_base, row_length
from merging.arithmetic.combining import addition, combined
from merging.arithmetic.entries import divergences, variance, variances, weighted_magnitudes
from merging.arithmetic.selection import count_nonzero, float_below, kth_largest, quantile
from merging.arithmetic.signs import disjoint_sum, elected_signs
from merging.arithmetic.sums import squared_norms, weighted_total
from merging.arithmetic.watching import show_kept
from merging.arithmetic.weights import check_range, normalized


@torch.no_grad()
def sce(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Select where the models differ most, weigh by size of change, elect signs (2408.07990).

    1. Select: of the entries whose delta_t have a variance over the models that is not 0, the share
       `select_topk`, in [0, 1], of largest variance (equal ones all); at 1, all entries.
    2. Calculate: w_t = mean of delta_t^2 over what is selected, divided by their sum.
    3. Erase: per entry, elect the sign of sum_t delta_t; add the w_t delta_t that have it, divided
       by the sum of their w_t; 0 where none has it.

    Returns base + lambda merged. Raises ValueError for fewer than two tensors.
    """
    check_range([select_topk], "select_topk in [0, 1]", lambda share: 0 <= share <= 1)
    if len(tensors) < 2:
        raise ValueError(f"sce needs at least two tensors, got {len(tensors)}")
    to = device or base.device
    limit = _smallest_variance(base, tensors, select_topk, to)

    def select(deltas: list[Tensor], scratch: Scratch) -> None:
        if limit >= 0:
            selected = variance(deltas, scratch)
            torch.hardshrink(selected, limit, out=selected).sign_()
            for delta in deltas:
                delta.mul_(selected)

    squares = squared_norms(base, tensors, select, to)
    weights = [1 / len(squares)] * len(squares)
    if sum(squares) > 0:  # what is not finite is so in the deltas too, and reaches the result
        weights = normalized(squares) if math.isfinite(sum(squares)) else [math.nan] * len(squares)

    def merge(deltas: list[Tensor], part: slice, scratch: Scratch) -> Tensor:
        select(deltas, scratch)
        show_kept(deltas)
        signs = elected_signs(deltas, [1.0] * len(deltas), False, scratch)
        return disjoint_sum(deltas, weights, signs, True, scratch)

    work = torch.float64  # in which variances that are 0 are 0
    return add_to_base(merge, base, tensors, lambda_, dtype, device, work=work)


def _smallest_variance(
    base: Tensor, tensors: Sequence[Tensor], share: float, device: torch.device
) -> float:
    """Return the number above which variances are selected; -1 if all entries are."""
    if share == 1 or base.numel() == 0:
        return -1.0
    entries = variances(base, tensors, device)
    k = math.floor(share * count_nonzero(entries))
    return float_below(kth_largest(entries, k), torch.float64) if k else math.inf


@torch.no_grad()
def ram(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    epsilon: float = 1e-5,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Take what one model changed as a whole, what several changed as their mean (2601.13572).

    An entry is changed by a model if |delta_t| > epsilon. Returns base + lambda times the sum of
    the changes, over the number of the models that made one (Reinforced Agent Merging, arXiv).
    """
    return _ram(base, tensors, epsilon, [1.0] * len(tensors), lambda_, dtype, device)


@torch.no_grad()
def ramplus_tl(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Merge as ram does, with more of what a model alone changed (RAM+, arXiv 2601.13572).

    That is multiplied by 1 + r min(alpha, shared_t / unique_t), of the numbers of entries that the
    model changed beside others and alone, in this tensor.
    """
    scales = [
        1 + r * min(alpha, shared / unique if unique else alpha)
        for unique, shared in _unique_and_shared(base, tensors, epsilon, device)
    ]
    return _ram(base, tensors, epsilon, scales, lambda_, dtype, device)


def _ram(
    base: Tensor,
    tensors: Sequence[Tensor],
    epsilon: float,
    scales: Sequence[float],
    lambda_: float,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Tensor:
    check_range([epsilon], "an epsilon of at least 0", lambda number: number >= 0)

    def merge(deltas: list[Tensor], part: slice, scratch: Scratch) -> Tensor:
        count = _keep_changed(deltas, epsilon)
        show_kept(deltas)
        mean = weighted_total(deltas, [1.0] * len(deltas), scratch).div_(count.clamp_min(1))
        if any(scale != 1 for scale in scales):
            more = sum(d.mul_(s - 1) for d, s in zip(deltas, scales, strict=True))
            mean.add_(more * count.eq_(1))
        return mean

    return add_to_base(merge, base, tensors, lambda_, dtype, device, work=torch.float64)


def _keep_changed(deltas: Sequence[Tensor], epsilon: float) -> Tensor:
    """Make zeros of what is not changed; return how many models changed each entry."""
    count = torch.zeros_like(deltas[0])
    for delta in deltas:
        torch.hardshrink(delta, epsilon, out=delta)
        count.add_(delta.sign().abs_())
    return count


def _unique_and_shared(
    base: Tensor, tensors: Sequence[Tensor], epsilon: float, device: torch.device | None
) -> list[tuple[int, int]]:
    """Return how many entries each model changed alone, and how many beside others."""
    counts = [torch.zeros(2, dtype=torch.int64, device=device or base.device) for _ in tensors]

    def count(deltas: list[Tensor], part: slice, scratch: Scratch) -> Tensor:
        models = _keep_changed(deltas, epsilon)
        alone = models.eq(1)
        for found, delta in zip(counts, deltas, strict=True):
            changed = delta.ne(0)
            unique = (changed & alone).sum()
            found.add_(torch.stack([unique, changed.sum() - unique]))
        return deltas[0]

    add_to_base(count, base, tensors, 1, base.dtype, device, work=torch.float64)
    return [(int(unique), int(shared)) for unique, shared in counts]


@torch.no_grad()
def nearswap(
    base: Tensor,
    tensors: Sequence[Tensor],
    t: float,
    *,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Move the base towards the only other tensor, by at most t >= 0 in each entry.

    base + lambda min(max(delta, -t), t) (the model card of QuartetAnemoi-70B).
    """
    check_range([t], "a t of at least 0", lambda number: number >= 0)
    _the_only(tensors, "nearswap")

    def limit(_: int, delta: Tensor, part: slice, scratch: Scratch) -> None:
        delta.clamp_(-t, t)

    return combined(base, tensors, limit, addition([1.0], False), lambda_, dtype, device)


@torch.no_grad()
def arcee_fusion(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Take the most important changes of the only other tensor (Arcee Fusion, Arcee 2025).

    The importance of an entry is |delta| KL(softmax(row of theta) || softmax(row of base)), rows
    being those of the last dimension. Kept are those of at least median + 1.5 (Q3 - Q1) of all, the
    quartiles interpolated between order statistics. Returns base + lambda times what is kept.
    """
    tensor = _the_only(tensors, "arcee_fusion")
    to, length = device or base.device, row_length(base)
    if base.numel() == 0:
        return torch.empty_like(base, dtype=dtype or base.dtype)
    of_rows = divergences(base, tensor, to)
    entries = weighted_magnitudes(base, tensor, of_rows, to)
    quarter, median, three = (quantile(entries, share) for share in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (three - quarter)

    def keep(_: int, delta: Tensor, part: slice, scratch: Scratch) -> None:
        rows = of_rows[part.start // length : -(-part.stop // length)]
        if limit > 0:
            importance = torch.abs(delta, out=scratch("importance", delta.dtype, len(delta)))
            importance.view(-1, length).mul_(rows[:, None])
            torch.hardshrink(importance, float_below(limit, delta.dtype), out=importance)
            delta.mul_(importance.sign_())

    work, add = torch.float64, addition([1.0], False)
    return combined(base, tensors, keep, add, lambda_, dtype, device, whole_rows=True, work=work)


def _the_only(tensors: Sequence[Tensor], method: str) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(f"{method} needs one tensor besides the base, got {len(tensors)}")
    return tensors[0]
