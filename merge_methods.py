"""The methods of model merging, each beside its paper: tensors and numbers in, tensor out.

Each function combines the same-named tensor of several models:

    merged = ties(base, [math, code], weights=[1.0, 1.0], densities=[0.5, 0.5])

Two families: weighted sums of the tensors (`weighted_sums.py`), and what is made of their changes
to a base, entry by entry, by weights (`task_vectors.py`) or without (`fusions.py`).

Inputs may have any shape and any floating dtype, mixed, on one device; they are never modified. The
arithmetic is done in float32 where inputs and output have 16 bits, else in float64, sums of terms
that may cancel in float64, and the result is rounded once, to `dtype`, which defaults to that of
the base or the first tensor. It is on the inputs' device; given another `device`, the arithmetic
goes there, a chunk at a time. NaN and infinities in the input reach the output. Raises ValueError
for tensors of different shapes and numbers outside their range, and Undefined, a ValueError too,
where a method has no result for these tensors.
"""

from fusions import arcee_fusion, nearswap, ram, ramplus_tl, sce
from merging.arithmetic.weights import Undefined
from task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    ties,
)
from weighted_sums import (
    karcher,
    linear,
    model_stock,
    multislerp,
    nuslerp,
    passthrough,
    slerp,
    task_arithmetic,
)

__all__ = [
    "Undefined", "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties",
    "della", "della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap",
    "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
]  # fmt: skip
