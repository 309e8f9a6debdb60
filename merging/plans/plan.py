"""A plan: what every tensor of the output is made of, and how. It is data, and can be shown."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from merging.models.tensors import LazyTensor, OwnRows
from merging.problems import some
from merging.recipes.declarations import Method
from merging.recipes.methods import PASSTHROUGH
from merging.recipes.recipe import Recipe

if TYPE_CHECKING:  # what computes a plan can do without transformers, which takes long to load
    from transformers import PreTrainedModel

    from merging.models.words import Words


@dataclass(frozen=True)
class PlannedTensor:
    """How an output tensor is made: by a method of the sources, or as a copy of the only one."""

    sources: tuple[LazyTensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: Method | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the method
    has_base: bool = False  # whether the first source is the base of the others
    own_rows: tuple[OwnRows, ...] = ()  # that take the place of what the method gives there
    models: tuple[str, ...] = ()  # whose the sources are

    @property
    def how(self) -> str:
        return "copied" if self.method is None else self.method.done

    @property
    def call(self) -> str:
        """The method and its numbers, as text."""
        if self.method is None:
            return self.how
        given = [f"{name}={_compact(value)}" for name, value in self.arguments.items()]
        return f"{self.method.name}({', '.join(given)})"

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _compact(value: object) -> str:
    """Return a number of a method as short text, or several of them."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_compact, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Plan:
    """A model to be made: its tensors, its class and config, and the stored tensors left out."""

    donor: str
    tensors: Mapping[str, PlannedTensor]
    model: "PreTrainedModel"  # of the output's class and config, without values
    words: "Words"  # whose tokenizer and chat template it gets
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what the user should know of it
    trims_models: bool = False  # as a whole, by thresholds that are found before merging

    def check_sources(self) -> None:
        """Raise Problems if a file that tensors are read from has changed."""
        for tensor in self.tensors.values():
            for source in tensor.sources:
                source.check()

    @property
    def parameters(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.tensors)


def nbytes_of(tensors: Mapping[str, PlannedTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def uses(tensors: Mapping[str, PlannedTensor]) -> Counter[LazyTensor]:
    """Return the stored tensors that are read for planned ones, and how often."""
    sources = (source for tensor in tensors.values() for source in tensor.sources)
    return Counter(part for source in sources for part in source.stored())


def planned(
    recipe: Recipe,
    sources: tuple[LazyTensor, ...],
    given: LazyTensor,
    arguments: Mapping[str, Any],
    own_rows: tuple[OwnRows, ...] = (),
    models: tuple[str, ...] = (),
) -> PlannedTensor:
    """Plan a tensor by a recipe's method, or as a copy: integers, and what has nothing done to it.

    It is of the shape of the `given` tensor and, if it is of floating-point numbers, of the dtype
    that the recipe asks for, if it does.
    """
    target = getattr(torch, recipe.dtype) if recipe.dtype and given.is_floating else given.dtype
    is_copy = recipe.method is PASSTHROUGH and arguments["scale"] == 1.0
    if is_copy or not given.is_floating:
        return PlannedTensor(sources, given.shape, target, own_rows=own_rows, models=models)
    return PlannedTensor(
        sources, given.shape, target, recipe.method, arguments, recipe.takes_base, own_rows, models
    )


def lines(plan: Plan) -> str:
    """Return how each tensor is made, one a line."""
    return "\n".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}: {tensor.call}, "
        + ", ".join(source.label for source in tensor.sources)
        + "".join(
            f"; {len(own.places)} rows of {', '.join(s.label for s in own.sources) or 'padding'}"
            for own in tensor.own_rows
        )
        for name, tensor in plan.tensors.items()
    )


def summary(plan: Plan, shards: int, libraries: int) -> str:
    """Return what a plan will read, make and write, as text.

    `libraries` is the memory, in bytes, that is taken whatever the plan is.
    """
    tensors = plan.tensors.values()
    ways = Counter(tensor.how for tensor in tensors)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    read = sum(part.nbytes for part in uses(plan.tensors))
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    lines = [
        f"donor: {plan.donor}, {type(plan.model).__name__}",
        f"tensors: {', '.join(f'{count} {way}' for way, count in ways.most_common())}",
        f"dtype: {', '.join(f'{dtype} ({count})' for dtype, count in dtypes.most_common())}",
        f"ignored: {some(plan.ignored) or 'none'}",
        f"reads {gigabytes(read)}, writes {gigabytes(plan.nbytes)} in "
        f"{shards} shard{'s' * (shards != 1)}, needs about "
        f"{gigabytes(2 * largest + libraries)} of memory besides mapped files",
        *plan.notes,
    ]
    return "\n".join(lines)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
