"""Dot products and opposed signs of chunks, the same on any number of threads."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Entries: so few that a chunk has over 500 rows, as numpy keeps other threads waiting during less.
ROW = 1 << 9
BLOCK = 1 << 12  # entries that are summed as one: so few that rounding stays small in float32


def blocks(chunk: Tensor) -> list[Any]:
    """Return a chunk as blocks of rows and as what is left of them, as `dots` takes it.

    On a processor as arrays, as numpy multiplies them several times as fast as torch.
    """
    size = chunk.numel()
    whole = size // BLOCK * BLOCK
    parts = [chunk[:whole].view(-1, BLOCK // ROW, ROW)] if whole else []
    parts += [chunk[whole:].view(1, 1, -1)] if whole < size else []
    return [part.numpy() for part in parts] if chunk.device.type == "cpu" else parts


def dots(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """Return the dot products of blocks, in their own dtype."""
    return [
        ((a * b).sum(2) if isinstance(a, Tensor) else np.vecdot(a, b)).sum(1)
        for a, b in zip(one, other, strict=True)
    ]


def listed(numbers: Sequence[Any]) -> list[float]:
    """Return the numbers of several arrays or tensors; those of a device after one wait for it."""
    if not numbers:
        return []
    if isinstance(numbers[0], Tensor):
        found: list[float] = torch.cat(list(numbers)).tolist()
        return found
    return list(np.concatenate(numbers).tolist())


def dot(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Return a dot product: of each block in its own dtype, and their sum in float64."""
    return sum(
        float(part.sum(dtype=torch.float64 if isinstance(part, Tensor) else np.float64))
        for part in dots(one, other)
    )


def count_opposed(deltas: Sequence[Tensor], scratch: Callable[..., Tensor]) -> int:
    """Return at how many entries of a chunk one of the deltas is above 0 and another below."""
    if len(deltas) < 2:
        return 0
    first, second, *rest = deltas
    size = first.numel()
    highest, lowest = (scratch(name, first.dtype, size) for name in ("highest", "lowest"))
    torch.maximum(first, second, out=highest)
    torch.minimum(first, second, out=lowest)
    for delta in rest:
        torch.maximum(highest, delta, out=highest)
        torch.minimum(lowest, delta, out=lowest)
    if highest.device.type == "cpu":
        return int(np.count_nonzero((highest.numpy() > 0) & (lowest.numpy() < 0)))
    return int(((highest > 0) & (lowest < 0)).sum())
