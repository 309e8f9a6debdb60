"""Compute the rows of a planned tensor that its method does not: of tokens that the base lacks."""

import torch
from torch import Tensor

import merge_methods
from merging.plans.plan import PlannedTensor
from merging.problems import Problems


def with_own_rows(planned: PlannedTensor, result: Tensor) -> Tensor:
    """Return a result in which those rows are the weighted mean of the models that have them.

    Raises Problems if a value is not finite, with the name of its source.
    """
    for own in planned.own_rows:
        for source in own.sources:
            source.check()
        tensors = [source.read() for source in own.sources]
        if planned.dtype.is_floating_point:
            rows = merge_methods.linear(tensors, own.weights, dtype=planned.dtype)
        else:
            rows = tensors[0].to(planned.dtype)
        if planned.dtype.is_floating_point and not torch.isfinite(rows).all():
            names = ", ".join(source.label for source in own.sources)
            raise Problems(f"{names}: contains NaN or infinity, or overflows {planned.dtype}")
        result.index_copy_(own.dim, torch.tensor(own.places), rows)
        for source in own.sources:
            source.check()
    return result
