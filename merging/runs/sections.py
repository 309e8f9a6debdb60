"""What a report shows, section by section: the numbers behind its pictures and tables."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from merging.models.kinds import Layer
from merging.runs.phrases import decimal, percent
from merging.runs.report import Cell, Measured, Number, Numbers, Report

MOST_PAIRS = 6  # of models that are shown, those least alike
MOST_UNLIKE = 5  # tensors that are named
SMALL_TENSOR = 1e-4  # of a model's squared change: what has less of it is not named
OUTPUT = "output"


class Lines(NamedTuple):
    """A number from layer to layer."""

    name: str
    values: dict[Layer | None, Number]


class Panel(NamedTuple):
    """A number of each kind of tensor in each layer."""

    name: str
    values: dict[Cell, Number]


class Section(NamedTuple):
    title: str
    caption: str
    told: Callable[[float], str]  # how a number is written
    lines: Sequence[Lines] = ()  # either these
    panels: Sequence[Panel] = ()  # or these
    middle: float | None = None  # the number on whose sides the numbers are of two directions
    on_card: bool = False


def sections(report: Report) -> list[Section]:
    """Return what there is to see of a merge; what has no numbers is left out."""
    made = _of_models(report)
    if report.has_base:
        made = [*_of_changes(report), *_of_output(report)]
    filled = [
        section._replace(
            lines=[part for part in section.lines if any(_known(part.values.values()))],
            panels=[part for part in section.panels if any(_known(part.values.values()))],
        )
        for section in made
    ]
    return [section for section in filled if section.lines or section.panels]


def _known(values: Iterable[Number]) -> Iterator[bool]:
    return (value is not None for value in values)


def unlike(report: Report) -> list[tuple[Measured, str, str]]:
    """Return the tensors in which two models are least alike, with the pair and its cosine.

    Where no two models can be compared: those that one changed most, with the change.
    """
    models = range(len(report.models))
    compared = [(s, t) for s, t in combinations(models, 2) if report.total.cosine[s][t] is not None]
    found: list[tuple[float, str, Measured, str, str]] = []
    for tensor in report.tensors:
        if (own := tensor.numbers) is None:
            continue
        big = [_part(own, report.total, t) >= SMALL_TENSOR for t in models]
        for s, t in compared:
            cosine = own.cosine[s][t]
            if cosine is not None and big[s] and big[t]:
                both = f"{report.models[s]} and {report.models[t]}"
                found.append((cosine, tensor.name, tensor, both, f"cosine {decimal(cosine, 4)}"))
        for t in models:
            if not compared and (change := own.change[t]) and big[t]:
                told = f"changed by {percent(change)}"
                found.append((-change, tensor.name, tensor, report.models[t], told))
    lowest = {name: (tensor, who, told) for _, name, tensor, who, told in sorted(found)[::-1]}
    return list(lowest.values())[::-1][:MOST_UNLIKE]


def _part(own: Numbers, total: Numbers, t: int) -> float:
    """Return which part of a model's squares is in some tensors."""
    return ((own.norm[t] or 0) / (total.norm[t] or math.inf)) ** 2


def _of_changes(report: Report) -> list[Section]:
    """Return the sections on what models changed of a base."""
    output = Lines(OUTPUT, {x: found.output_change for x, found in report.by_layer.items()})
    opposed = {cell: found.opposed for cell, found in report.cells.items()}
    return [
        Section(
            "How far each model is from the base",
            "The size of a model's change, as a share of the base's weights, layer by layer.",
            percent,
            lines=[*_lines(report, lambda found, t: found.change[t]), output],
            on_card=True,
        ),
        Section(
            "Where it is",
            "The same by kind of tensor; \N{EN DASH} is what stands outside of all layers.",
            percent,
            panels=_panels(report, lambda found, t: found.change[t]),
        ),
        Section(
            "How much the models agree",
            "The cosine of two models' changes: 1 where they change the base in the same "
            "direction, 0 where one has nothing to do with the other, below 0 where they pull "
            "apart.",
            lambda cosine: decimal(cosine, 2),
            panels=_pairs(report),
            middle=0.0,
            on_card=True,
        ),
        Section(
            "Where they disagree in sign",
            "The share of entries at which what is taken of one model's change is above 0 and "
            "another's below: after trimming, where the method trims.",
            percent,
            panels=[Panel("all models", opposed)],
        ),
    ]


def _of_output(report: Report) -> list[Section]:
    """Return the sections on what a merge has of its models."""
    return [
        Section(
            "What the output has of each change",
            "100 % where the output has all of a model's change, 0 % where nothing points in its "
            "direction any more; below 0 % it moves against it.",
            percent,
            panels=_panels(report, lambda found, t: found.kept[t]),
            on_card=True,
        ),
        Section(
            "How far the output is from each model",
            "The size of the difference, as a share of the base's weights, layer by layer.",
            percent,
            lines=_lines(report, lambda found, t: found.distance[t]),
        ),
    ]


def _of_models(report: Report) -> list[Section]:
    """Return the sections of a merge, or a stack, of models that have no base in it."""

    def size(found: Numbers, t: int) -> Number:
        norm = found.norm[t]
        return None if norm is None else norm / math.sqrt(found.entries)

    return [
        Section(
            "How much the models agree",
            "The cosine of two models' weights: 1 where they are the same but for their size.",
            lambda cosine: decimal(cosine, 4),
            panels=_pairs(report),
            on_card=True,
        ),
        Section(
            "How far the output is from each model",
            "The size of the difference, as a share of the model's weights, layer by layer.",
            percent,
            lines=_lines(report, lambda found, t: found.distance[t]),
            on_card=True,
        ),
        Section(
            "How large the weights are",
            "The root mean square of a model's weights, layer by layer.",
            lambda value: f"{value:.3g}",
            lines=_lines(report, size),
            on_card=True,
        ),
    ]


def _lines(report: Report, number: Callable[[Numbers, int], Number]) -> list[Lines]:
    return [
        Lines(model, {x: number(found, t) for x, found in report.by_layer.items()})
        for t, model in enumerate(report.models)
    ]


def _panels(report: Report, number: Callable[[Numbers, int], Number]) -> list[Panel]:
    return [
        Panel(model, {cell: number(found, t) for cell, found in report.cells.items()})
        for t, model in enumerate(report.models)
    ]


def _pairs(report: Report) -> list[Panel]:
    """Return the cosines of pairs of models: of many, those that are least alike."""
    pairs = list(combinations(range(len(report.models)), 2))
    cosines = {(s, t): report.total.cosine[s][t] for s, t in pairs}
    chosen = sorted(pairs, key=lambda pair: (cosines[pair] is None, cosines[pair]))[:MOST_PAIRS]
    return [
        Panel(
            f"{report.models[s]} and {report.models[t]}",
            {cell: found.cosine[s][t] for cell, found in report.cells.items()},
        )
        for s, t in sorted(chosen)
    ]
