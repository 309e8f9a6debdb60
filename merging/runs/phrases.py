"""Numbers, lists and places in words."""

import math
from collections.abc import Sequence

from merging.models.kinds import Layer


def percent(share: float) -> str:
    """Return a share in percent, with two digits that count."""
    value = 100 * share
    if abs(value) < 99.5:
        value = float(f"{value:.2g}")
    if value and abs(value) < 0.001:
        return "under 0.001 %"
    digits = max(0, 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 3)}f} %"


def decimal(value: float, digits: int) -> str:
    """Return a number with so many digits after the point, and no minus before zeros."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def times(factor: float) -> str:
    return f"{factor:.0f} times" if factor >= 9.5 else f"{factor:.2g} times"


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def place(kind: str, layers: Sequence[Layer | None], is_all: bool = False) -> str:
    """Return the words for a kind of tensor in layers that follow each other, or in all."""
    first, last = layers[0], layers[-1]
    if first is None or last is None:
        return f"the {kind}" if kind in ("embedding", "head") else f"the {kind} outside of layers"
    several = "s" if len(layers) > 1 else ""
    what = {"MLP": f"MLP{several}", "other": "other tensors"}.get(kind, kind)
    stack = f"{first.stack} " if first.stack else ""
    if is_all:
        return f"the {what} of all {stack}layers"
    numbers = f"{first.number} to {last.number}" if several else str(first.number)
    return f"the {what} of {stack}layer{several} {numbers}"
