"""Numbers of methods: their ranges, and weights divided by their sum. Loads no torch."""

import math
from collections.abc import Callable, Sequence

LARGEST_WEIGHT = 1e30  # of elections: in float32, larger ones would overflow


class Undefined(ValueError):
    """A method has no result for these tensors."""


def normalized(weights: Sequence[float]) -> list[float]:
    """Return w_i / sum_j w_j. ValueError if the sum is about zero, compared with their sizes."""
    total = sum(weights)
    if not abs(total) > 1e-6 * sum(abs(w) for w in weights) or math.isinf(total):
        raise ValueError(f"weights {list(weights)} sum to {total:g} and cannot be normalised")
    return [w / total for w in weights]


def are_probabilities(density: float, epsilon: float) -> bool:
    """Whether density - epsilon and density + epsilon are in (0, 1), as della needs it.

    Or the density is 0, where nothing is kept, or 1, where all is.
    """
    return density in {0, 1} or 0 < density - epsilon <= density + epsilon < 1


def check_densities(densities: Sequence[float]) -> None:
    check_range(densities, "densities in [0, 1]", lambda density: 0 <= density <= 1)


def check_range(values: Sequence[float], expected: str, allows: Callable[[float], bool]) -> None:
    """Raise ValueError if a value is not allowed, with what was expected."""
    if not all(map(allows, values)):
        raise ValueError(f"expected {expected}, got {list(values)}")


def check_one_each(tensors: Sequence[object], *numbers: Sequence[float]) -> None:
    """Raise ValueError unless there is one number of each kind for each tensor."""
    if any(len(of_kind) != len(tensors) for of_kind in numbers):
        counts = ", ".join(str(len(of_kind)) for of_kind in numbers)
        raise ValueError(f"expected numbers for {len(tensors)} tensors, one for each, got {counts}")
