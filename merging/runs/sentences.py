"""Say in plain sentences what a report's numbers mean. Each rule is a function, with its bounds."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from merging.models.kinds import Layer
from merging.runs.phrases import decimal, listed, percent, place, times
from merging.runs.report import Cell, Number, Numbers, Report

NEGLIGIBLE = 0.001  # a change, of the base, up to which a model is all but equal to it
MANY_TIMES = 3.0  # between changes, from which one is said to be so many times the other
RELATED, SIMILAR, SAME = 0.1, 0.3, 0.9  # cosines of changes, and of opposite ones
UNRELATED, ALIKE, EQUAL = 0.3, 0.9, 0.9999  # cosines of models
NOTABLE = 0.1  # how much lower than that of all a cosine of changes must be to be told
SMALL_PART = 0.001  # of a model's squared change: where less of it is, nothing is told
UNEVEN = 1.5  # how many times more must be left of one change than of another
LITTLE_LOST = 0.005  # a part of a change that is not worth telling
NEAR = 1.2  # how many times as far two models must be for one to be nearer
STEP = 1.25  # between the sizes of weights in layers that follow each other
FEW = 3  # pairs of models that are all told; of more, the two extremes

Rule = Callable[[Report], Iterator[str]]


def sentences(report: Report) -> list[str]:
    """Return what the rules say of a merge, in their order."""
    rules: tuple[Rule, ...] = (likenesses, least_alike, nearness, seams, scaled)
    if report.has_base:
        rules = (
            sizes,
            outside,
            untouched,
            agreement,
            least_agreed,
            trimming,
            signs,
            remains,
            reach,
        )
    return [sentence for rule in rules for sentence in rule(report)]


class Run(NamedTuple):
    """Layers that follow each other, and a kind of tensor: where two models are least alike."""

    kind: str
    layers: list[Layer | None]
    lowest: float
    highest: float


# -------------------------------------------------------------------- what the models changed


def sizes(report: Report) -> Iterator[str]:
    """How far each model is from the base."""
    changes = dict(zip(report.models, report.total.change, strict=True))
    known = {model: change for model, change in changes.items() if change is not None}
    for model, change in known.items():
        if change == 0:
            yield f"{model} equals the base: it changes nothing."
        elif change <= NEGLIGIBLE:
            yield f"{model} is all but equal to the base ({percent(change)})."
    rest = {model: change for model, change in known.items() if change > NEGLIGIBLE}
    if rest:
        parts = [f"{model} by {percent(change)}" for model, change in rest.items()]
        parts[0] = parts[0].replace(" by ", " changes the base by ", 1)
        most, least = max(rest, key=rest.__getitem__), min(rest, key=rest.__getitem__)
        many = rest[most] / rest[least]
        end = f": {most} {times(many)} as much as {least}" if many >= MANY_TIMES else ""
        yield f"{listed(parts)}{end}."


def outside(report: Report) -> Iterator[str]:
    """Embeddings and heads that changed much more than what is between them."""
    for t, model in enumerate(report.models):
        for kind in ("embedding", "head"):
            there = _change(report.by_kind.get(kind), t)
            inside = _change(report.inside.get(True), t)
            if there > NEGLIGIBLE and inside and there / inside >= MANY_TIMES:
                much = f"{times(there / inside)} as much as its layers"
                yield f"{model}'s {kind} differs {much}: other tokens?"


def untouched(report: Report) -> Iterator[str]:
    """Kinds of tensors that a model left as they are in the base."""
    for t, model in enumerate(report.models):
        norms = {kind: found.norm[t] for kind, found in report.by_kind.items()}
        same = [kind for kind, norm in norms.items() if norm == 0]
        changed = [kind for kind, norm in norms.items() if norm]
        if len(changed) == 1 and same:
            yield f"{model} changes nothing but its {changed[0]}."
        elif changed and same:
            yield f"{model} has the {listed(same)} of the base."


def agreement(report: Report) -> Iterator[str]:
    """Whether changes point in one direction."""
    for s, t, cosine in _told(_pairs(report)):
        both = f"{report.models[s]} and {report.models[t]}"
        if cosine >= SAME:
            yield f"{both} make all but the same change (cosine {decimal(cosine, 2)})."
        elif cosine >= SIMILAR:
            yield f"{both} change the base in similar directions (cosine {decimal(cosine, 2)})."
        elif cosine >= RELATED:
            yield f"{both} change the base a little in one direction (cosine {decimal(cosine, 2)})."
        elif cosine > -RELATED:
            yield f"{both} change the base in unrelated directions (cosine {decimal(cosine, 2)})."
        elif cosine > -SIMILAR:
            yield f"{both} pull a little apart (cosine {decimal(cosine, 2)})."
        else:
            yield f"{both} pull in opposite directions (cosine {decimal(cosine, 2)})."


def least_agreed(report: Report) -> Iterator[str]:
    """Where the two models that agree least do so least."""
    if pairs := _pairs(report):
        s, t, total = min(pairs, key=lambda pair: pair[2])
        run = _lowest_run(report, s, t, total)
        if run and run.lowest <= total - NOTABLE:
            verb = "disagree most" if run.lowest < 0 else "agree least"
            yield f"{report.models[s]} and {report.models[t]} {verb} in {_place(report, run, 2)}."


def trimming(report: Report) -> Iterator[str]:
    """How much of each change is left after trimming."""
    if is_trimmed(report):
        yield f"After trimming, {_shares(report, report.total.left, ' is left')}."


def signs(report: Report) -> Iterator[str]:
    """How often the changes that are left to be combined have both signs."""
    share = report.total.opposed
    if share is not None and _pairs(report):
        what = "What is left disagrees" if is_trimmed(report) else "The changes disagree"
        yield f"{what} in sign at {percent(share)} of the entries."


# -------------------------------------------------------------------- what the output has of them


def remains(report: Report) -> Iterator[str]:
    """How much of each change the output has, and what would make it more even."""
    changed = [_change(report.total, t) > NEGLIGIBLE for t in range(len(report.models))]
    found = [k if is_told else None for k, is_told in zip(report.total.kept, changed, strict=True)]
    kept = {t: share for t, share in enumerate(found) if share is not None}
    if kept:
        yield f"The output has {_shares(report, found)}{_advice(report, kept)}."
    for t, share in kept.items():
        if share < -LITTLE_LOST:
            yield f"The output moves against {report.models[t]}'s change."


def _shares(report: Report, values: Sequence[Number], verb: str = "") -> str:
    known = [(model, v) for model, v in zip(report.models, values, strict=True) if v is not None]
    (model, value), *others = known
    first = f"{percent(value)} of {model}'s change{verb}"
    return listed([first, *(f"{percent(value)} of {model}'s" for model, value in others)])


def _advice(report: Report, kept: dict[int, float]) -> str:
    """Return what would leave more of the change of which least is left."""
    told = [t for t in kept if kept[t] > LITTLE_LOST]
    if len(told) < 2:
        return ""
    least, most = min(told, key=kept.__getitem__), max(told, key=kept.__getitem__)
    if kept[most] / kept[least] < UNEVEN:
        return ""
    model, weight, density = report.models[least], report.weights[least], report.densities[least]
    left = report.total.left[least] or 0
    if density is not None and density < 1 and left * UNEVEN < (report.total.left[most] or 0):
        return f": consider a higher density than {density:g} for {model}"
    if weight is None or weight <= 0:
        return ""
    if report.is_sum:
        return f": consider weight {weight * kept[most] / kept[least]:.2g} for {model}"
    return f": consider a higher weight than {weight:g} for {model}"


def reach(report: Report) -> Iterator[str]:
    """How far the output is from the base, compared with the models."""
    output, changes = report.total.output_change, [c for c in report.total.change if c is not None]
    if output is not None and changes:
        further = ", more than any of the models" if output > NEAR * max(changes) else ""
        yield f"The output changes the base by {percent(output)}{further}."


# -------------------------------------------------------------------- models without a base


def likenesses(report: Report) -> Iterator[str]:
    """How alike models are."""
    for s, t, cosine in _told(_pairs(report)):
        both, told = f"{report.models[s]} and {report.models[t]}", f"(cosine {decimal(cosine, 4)})"
        if cosine > EQUAL:
            yield f"{both} are all but equal {told}."
        elif cosine >= ALIKE:
            yield f"{both} are alike {told}, as models of one origin are."
        elif cosine >= UNRELATED:
            yield f"{both} have drifted far apart {told}."
        else:
            yield (
                f"{both} have little in common {told}: if they were not trained from one model, "
                "no average of their weights will work."
            )


def least_alike(report: Report) -> Iterator[str]:
    """Where the two models that are least alike are so least."""
    if pairs := _pairs(report):
        s, t, total = min(pairs, key=lambda pair: pair[2])
        run = _lowest_run(report, s, t, total)
        if run and total <= EQUAL and 1 - run.lowest >= 2 * (1 - total):
            both = f"{report.models[s]} and {report.models[t]}"
            yield f"{both} are least alike in {_place(report, run, 4)}."


def nearness(report: Report) -> Iterator[str]:
    """To which model the output is nearest."""
    known = {m: d for m, d in zip(report.models, report.total.distance, strict=True)}
    apart = {model: distance for model, distance in known.items() if distance is not None}
    if not _pairs(report):
        return
    near, far = min(apart, key=apart.__getitem__), max(apart, key=apart.__getitem__)
    if apart[far] <= NEAR * apart[near]:
        yield f"The output is about as far from each model ({percent(apart[far])})."
    else:
        yield (
            f"The output is nearest to {near} ({percent(apart[near])} away) and farthest from "
            f"{far} ({percent(apart[far])})."
        )


# -------------------------------------------------------------------- stacks of layers


def seams(report: Report) -> Iterator[str]:
    """Layers of another model than the one before whose weights are larger or smaller."""
    layers = [layer for layer in report.layers if layer is not None]
    for before, after in pairwise(layers):
        if before.stack != after.stack:
            continue
        for kind in ("attention", "MLP", "experts"):
            one, other = (_only_model(report.cells.get((x, kind))) for x in (before, after))
            if one is None or other is None or one[0] == other[0] or not one[1] * other[1]:
                continue
            factor = other[1] / one[1]
            if max(factor, 1 / factor) >= STEP:
                yield (
                    f"The weights of {place(kind, [after])}, of {report.models[other[0]]}, are "
                    f"{times(factor)} as large as those of layer {before.number}, "
                    f"of {report.models[one[0]]}."
                )


def _only_model(found: Numbers | None) -> tuple[int, float] | None:
    """Return the one model that brings these tensors, and the root mean square of the output's."""
    owners = [t for t, norm in enumerate(found.norm) if norm is not None] if found else []
    if found is None or len(owners) != 1 or found.output_norm is None:
        return None
    return owners[0], found.output_norm / math.sqrt(found.entries)


def scaled(report: Report) -> Iterator[str]:
    """Models whose tensors are alone in the output, and not as they were."""
    found = [tensor.numbers.norm for tensor in report.tensors if tensor.numbers]
    if any(len([norm for norm in norms if norm is not None]) > 1 for norms in found):
        return
    for t, model in enumerate(report.models):
        distance = report.total.distance[t]
        if distance:
            yield f"What is taken of {model} is scaled, by {percent(distance)} of it in all."


# -------------------------------------------------------------------- what the rules look at


def _change(found: Numbers | None, t: int) -> float:
    """Return a model's change of some tensors, 0 where there is none."""
    return (found.change[t] if found else None) or 0.0


def is_trimmed(report: Report) -> bool:
    return any(share is not None and share < 1 - LITTLE_LOST for share in report.total.left)


def _pairs(report: Report) -> list[tuple[int, int, float]]:
    """Return pairs of models that have a cosine, in their order."""
    pairs = combinations(range(len(report.models)), 2)
    found = [(s, t, report.total.cosine[s][t]) for s, t in pairs]
    return [(s, t, cosine) for s, t, cosine in found if cosine is not None]


def _told(pairs: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Return all of a few pairs; of many, the least and the most alike."""
    if len(pairs) <= FEW:
        return pairs
    return [choose(pairs, key=lambda pair: pair[2]) for choose in (min, max)]


def _lowest_run(report: Report, s: int, t: int, total: float) -> Run | None:
    """Find the lowest cosine of two models in a kind and layer, and the low ones next to it.

    Low are those nearer to the lowest than to that of the whole models.
    """
    cosines: dict[Cell, float] = {}
    for cell, found in report.cells.items():
        cosine = found.cosine[s][t]
        parts = [(found.norm[i] or 0) ** 2 / (report.total.norm[i] or 1) ** 2 for i in (s, t)]
        if cosine is not None and min(parts) >= SMALL_PART:
            cosines[cell] = cosine
    if not cosines:
        return None
    layer, kind = min(cosines, key=lambda cell: (cosines[cell], str(cell)))
    run, lowest = [layer], cosines[layer, kind]
    low = (lowest + total) / 2
    for step in (-1, 1):
        end = layer
        while end is not None and cosines.get((_beside(end, step), kind), math.inf) <= low:
            end = _beside(end, step)
            run.append(end)
    run.sort(key=lambda layer: layer.number if layer else 0)
    return Run(kind, run, lowest, max(cosines[layer, kind] for layer in run))


def _place(report: Report, run: Run, digits: int) -> str:
    """Return the words for where a run is, and its cosines."""
    lowest, highest = decimal(run.lowest, digits), decimal(run.highest, digits)
    cosines = lowest if lowest == highest else f"{lowest} to {highest}"
    stack = [x for x in report.layers if x and run.layers[0] and x.stack == run.layers[0].stack]
    where = place(run.kind, run.layers, is_all=len(run.layers) == len(stack) > 1)
    return f"{where} (cosine {cosines})"


def _beside(layer: Layer, step: int) -> Layer:
    return layer._replace(number=layer.number + step)
