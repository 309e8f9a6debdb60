"""Sums over tensors: weighted ones, entry by entry, and dot products, over all entries."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.arithmetic.chunks import (
    SIXTEEN_BITS,
    Scratch,
    check_same_shape,
    chunk_size,
    chunks,
    load,
    load_deltas,
    store,
    work_dtype,
)
from merging.arithmetic.memory import empty_result
from merging.arithmetic.products import BLOCK, blocks, dots, listed

DIGITS = 53 - 11  # binary digits of weights of numbers that have 11

Gram = list[list[float]]


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return sum_i w_i theta_i, summed in float64 and rounded once to `dtype` (the first's).

    In float32, terms that nearly cancel would leave an error of many units in the last place of
    even a bfloat16 result; float64 costs no more time than the tricks that avoid it. Where inputs
    and output have 16 bits, weights are rounded to 42 digits: then products are exact, and it does
    not matter whether a processor rounds them before it adds them, which torch leaves open.
    """
    check_same_shape(tensors)
    device = device or tensors[0].device
    flat = [t.reshape(-1) for t in tensors]
    out = empty_result(len(flat[0]), dtype or tensors[0].dtype, tensors[0].device)
    size = chunk_size(len(out), device)
    is_exact = work_dtype(tensors, dtype) == torch.float32
    first, *others = map(_in_few_digits, weights) if is_exact else weights
    with Scratch(size, device) as scratch:
        for chunk in chunks(len(out), size):
            length = chunk.stop - chunk.start
            total, term = (scratch(name, torch.float64, length) for name in ("total", "term"))
            load(total, flat[0][chunk]).mul_(first)
            for tensor, weight in zip(flat[1:], others, strict=True):
                load(term, tensor[chunk])
                if is_exact:
                    total.add_(term, alpha=weight)
                else:
                    total.add_(term.mul_(weight))
            store(out[chunk], total)
    return out.view(tensors[0].shape)


def _in_few_digits(weight: float) -> float:
    """Round a weight so that float64 holds its products with numbers of 16 bits, of 11 digits."""
    if not 0 < abs(weight) < 1e300:  # 0, or beyond what can be rounded
        return weight
    mantissa, exponent = math.frexp(weight)
    return math.ldexp(round(math.ldexp(mantissa, DIGITS)), exponent - DIGITS)


def gram_matrix(
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Gram:
    """Return the dot products <theta_i, theta_j> of tensors taken as long vectors.

    With a base those of their differences from it. `dtype` is that of the result that is to be made
    of them: where that and all inputs have 16 bits, products are exact in float32, and its sums of
    small blocks good enough. All else takes float64, and so do those whose squares leave the range
    of float32, and those that point away from each other, where what is made of the products may
    cancel.
    """
    everything = [*tensors] if base is None else [base, *tensors]
    check_same_shape(everything)
    device = device or tensors[0].device
    flat = [t.reshape(-1) for t in everything]
    has_base = base is not None
    if {*(t.dtype for t in flat), dtype or tensors[0].dtype} <= {*SIXTEEN_BITS}:
        gram = _gram(flat, has_base, torch.float32, device)
        squares = [gram[i][i] for i in range(len(gram))]
        in_range = 1e-20 < min(squares) and max(squares) < 1e38
        if in_range and not any(cosine(gram, i, j) < -0.5 for i, j in _pairs(len(gram))):
            return gram
    return _gram(flat, has_base, torch.float64, device)


def cosine(gram: Gram, i: int, j: int) -> float:
    """Return the cosine of the angle between two of the vectors, 0 if a norm is zero."""
    norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return gram[i][j] / norms if norms != 0 else 0.0


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1)]


def exact_sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; NaN of what overflows or holds infinities of both signs."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan


def _gram(flat: Sequence[Tensor], has_base: bool, work: torch.dtype, device: torch.device) -> Gram:
    count = len(flat) - has_base
    totals = _dot_products(flat, has_base, _pairs(count), work, device)
    return [[totals[max(i, j), min(i, j)] for j in range(count)] for i in range(count)]


def squared_norms(
    base: Tensor,
    tensors: Sequence[Tensor],
    select: Callable[[list[Tensor], Scratch], None],
    device: torch.device,
) -> list[float]:
    """Return |delta_t|^2 of what `select` leaves of the deltas, which it changes, in float64."""
    flat = [t.reshape(-1) for t in (base, *tensors)]
    pairs = [(i, i) for i in range(len(tensors))]
    return [*_dot_products(flat, True, pairs, torch.float64, device, select).values()]


def _dot_products(
    flat: Sequence[Tensor],
    has_base: bool,
    pairs: Sequence[tuple[int, int]],
    work: torch.dtype,
    device: torch.device,
    select: Callable[[list[Tensor], Scratch], None] | None = None,
) -> dict[tuple[int, int], float]:
    """Return products: those of blocks in `work`, the sum of those exact.

    Blocks are of one length, so that no sum depends on threads or chunks. The first of the tensors
    may be the base of the others, which are then deltas.
    """
    size = -(-chunk_size(flat[0].numel(), device, work=work) // BLOCK) * BLOCK
    of_blocks: dict[tuple[int, int], list[Any]] = {pair: [] for pair in pairs}
    with Scratch(size, device) as scratch, np.errstate(all="ignore"):
        for chunk in chunks(flat[0].numel(), size):
            if has_base:
                parts = load_deltas(flat, chunk, work, scratch)[1:]
            else:
                length = chunk.stop - chunk.start
                parts = [load(scratch(i, work, length), t[chunk]) for i, t in enumerate(flat)]
            if select is not None:
                select(parts, scratch)
            in_blocks = [blocks(part) for part in parts]
            for (i, j), found in of_blocks.items():
                found += dots(in_blocks[i], in_blocks[j])
    return {pair: exact_sum(listed(found)) for pair, found in of_blocks.items()}


def weighted_total(deltas: Sequence[Tensor], weights: Sequence[float], scratch: Scratch) -> Tensor:
    """Return sum_t w_t delta_t of a chunk, in float64."""
    total, term = (scratch(name, torch.float64, len(deltas[0])) for name in ("total", "term"))
    total.copy_(deltas[0]).mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(term.copy_(delta).mul_(weight))
    return total
