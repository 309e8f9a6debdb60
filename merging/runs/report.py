"""Collect, while a merge is computed, how much its models differ and what is left of each.

Numbers of several tensors are those of one long vector made of them. Where a number has no meaning,
as the cosine of a change that is zero, it is None.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from merging.arithmetic.likeness import Likeness, Measuring, likeness
from merging.models.kinds import KINDS, Layer, kind_of, layers_of
from merging.models.tensors import FLOAT_DTYPES
from merging.plans.plan import Plan, PlannedTensor
from merging.recipes.recipe import Recipe

Number = float | None
Cell = tuple[Layer | None, str]  # a layer, or None for what is outside of all; and a kind


class Measurements:
    """What is measured of each tensor, by its name, as soon as it is computed."""

    def __init__(self) -> None:
        self.found: dict[str, Likeness] = {}

    def __call__(
        self,
        name: str,
        planned: PlannedTensor,
        tensors: Sequence[Tensor],
        result: Tensor,
        measured: Measuring,
    ) -> None:
        """Measure a tensor; called by many threads."""
        if result.is_floating_point():
            base = tensors[0] if planned.has_base else None
            self.found[name] = likeness(result, tensors[planned.has_base :], base, measured)


def ratio(one: float, other: float) -> Number:
    """Return a quotient, None if it is no finite number."""
    found = float(one) / float(other) if other and math.isfinite(other) else math.nan
    return found if math.isfinite(found) else None


def root(square: Number) -> Number:
    return math.sqrt(square) if square is not None and math.isfinite(square) else None


class Sums:
    """Sums over the entries of some tensors: of x_t = theta_t - base, or theta_t without a base."""

    def __init__(self, models: int) -> None:
        self.base = self.output = 0.0  # |base|^2, |y|^2; y is the output minus the base, if any
        self.entries = self.compared = self.opposed = 0
        self.own = np.zeros(models, dtype=np.int64)  # entries of the tensors that a model brings
        self.origins = np.zeros(models)  # |base|^2 of those
        self.outputs = np.zeros(models)  # <y, x_t>
        self.left = np.zeros(models)  # <kept_t, x_t>
        self.apart = np.zeros(models)  # |y - x_t|^2
        self.products = np.zeros((models, models))  # <x_s, x_t>
        self.squares = np.zeros((models, models))  # |x_s|^2 of the tensors that t brings, too

    def add(self, found: Likeness, models: Sequence[int]) -> None:
        """Add a tensor that is made of those of some models."""
        self.base += found.base
        self.output += found.output
        self.entries += found.entries
        self.compared += found.entries * (len(models) > 1)
        self.opposed += found.opposed
        for i, t in enumerate(models):
            square = found.products[i][i]
            self.own[t] += found.entries
            self.origins[t] += found.base
            self.outputs[t] += found.outputs[i]
            self.left[t] += found.kept[i]
            self.apart[t] += found.distance(i)
            for j, s in enumerate(models):
                self.products[t, s] += found.products[i][j]
                self.squares[t, s] += square

    def add_all(self, other: "Sums") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Numbers(NamedTuple):
    """What is said of some tensors: of each model, each pair of models, and the output.

    With a base, x_t is what model t changed of it, and y what the output did; else they are the
    tensors themselves, and there is no change, opposed, left, kept or output_change.
    """

    entries: int
    norm: list[Number]  # |x_t|
    change: list[Number]  # |x_t| / |base|
    cosine: list[list[Number]]  # of x_s and x_t
    opposed: Number  # share of the entries where the kept parts of x_t have both signs
    left: list[Number]  # <kept part of x_t, x_t> / |x_t|^2: what the method's sparsifying leaves
    kept: list[Number]  # <y, x_t> / |x_t|^2: what the output has of it
    distance: list[Number]  # |output - theta_t| / |base|, without a base / |theta_t|
    output_norm: Number  # |y|
    output_change: Number  # |y| / |base|


def numbers(sums: Sums, has_base: bool) -> Numbers:
    """Return the ratios of sums; of a model that brings none of the tensors, None."""
    models = range(len(sums.own))
    squares = np.diag(sums.squares)

    def each(above: Any, below: Any, power: float = 1.0, if_base: bool = True) -> list[Number]:
        found = [ratio(above[t], below[t]) if sums.own[t] else None for t in models]
        return [x**power if x is not None and (has_base or not if_base) else None for x in found]

    def cosine(s: int, t: int) -> Number:
        norms = math.sqrt(sums.squares[s, t]) * math.sqrt(sums.squares[t, s])
        found = ratio(sums.products[s, t], norms)
        if found is None or s == t:
            return found and 1.0
        return max(-1.0, min(1.0, found))

    return Numbers(
        entries=sums.entries,
        norm=[root(squares[t]) if sums.own[t] else None for t in models],
        change=each(squares, sums.origins, 0.5),
        cosine=[[cosine(s, t) for t in models] for s in models],
        opposed=ratio(sums.opposed, sums.compared) if has_base else None,
        left=each(sums.left, squares),
        kept=each(sums.outputs, squares),
        distance=each(sums.apart, sums.origins if has_base else squares, 0.5, if_base=False),
        output_norm=root(sums.output),
        output_change=root(ratio(sums.output, sums.base)) if has_base else None,
    )


class Measured(NamedTuple):
    """A tensor of the output; without numbers if it holds no floats."""

    name: str
    layer: Layer | None
    kind: str
    how: str
    numbers: Numbers | None


class Report:
    """All numbers of a merge: by tensor, by layer and kind, by layer, by kind, and in all."""

    def __init__(self, recipe: Recipe, plan: Plan, found: Mapping[str, Likeness]) -> None:
        self.recipe = recipe
        self.method = recipe.method
        self.has_base = recipe.takes_base
        self.names, members = _members(plan)
        self.models = short_names(self.names)
        self.weights = _settings(plan, members, "weights", len(self.models))
        self.densities = _settings(plan, members, "densities", len(self.models))
        # Whether what the output has of a model grows with its weight.
        switches = {p.arguments.get("normalize", ...) for p in plan.tensors.values()}
        self.is_sum = switches - {...} == {False}
        layers = layers_of(plan.tensors)
        self.tensors: list[Measured] = []
        cells: dict[Cell, Sums] = defaultdict(lambda: Sums(len(self.models)))
        for name, planned in plan.tensors.items():
            layer, kind = layers[name], kind_of(name, layers[name] is not None)
            of_tensor = None
            if name in found:
                sums = Sums(len(self.models))
                sums.add(found[name], members[name])
                cells[layer, kind].add_all(sums)
                of_tensor = numbers(sums, self.has_base)
            self.tensors.append(Measured(name, layer, kind, planned.how, of_tensor))
        self.layers = sorted({layer for layer, _ in cells}, key=_order)
        self.kinds = [kind for kind in KINDS if any(kind == k for _, k in cells)]
        self.cells = {cell: numbers(sums, self.has_base) for cell, sums in cells.items()}
        self.by_layer = self._totals(cells, lambda layer, kind: layer)
        self.by_kind = self._totals(cells, lambda layer, kind: kind)
        self.inside = self._totals(cells, lambda layer, kind: layer is not None)  # of layers
        nothing = numbers(Sums(len(self.models)), self.has_base)
        self.total = self._totals(cells, lambda layer, kind: None).get(None, nothing)

    def _totals(
        self, cells: Mapping[Cell, Sums], key: Callable[[Layer | None, str], Any]
    ) -> dict[Any, Numbers]:
        """Add up the cells that have the same key."""
        totals: dict[Any, Sums] = defaultdict(lambda: Sums(len(self.models)))
        for (layer, kind), sums in cells.items():
            totals[key(layer, kind)].add_all(sums)
        return {key: numbers(sums, self.has_base) for key, sums in totals.items()}


def _members(plan: Plan) -> tuple[list[str], dict[str, list[int]]]:
    """Number the models that bring tensors; return their names, and the numbers for each tensor.

    A model that is merged twice into one tensor counts twice.
    """
    order: dict[tuple[str, int], int] = {}
    members: dict[str, list[int]] = {}
    for name, planned in plan.tensors.items():
        seen: Counter[str] = Counter()
        members[name] = []
        models = planned.models[planned.has_base :] if planned.dtype in FLOAT_DTYPES else ()
        for model in models:
            seen[model] += 1
            members[name].append(order.setdefault((model, seen[model]), len(order)))
    return [model for model, _ in order], members


def _settings(
    plan: Plan, members: Mapping[str, Sequence[int]], argument: str, models: int
) -> list[Number]:
    """Return an argument's number for each model, None where it has none or several."""
    found: list[set[float]] = [set() for _ in range(models)]
    for name, planned in plan.tensors.items():
        for t, value in zip(members[name], planned.arguments.get(argument, ()), strict=False):
            found[t].add(value)
    return [values.pop() if len(values) == 1 else None for values in found]


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of models' names; or the names, where these would be the same."""
    last = [re.split(r"[/\\+]", name.rstrip("/\\"))[-1] or name for name in names]
    if len(set(last)) < len(set(names)):
        last = list(names)
    seen: Counter[str] = Counter()
    for i, name in enumerate(last):
        seen[name] += 1
        last[i] = f"{name} ({seen[name]})" if seen[name] > 1 else name
    return last


def _order(layer: Layer | None) -> tuple[bool, bool, str, int]:
    """Sort what is outside of layers first, then encoders before decoders, by number."""
    if layer is None:
        return (False, False, "", 0)
    return (True, "decoder" in layer.stack, layer.stack, layer.number)
