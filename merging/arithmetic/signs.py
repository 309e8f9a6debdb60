"""Elections of signs, and sums of those that won, entry by entry and without a branch.

A sign is the sign bit of a float of the same width, alone: `xor` with it makes what has the sign
positive and what has the other negative, and back again, as a product with 1 or -1 would.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import BITS, Scratch


def elected_signs(
    deltas: Sequence[Tensor], weights: Sequence[float], naive_count: bool, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return the sign bits of sum_t w_t delta_t, or with `naive_count` of sum_t sign(w_t delta_t).

    Zero counts as +. And the sums: in float64, as float32 could turn a tie into a vote.
    """
    work, length = deltas[0].dtype, len(deltas[0])
    votes = scratch("votes", torch.float64, length)
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        vote = scratch("ballot", torch.float64, length) if i else votes
        vote.copy_(delta).mul_(weight)
        if naive_count:
            vote.copy_(torch.sign(vote) + vote * 0)  # an infinity has no vote, and becomes NaN
        if i:
            votes.add_(vote)
    sign_bit = torch.iinfo(BITS[work]).min
    signs = scratch("signs", work, length).copy_(votes).view(BITS[work]).bitwise_and_(sign_bit)
    return signs, votes


def disjoint_sum(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    signs: Tensor,
    normalize: bool,
    scratch: Scratch,
) -> Tensor:
    """Return sum_t w_t delta_t over those that have the elected sign, which changes the deltas.

    With `normalize` it is divided by the sum of their w_t, which must not be negative; 0 where none
    has the sign.
    """
    work, length = deltas[0].dtype, len(deltas[0])
    weight_sum, term = (scratch(name, work, length) for name in ("weight sum", "term"))
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        delta.mul_(weight).view(BITS[work]).bitwise_xor_(signs)
        torch.sign(delta.relu_(), out=term)
        if i:
            weight_sum.add_(term.mul_(weight))
            deltas[0].add_(delta)
        else:
            torch.mul(term, weight, out=weight_sum)
    merged = deltas[0]
    if normalize:
        smallest = min((w for w in weights if w > 0), default=1.0)
        # Where none agrees, 0 divided by anything.
        merged.div_(weight_sum.clamp_min_(max(smallest, torch.finfo(work).tiny)))
    merged.view(BITS[work]).bitwise_xor_(signs)
    return merged
