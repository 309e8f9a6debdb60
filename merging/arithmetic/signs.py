"""Elections of signs, and sums of those that won, entry by entry and without a branch.

A sign is the sign bit of a float of the same width, alone: `xor` with it makes what has the sign
positive and what has the other negative, and back again, as a product with 1 or -1 would.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merging.arithmetic.chunks import BITS, Scratch


def elected_signs(
    deltas: Sequence[Tensor], weights: Sequence[float], naive_count: bool, scratch: Scratch
) -> Tensor:
    """Return the sign bits of sum_t w_t delta_t, or with `naive_count` of sum_t sign(w_t delta_t).

    Zero counts as +. The sums are in float64, as float32 could turn a tie into a vote.
    """
    work, length = deltas[0].dtype, len(deltas[0])
    on_cpu = deltas[0].device.type == "cpu"
    if len(deltas) == 2 and work == torch.float32 and on_cpu and not naive_count:
        if weights[0] > 0 and 1e-6 < weights[1] / weights[0] < 1e6:
            return _signs_of_two(deltas, weights, scratch)
    votes = scratch("votes", torch.float64, length)
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        vote = scratch("ballot", torch.float64, length) if i else votes
        vote.copy_(delta).mul_(weight)
        if naive_count:
            torch.sign(vote, out=vote)
        if i:
            votes.add_(vote)
    return _sign_bits(scratch("signs", work, length).copy_(votes))


def _sign_bits(values: Tensor) -> Tensor:
    """Make sign bits of floats, in their place."""
    bits = BITS[values.dtype]
    return values.view(bits).bitwise_and_(torch.iinfo(bits).min)


def _signs_of_two(deltas: Sequence[Tensor], weights: Sequence[float], scratch: Scratch) -> Tensor:
    """Return the same of two float32 deltas, in float32 where that is certain.

    Its delta_1 + (w_2 / w_1) delta_2 has the right sign, unless both cancel but for some last bits.
    """
    a, b = deltas
    total, size, doubtful = (scratch(name, a.dtype, len(a)) for name in ("sum", "size", "doubtful"))
    torch.add(a, b, alpha=weights[1] / weights[0], out=total)
    if weights[0] != weights[1]:
        torch.abs(total, out=size)
        torch.mul(a, 2.0**-21, out=doubtful).abs_()
        places = np.flatnonzero(size.numpy() < doubtful.numpy())  # as torch compares slowly
        if len(places):
            votes = [
                d.numpy()[places] * np.float64(w) for d, w in zip(deltas, weights, strict=True)
            ]
            total.numpy()[places] = votes[0] + votes[1]
    return _sign_bits(total)


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
    comparable = min(weights) * 1e4 > max(weights) > 0  # or little would be left of the lesser one
    if len(deltas) == 2 and normalize and work == torch.float32 and comparable:
        return _disjoint_mean_of_two(deltas, weights, signs, scratch)
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


def _disjoint_mean_of_two(
    deltas: Sequence[Tensor], weights: Sequence[float], signs: Tensor, scratch: Scratch
) -> Tensor:
    """Return the same of two deltas whose weights are positive: one of them, or their mean.

    With shares p and q of the weights, p a + q b where both have the sign, else a + b, of which one
    is zero: a + b - [both] (q a + p b).
    """
    for delta in deltas:
        delta.view(BITS[delta.dtype]).bitwise_xor_(signs)
        delta.relu_()
    a, b = deltas
    p, q = (weight / sum(weights) for weight in weights)
    both, other = (scratch(name, a.dtype, len(a)) for name in ("both", "other part"))
    torch.sign(torch.minimum(a, b, out=both), out=both)
    torch.mul(a, q, out=other).add_(b, alpha=p).mul_(both)
    merged = a.add_(b).sub_(other)
    merged.view(BITS[merged.dtype]).bitwise_xor_(signs)
    return merged
