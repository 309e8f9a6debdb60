"""Measure how alike the tensors of a merge are: dot products and signs of inputs and output.

Where a method merges changes of a base, in the same pass over the same chunks (`Measuring`), else
in a pass of its own.

Products of changes of 16-bit tensors are made in float32, in which such changes are exact but for
what hardly counts: as small rows are summed, with an error below 1e-7. All else is made in
float64, and so is what is not good enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, check_same_shape, chunks, load, work_dtype
from merging.arithmetic.products import blocks, count_opposed, dot

LIKENESS_CHUNK = 1 << 18  # elements
MANY = 1 << 16  # elements from which errors of float32 cancel
UNEQUAL = 1e-3  # squares of norms that are so much smaller than others take float64
FAR = 0.2  # squares of distances, with those of norms, that float32 can tell

Sums = dict[tuple[str, int, int], float]  # of products, by name and numbers of models
OPPOSED, NARROW, LOST = (("opposed", 0, 0), ("narrow", 0, 0), ("lost", 0, 0))


@dataclass(frozen=True)
class Likeness:
    """Sums over the entries of a tensor, of x_t = theta_t - base, or x_t = theta_t without a base.

    y is the output minus the base, or the output, and kept_t what the method keeps of x_t before it
    combines them.
    """

    entries: int
    base: float  # |base|^2; 0 without one
    products: list[list[float]]  # <x_s, x_t>
    output: float  # |y|^2
    outputs: list[float]  # <y, x_t>
    kept: list[float]  # <kept_t, x_t>
    opposed: int  # entries at which one kept_t is above 0 and another below; 0 without a base

    def distance(self, t: int) -> float:
        """Return |y - x_t|^2."""
        return max(0.0, self.output - 2 * self.outputs[t] + self.products[t][t])

    @property
    def is_good_in_float32(self) -> bool:
        """Whether products that were made in float32, with an error of some 1e-8, are good enough.

        Else a small change beside a large one, or a small distance, would lose too many digits.
        """
        squares = [self.output, *(self.products[t][t] for t in range(len(self.kept)))]
        largest = max(squares)
        sizes = all(square == 0 or square >= UNEQUAL * largest for square in squares)
        return sizes and all(
            (apart := self.distance(t)) == 0
            or apart * self.base >= (FAR * (self.output + self.products[t][t])) ** 2
            for t in range(len(self.kept))
        )


@torch.no_grad()
def likeness(
    output: Tensor,
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    watched: "Measuring | None" = None,
) -> Likeness:
    """Compare tensors on the CPU with each other, their base, and what was made of them.

    What was measured while it was made is taken from there, if it is good enough.
    """
    flat = [t.reshape(-1) for t in (*tensors, output, *([] if base is None else [base]))]
    check_same_shape(flat)
    entries, count = flat[0].numel(), len(tensors)
    totals = watched.totals() if watched is not None else {}
    if not totals:
        is_narrow = base is not None and entries >= MANY and work_dtype(flat) == torch.float32
        totals = _totals(flat, count, torch.float32 if is_narrow else torch.float64)
    found = _likeness(totals, count, entries)
    if NARROW not in totals or (LOST not in totals and found.is_good_in_float32):
        return found
    kept = {key: total for key, total in totals.items() if key[0] in ("kept", "opposed")}
    return _likeness(_totals(flat, count, torch.float64) | kept, count, entries)


def _likeness(totals: Sums, count: int, entries: int) -> Likeness:
    def total(name: str, i: int = 0, j: int = 0) -> float:
        return totals.get((name, i, j), 0.0)

    models = range(count)
    products = [[total("products", max(i, j), min(i, j)) for j in models] for i in models]
    return Likeness(
        entries,
        total("base"),
        products,
        total("output"),
        [total("outputs", i) for i in models],
        [totals.get(("kept", i, 0), products[i][i]) for i in models],
        int(total(*OPPOSED)),
    )


def _totals(flat: Sequence[Tensor], count: int, work: torch.dtype) -> Sums:
    """Measure `count` tensors, the output after them, and the base if it follows, in `work`."""
    totals: Sums = {}
    with Scratch(min(flat[0].numel(), LIKENESS_CHUNK), flat[0].device) as scratch:
        for part in chunks(flat[0].numel(), LIKENESS_CHUNK):
            values = [
                scratch(i, work, part.stop - part.start).copy_(tensor[part])
                for i, tensor in enumerate(flat)
            ]
            *changes, made = values[: count + 1]
            bases = values[count + 1 :]
            for value in (*changes, made) if bases else ():
                value.sub_(bases[0])
            sums = _sums(changes, made, bases)
            sums[OPPOSED] = count_opposed(changes, scratch) if bases else 0
            _add(totals, sums)
    return totals


def _sums(changes: Sequence[Tensor], made: Tensor, bases: Sequence[Tensor]) -> Sums:
    """Return the products of a chunk's changes, of what was made of them, and of their base."""
    output, parts = blocks(made), [blocks(change) for change in changes]
    sums: Sums = {("output", 0, 0): dot(output, output)}
    for base in bases:
        origin = blocks(base)
        sums["base", 0, 0] = dot(origin, origin)
    for i, change in enumerate(parts):
        sums["outputs", i, 0] = dot(output, change)
        for j in range(i + 1):
            sums["products", i, j] = dot(change, parts[j])
    if made.dtype == torch.float32:
        sums[NARROW] = 1
        squares = [(sums["products", i, i], change) for i, change in enumerate(changes)]
        squares.append((sums["output", 0, 0], made))
        if any(not 1e-20 < x < 1e38 and bool(values.any()) for x, values in squares):
            sums[LOST] = 1  # squares beyond the range of float32
    return sums


def _add(totals: Sums, sums: Sums) -> None:
    for key, value in sums.items():
        totals[key] = totals.get(key, 0.0) + value


class Measuring:
    """Watches a merge of changes to a base, and measures them while they are in the cache.

    In the dtype of the merge; small tensors in float64, as errors of float32 cancel in many rows.
    """

    def __init__(self, entries: int) -> None:
        self._is_small = entries < MANY
        # By the start of each chunk: one comes again where a device had too little memory.
        self._chunks: dict[int, Sums] = {}

    def before(
        self, part: slice, origin: Tensor, deltas: Sequence[Tensor], scratch: Scratch
    ) -> None:
        self._work = torch.float64 if self._is_small else origin.dtype
        self._scratch = scratch
        self._origin = self._as_work("wide base", origin)
        self._changes = [self._copy(("change", i), delta) for i, delta in enumerate(deltas)]
        self._sums = self._chunks[part.start] = {}

    def kept(self, deltas: Sequence[Tensor]) -> None:
        self._sums[OPPOSED] = count_opposed(deltas, self._scratch)
        for i, (delta, change) in enumerate(zip(deltas, self._changes, strict=True)):
            self._sums["kept", i, 0] = dot(blocks(self._as_work("wide", delta)), blocks(change))

    def after(self, output: Tensor) -> None:
        made = self._scratch("made", self._work, output.numel())
        load(made, output).sub_(self._origin)
        if OPPOSED not in self._sums:  # changes are taken whole
            self._sums[OPPOSED] = count_opposed(self._changes, self._scratch)
        self._sums |= _sums(self._changes, made, [self._origin])

    def _as_work(self, name: object, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self._work else self._copy(name, tensor)

    def _copy(self, name: object, tensor: Tensor) -> Tensor:
        return self._scratch(name, self._work, tensor.numel()).copy_(tensor)

    def totals(self) -> Sums:
        """Return the sums over all chunks; none if nothing was watched."""
        totals: Sums = {}
        for _, sums in sorted(self._chunks.items(), key=lambda chunk: chunk[0]):
            _add(totals, sums)
        return totals
