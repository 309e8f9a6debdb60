"""Numbers that vary over a model: by the place of a tensor among the layers, and by its name.

`0,0.5,1` is 0 at the first layer, 1 at the last, and in between on the straight lines through 0.5
in the middle. `self_attn:0,1` is so only for tensors with `self_attn` in their name.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<index>\d+)\.(?P<part>.+)$")


@dataclass(frozen=True)
class Schedule:
    """The values of a number over the layers; for tensors that a filter matches, other values."""

    values: tuple[float, ...]
    filters: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def varies(self) -> bool:
        return len(self.values) > 1 or bool(self.filters)

    def every_value(self) -> set[float]:
        return {*self.values, *(value for _, values in self.filters for value in values)}

    def at(self, name: str, place: float) -> float:
        """Return the value for a tensor at a place from 0 (the first layer) to 1 (the last).

        The first filter that matches the name decides which values hold.
        """
        chosen = (values for word, values in self.filters if matches(word, name))
        return interpolate(next(chosen, self.values), place)

    def __str__(self) -> str:
        filtered = [f"{word}:{_listed(values)}" for word, values in self.filters]
        return " ".join([*filtered, _listed(self.values)])


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def parse_values(text: str) -> tuple[str | None, tuple[float, ...]]:
    """Parse `[FILTER:]NUMBER[,NUMBER...]`; ValueError if it is not that, or not finite."""
    word, _, numbers = text.rpartition(":")
    word = word.strip()
    values = tuple(float(number) for number in numbers.split(","))
    if not all(-float("inf") < value < float("inf") for value in values):
        raise ValueError
    if ":" in text and not word.strip("."):
        raise ValueError
    return word or None, values


def matches(word: str, name: str) -> bool:
    """Whether a filter is a component of a dotted name, or several that follow each other."""
    return f".{word}." in f".{name}."


def interpolate(values: Sequence[float], place: float) -> float:
    """Return what piecewise linear interpolation of evenly spaced values gives at a place."""
    position = place * (len(values) - 1)
    before = min(int(position), len(values) - 1)
    rest = position - before
    if rest == 0:
        return values[before]
    return values[before] * (1 - rest) + values[before + 1] * rest


def places(
    names: Iterable[str], before: Container[str], depth: int, beyond: int = 0
) -> dict[str, float]:
    """Map names of tensors to their places: i / (n - 1) for layer i of n, else 0 or 1.

    0 for those `before` the layers (embeddings), 1 for all others (final norm, head). Each stack of
    numbered layers (encoder, decoder, vision tower) counts its own; numbered modules that are made
    of no others, as in the two linears of a projector, are no layers. Those `beyond` the `depth` of
    a decoder, which predict more tokens, are at 1.
    """
    names = list(names)
    sizes: dict[str, int] = {}
    composite = set()
    for name in names:
        if match := NUMBERED.match(name):
            sizes[match["stack"]] = max(sizes.get(match["stack"], 0), int(match["index"]) + 1)
            if "." in match["part"]:
                composite.add(match["stack"])

    def place(name: str) -> float:
        match = NUMBERED.match(name)
        if any(part.startswith("mtp") for part in name.split(".")):
            return 1.0
        if not match or match["stack"] not in composite:
            return 0.0 if name in before else 1.0
        size = sizes[match["stack"]]
        size -= beyond if size == depth + beyond else 0
        return min(1.0, int(match["index"]) / (size - 1)) if size > 1 else 0.0

    return {name: place(name) for name in names}


def layer_values(schedule: Schedule, tensors: Mapping[str, float]) -> list[str]:
    """Say as text which values a schedule gives to how many tensors, by their places."""
    lines = []
    rest = dict(tensors)

    def add(label: str, taken: Mapping[str, float], values: Sequence[float]) -> None:
        at = sorted(set(taken.values())) if len(values) > 1 else [0.0]
        text = " ".join(f"{interpolate(values, place):.4g}" for place in at)
        lines.append(f"{label} ({len(taken)}): {text}")

    for word, values in schedule.filters:
        taken = {name: place for name, place in rest.items() if matches(word, name)}
        rest = {name: place for name, place in rest.items() if name not in taken}
        add(word, taken, values)
    if rest:
        add("the rest" if schedule.filters else "all tensors", rest, schedule.values)
    return lines
