"""Numbers that vary over a model: by the place of a tensor among the layers, and by its name.

`0,0.5,1` is 0 at the first layer, 1 at the last, and in between on the straight lines through 0.5
in the middle. `self_attn:0,1` is so only for tensors with `self_attn` in their name.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The values of a number over the layers; for tensors that a filter matches, other values.

    Without `values` there is none for tensors that no filter matches.
    """

    values: tuple[float, ...]
    filters: tuple[tuple[str, tuple[float, ...]], ...] = ()
    anywhere: bool = False  # whether filters match any part of a name, or whole components only

    @property
    def varies(self) -> bool:
        return len(self.values) > 1 or bool(self.filters)

    def every_value(self) -> set[float]:
        return {*self.values, *(value for _, values in self.filters for value in values)}

    def matches(self, word: str, name: str) -> bool:
        """Whether a filter matches a dotted name."""
        return matches(word, name, self.anywhere)

    def at(self, name: str, place: float) -> float | None:
        """Return the value for a tensor at a place from 0 (the first layer) to 1 (the last).

        The first filter that matches the name decides which values hold.
        """
        chosen = (values for word, values in self.filters if self.matches(word, name))
        values = next(chosen, self.values)
        return interpolate(values, place) if values else None

    def __str__(self) -> str:
        filtered = [f"{word}:{_listed(values)}" for word, values in self.filters]
        return " ".join([*filtered, *([_listed(self.values)] if self.values else [])])


@dataclass(frozen=True)
class Factors:
    """A factor for all tensors, or one for each of several modules: nested ones multiply."""

    factors: float | Mapping[str, float] = 1.0

    def at(self, name: str, place: float = 0.0) -> float:
        if not isinstance(self.factors, Mapping):
            return float(self.factors)
        parts = name.split(".")
        return math.prod(float(f) for module, f in self.factors.items() if module in parts)

    def __str__(self) -> str:
        return str(self.factors)


def is_too_small(number: float) -> bool:
    """Whether a number has fewer digits than others, and its inverse none."""
    return 0 < abs(number) < sys.float_info.min


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def parse_values(text: str) -> tuple[str | None, tuple[float, ...]]:
    """Parse `[FILTER:]NUMBER[,NUMBER...]`; ValueError if it is not that, or not finite."""
    word, _, numbers = text.rpartition(":")
    word = word.strip()
    values = tuple(float(number) for number in numbers.split(","))
    if not all(map(math.isfinite, values)) or (":" in text and not word.strip(".")):
        raise ValueError
    return word or None, values


def matches(word: str, name: str, anywhere: bool = False) -> bool:
    """Whether a filter is a component of a dotted name, or several that follow each other.

    Or `anywhere` in it; a dot before or behind the word stands for the name's beginning or end too.
    """
    return (word if anywhere else f".{word}.") in f".{name}."


def interpolate(values: Sequence[float], place: float) -> float:
    """Return what piecewise linear interpolation of evenly spaced values gives at a place."""
    position = place * (len(values) - 1)
    before = min(int(position), len(values) - 1)
    rest = position - before
    if rest == 0:
        return values[before]
    return values[before] * (1 - rest) + values[before + 1] * rest


def values_by_place(schedule: Schedule, places: Mapping[str, float]) -> list[str]:
    """Say as text which values a schedule gives to how many tensors, from first layer to last."""
    lines = []
    rest = dict(places)

    def add(label: str, taken: Mapping[str, float], values: Sequence[float]) -> None:
        at = sorted(set(taken.values())) if len(values) > 1 else [0.0]
        text = " ".join(f"{interpolate(values, place):.4g}" for place in at)
        lines.append(f"{label} ({len(taken)}): {text}")

    for word, values in schedule.filters:
        taken = {name: place for name, place in rest.items() if schedule.matches(word, name)}
        rest = {name: place for name, place in rest.items() if name not in taken}
        add(word, taken, values)
    if rest and schedule.values:
        add("the rest" if schedule.filters else "all tensors", rest, schedule.values)
    return lines
