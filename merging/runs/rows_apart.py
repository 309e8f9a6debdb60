"""Compute the rows of a planned tensor that its method does not: of tokens that the base lacks."""

import torch
from torch import Tensor

import merge_methods
from merging.models.tensors import OwnRows
from merging.plans.plan import PlannedTensor
from merging.problems import Problems

CHUNK = 1 << 12  # rows that are summed at a time


def with_own_rows(planned: PlannedTensor, result: Tensor) -> Tensor:
    """Return a result in which those rows are the weighted mean of the models that have them.

    Rows of padding, which no model has, are the mean of all others: so, as a next token, none of
    them is the most likely. Raises Problems if a value is not finite, with the name of its source.
    """
    for own in planned.own_rows:
        rows = _mean(own, planned.dtype) if own.sources else _mean_of_others(own, result)
        result.index_copy_(own.dim, torch.tensor(own.places), rows)
    return result


def _mean(own: OwnRows, dtype: torch.dtype) -> Tensor:
    for source in own.sources:
        source.check()
    tensors = [source.read() for source in own.sources]
    if not dtype.is_floating_point:
        return tensors[0].to(dtype)
    rows = merge_methods.linear(tensors, own.weights, dtype=dtype)
    if not torch.isfinite(rows).all():
        labels = ", ".join(source.label for source in own.sources)
        name = str(dtype).removeprefix("torch.")
        raise Problems(f"{labels}: contains NaN or infinity, or overflows {name}")
    for source in own.sources:
        source.check()
    return rows


def _mean_of_others(own: OwnRows, result: Tensor) -> Tensor:
    size = result.shape[own.dim]
    others = torch.ones(size, dtype=torch.bool)
    others[list(own.places)] = False
    total = torch.zeros((), dtype=torch.float64)
    for rows in others.nonzero().flatten().split(CHUNK):  # type: ignore[no-untyped-call]
        part = result.index_select(own.dim, rows).double()
        total = total + part.sum(own.dim, keepdim=True)
    mean = (total / max(1, int(others.sum()))).to(result.dtype)
    return mean.repeat_interleave(len(own.places), own.dim)
