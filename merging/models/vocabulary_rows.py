"""Give tensors that have one entry a token the rows of an output's vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merging.models.checkpoints import Checkpoint
from merging.models.tensors import MISSING, LazyTensor, OwnRows, with_rows
from merging.problems import Problems

Rows = list[int] | None  # which of a model's rows the output's rows are; None: the same
Operands = Sequence[tuple[LazyTensor, Rows]]


class Matched(NamedTuple):
    """What an output tensor is made of: the tensor that it is like, its sources, rows apart."""

    given: LazyTensor
    sources: tuple[LazyTensor, ...]
    own: tuple[OwnRows, ...] = ()


@dataclass(frozen=True)
class Matcher:
    """Gives tensors the output's rows, where these are others than those they have."""

    everyone: Sequence[Checkpoint]  # the donor first, whose rows stand for those that others lack
    places: Mapping[str, tuple[str, int]]  # the vocabulary's key and the dimension, by stored name
    rows: Mapping[tuple[Checkpoint, str], Rows]  # of a model, by the vocabulary's key
    growth: Mapping[str, int]  # how many rows more than the donor the output has, by key

    def __call__(
        self,
        given: LazyTensor | None,
        operands: Sequence[tuple[Checkpoint, str]],
        weights: Sequence[float] | None = None,
    ) -> Matched:
        """Return what an output tensor is made of; rows of tokens that the donor lacks are apart.

        `given` is the donor's tensor of that role, None if it has none. The weights are of all
        operands, or of the last.
        """
        donor = self.everyone[0]
        key, dim = self.places.get(operands[0][1], ("", 0))
        pairs = [(m.tensors[stored], self.rows.get((m, key))) for m, stored in operands]
        first, base = given or pairs[0][0], self.rows.get((donor, key))
        if len(first.shape) <= dim or (base is None and all(rows is None for _, rows in pairs)):
            return Matched(first, tuple(tensor for tensor, _ in pairs))
        if given is None and operands[0][0] is not donor:
            alone = tuple(self._alone(model, stored, dim) for model, stored in operands)
            return Matched(alone[0], alone)
        count = first.shape[dim] + self.growth.get(key, 0)
        base_rows = _listed(base, count)
        absent = [i for i, row in enumerate(base_rows) if not 0 <= row < first.shape[dim]]
        sources = tuple(
            tensor
            if (rows is None and not absent) or not _fits(tensor, rows, dim, count)
            else with_rows(tensor, dim, _without(_listed(rows, count), absent), first, base_rows)
            for tensor, rows in pairs
        )
        like = first if base is None else with_rows(first, dim, base_rows)
        candidates = (pairs, self._others(operands, key))
        return Matched(like, sources, own_rows(dim, absent, candidates, weights))

    def _alone(self, model: Checkpoint, name: str, dim: int) -> LazyTensor:
        """Return a tensor with the output's rows, of a role that the donor has no tensor of."""
        tensor = model.tensors[name]
        rows = self.rows.get((model, self.places.get(name, ("", 0))[0]))
        if rows is None or len(tensor.shape) <= dim:
            return tensor
        if MISSING in rows:
            raise Problems(
                f"{model.name}: {name} lacks {rows.count(MISSING)} of the {len(rows)} rows of "
                f"{self.everyone[0].name}'s vocabulary, which has no such tensor to take them from"
            )
        return with_rows(tensor, dim, rows)

    def _others(self, operands: Sequence[tuple[Checkpoint, str]], key: str) -> Operands:
        """Return the tensors of a role in models that are no operands of it."""
        taking_part = {model for model, _ in operands}
        return [
            (model.tensors[name], self.rows.get((model, key)))
            for model in self.everyone
            for name in dict.fromkeys(stored for _, stored in operands)
            if model not in taking_part and name in model.tensors
        ]


def _listed(rows: Rows, count: int) -> list[int]:
    return list(range(count)) if rows is None else rows[:count]


def _without(rows: list[int], absent: Sequence[int]) -> list[int]:
    """Return rows but for those that the base lacks: there, no model takes part."""
    kept = list(rows)
    for i in absent:
        kept[i] = MISSING
    return kept


def _fits(tensor: LazyTensor, rows: Rows, dim: int, count: int) -> bool:
    """Whether a tensor can be given `count` rows; if not, its shape is reported as a misfit."""
    return len(tensor.shape) > dim and (rows is None or len(rows) >= count)


def _row(tensor: LazyTensor, rows: Rows, dim: int, i: int) -> int:
    """Return which row of a tensor the output's row i is, or MISSING."""
    if len(tensor.shape) <= dim or (rows is not None and i >= len(rows)):
        return MISSING
    row = i if rows is None else rows[i]
    return row if row < tensor.shape[dim] else MISSING


def own_rows(
    dim: int,
    absent: Sequence[int],
    candidates: tuple[Operands, Operands],
    weights: Sequence[float] | None,
) -> tuple[OwnRows, ...]:
    """Say what the rows are made of that the base lacks: of the models that have each.

    Those are looked for among the operands, then, with equal weights, among the other models. Rows
    that none has, of padding, come last.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    tensors = [*candidates[0], *candidates[1]]
    for i in absent:
        having = [k for k, (t, rows) in enumerate(tensors) if _row(t, rows, dim, i) != MISSING]
        operands = [k for k in having if k < len(candidates[0])]
        groups.setdefault(tuple(operands or having), []).append(i)
    own = []
    for chosen, places in sorted(groups.items(), key=lambda group: not group[0]):
        sources = [
            with_rows(tensor, dim, [_row(tensor, rows, dim, i) for i in places])
            for tensor, rows in (tensors[k] for k in chosen)
        ]
        factors = own_weights(weights, chosen, len(candidates[0]))
        own.append(OwnRows(dim, tuple(places), tuple(sources), factors))
    return tuple(own)


def own_weights(
    weights: Sequence[float] | None, having: Sequence[int], operands: int
) -> tuple[float, ...]:
    """Return the weights of the tensors that have a token, of which the first are operands.

    Those that the method has, or equal ones if it has none. A model that is taken away from the
    others, by a negative weight, has no say, unless nobody else has the token: then all are equal.
    """
    given = [] if weights is None else [0.0] * (operands - len(weights)) + list(weights)
    chosen = [max(given[k], 0.0) if k < len(given) else 0.0 for k in having]
    return tuple(chosen) if sum(chosen) > 0 else (1.0,) * len(having)
