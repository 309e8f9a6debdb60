"""Sums over tensors: weighted ones, entry by entry, and dot products, over all entries."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, check_same_shape, chunk_size, chunks, load, store

DOT_BLOCK = 1 << 12  # elements: so few that torch sums them on one thread, always in one order
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

Gram = list[list[float]]


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return sum_i w_i theta_i, summed in float64 and rounded once to `dtype` (the first's).

    In float32, terms that nearly cancel would leave an error of many units in the last place of
    even a bfloat16 result; float64 costs no more time than the tricks that avoid it.
    """
    check_same_shape(tensors)
    device = device or tensors[0].device
    flat = [t.reshape(-1) for t in tensors]
    out = torch.empty_like(flat[0], dtype=dtype or tensors[0].dtype)
    size = chunk_size(out.numel(), device)
    scratch = Scratch(size, device)
    for chunk in chunks(out.numel(), size):
        length = chunk.stop - chunk.start
        total, term = (scratch(name, torch.float64, length) for name in ("total", "term"))
        load(total, flat[0][chunk]).mul_(weights[0])
        for tensor, weight in zip(flat[1:], weights[1:], strict=True):
            total.add_(load(term, tensor[chunk]).mul_(weight))
        store(out[chunk], total)
    return out.view(tensors[0].shape)


def gram_matrix(tensors: Sequence[Tensor], device: torch.device | None = None) -> Gram:
    """Return the dot products <theta_i, theta_j> of tensors taken as long vectors.

    Products of 16-bit floats are exact in float32, and its sums of small blocks good enough. Other
    inputs take float64, and so do those whose squares leave the range of float32, and those that
    point away from each other, where what is made of the products may cancel.
    """
    check_same_shape(tensors)
    device = device or tensors[0].device
    flat = [t.reshape(-1) for t in tensors]
    if all(t.dtype in SIXTEEN_BITS for t in tensors):
        gram = _dot_products(flat, torch.float32, device)
        squares = [gram[i][i] for i in range(len(gram))]
        in_range = 1e-20 < min(squares) and max(squares) < 1e38
        if in_range and not any(cosine(gram, i, j) < -0.5 for i, j in _pairs(len(gram))):
            return gram
    return _dot_products(flat, torch.float64, device)


def cosine(gram: Gram, i: int, j: int) -> float:
    """Return the cosine of the angle between two of the vectors, 0 if a norm is zero."""
    norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return gram[i][j] / norms if norms != 0 else 0.0


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1)]


def _exact_sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; NaN of what overflows or holds infinities of both signs."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan


def _dot_products(flat: Sequence[Tensor], work: torch.dtype, device: torch.device) -> Gram:
    """Return all products: those of entries and sums of blocks in `work`, the sum of those exact.

    Blocks are of one size, so that no sum depends on threads or chunks.
    """
    count = len(flat)
    pairs = _pairs(count)
    blocks = max(1, -(-chunk_size(flat[0].numel(), device) // DOT_BLOCK))
    scratch = Scratch(blocks * DOT_BLOCK, device)
    sums = [[torch.zeros(1, dtype=work, device=device)] for _ in pairs]
    for chunk in chunks(flat[0].numel(), scratch.size):
        length = chunk.stop - chunk.start
        parts = [scratch(i, work) for i in range(count)]
        for part, tensor in zip(parts, flat, strict=True):
            load(part[:length], tensor[chunk])
            part[length:].zero_()
        product = scratch("product", work)
        for (i, j), of_pair in zip(pairs, sums, strict=True):
            torch.mul(parts[i], parts[j], out=product)
            of_pair.append(product.view(blocks, DOT_BLOCK).sum(1))
    totals = {
        pair: _exact_sum(torch.cat(of_pair).tolist())
        for pair, of_pair in zip(pairs, sums, strict=True)
    }
    return [[totals[max(i, j), min(i, j)] for j in range(count)] for i in range(count)]
