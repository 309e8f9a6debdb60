"""Weights that are to be divided by their sum. Loads no torch."""

import math
from collections.abc import Sequence


def normalized(weights: Sequence[float]) -> list[float]:
    """Return w_i / sum_j w_j. ValueError if the sum is about zero, compared with their sizes."""
    total = sum(weights)
    if not abs(total) > 1e-6 * sum(abs(w) for w in weights) or math.isinf(total):
        raise ValueError(f"weights {list(weights)} sum to {total:g} and cannot be normalised")
    return [w / total for w in weights]
