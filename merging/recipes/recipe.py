"""A recipe: all that a user asked for of a model to be made, checked, with every default filled in.

A merge of whole models is one slice of several sources; a stack of layers has slices of one source.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merging.recipes.declarations import DONOR, OPERAND, OPTIONAL, ORIGIN, Method, Parameter
from merging.recipes.numbers import Factors, Schedule

Value = Schedule | Factors | bool | int | str | float | None  # a number, a switch, seed or choice


@dataclass(frozen=True)
class Source:
    """A model that takes part, with the numbers that are its own, by parameter."""

    model: str
    values: Mapping[str, Value] = field(default_factory=dict)
    layers: range | None = None  # of a stack
    where: str = ""  # the file, line and key that name the layers


@dataclass(frozen=True)
class Slice:
    """Whole models, or as many layers of each, to be merged into one; and numbers for them."""

    sources: tuple[Source, ...]
    values: Mapping[str, Value] = field(default_factory=dict)
    base: Source | None = None  # of a stack: the base's layers, where it takes part as such


@dataclass(frozen=True)
class Recipe:
    """What to make, of what and how."""

    method: Method
    slices: tuple[Slice, ...]
    base: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    embedding_source: str | None = None  # of a stack: of the tensors before the layers
    lm_head_source: str | None = None  # and of those after them
    asks_for_head: bool = False  # whether it names a lm_head_source other than the embedding's
    text: str = ""  # of the file that it was read from, if any
    tokenizer: str | None = None  # "base", "union" or a model's name; None: the donor's
    pad_to_multiple_of: int | None = None  # the rows of its vocabulary
    chat_template: str = "auto"  # "auto", "donor", a model's name, a file or a template's text
    dtype: str = ""  # of the output, where no option says another; the donor's, if it is empty
    notes: tuple[str, ...] = ()  # what the user should know of how it was read

    @property
    def is_stack(self) -> bool:
        return any(s.layers is not None for part in self.slices for s in part.sources)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model once, the donor of config and files first."""
        named = [self.base, *(s.model for part in self.slices for s in part.sources)]
        named += [self.embedding_source, self.lm_head_source]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def words_of(self) -> str:
        """The model that gives the tokenizer, and the rows of embedding and head."""
        return self.embedding_source or self.models[0]

    @property
    def takes_base(self) -> bool:
        """Whether the base is the origin of the changes that are merged."""
        return self.base is not None and self.method.base in (ORIGIN, OPTIONAL)

    @property
    def copies(self) -> bool:
        """Whether the method takes a single tensor as it is, or scaled."""
        return self.method.models == (1, 1) and self.method.base == DONOR

    @property
    def is_complete(self) -> bool:
        """Whether each parameter of the method has a value for each model that is merged."""
        return all(
            parameter.name in {**self.values, **part.values, **source.values}
            for parameter in self.method.parameters
            for part in self.slices
            for source in part.sources
        ) and all(part.sources for part in self.slices)

    def operands(self, part: Slice) -> tuple[Source, ...]:
        """Return what the arithmetic takes for a slice, in its order."""
        in_front = self.base is not None and self.method.base != DONOR
        return (part.base or Source(str(self.base)), *part.sources) if in_front else part.sources

    def arguments(
        self, part: Slice, name: str, place: float, names: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return the method's arguments for a tensor at a place among the layers, from 0 to 1.

        `names` are those of the tensor in the sources, if it has another in them. A number that a
        recipe has for other tensors alone is None.
        """
        names = names or [name] * max(1, len(part.sources))

        def at(parameter: Parameter, name: str, *given: Mapping[str, Value]) -> Any:
            value = next(values[parameter.name] for values in given if parameter.name in values)
            return value.at(name, place) if isinstance(value, Schedule | Factors) else value

        found = {}
        for parameter in self.method.parameters:
            if parameter.argument is None:
                continue
            if parameter.per_model:
                value = [
                    at(parameter, own, source.values, part.values, self.values)
                    for own, source in zip(names, part.sources, strict=False)
                ]
            else:
                value = at(parameter, names[0] if self.copies else name, part.values, self.values)
            if parameter.is_seed:
                seed: Any = value
                value = [random_key(seed, name, i) for i in range(len(part.sources))]
            found[parameter.argument] = value
        return found

    def missing(self, part: Slice, arguments: Mapping[str, Any]) -> list[str]:
        """Return which numbers are None, and whose they are."""
        found = []
        for parameter in self.method.parameters:
            value = arguments.get(parameter.argument or "")
            if isinstance(value, list):
                models = [s.model for s, v in zip(part.sources, value, strict=True) if v is None]
                found += [f"{parameter.name} of {model}" for model in models]
            elif value is None and parameter.argument:
                found.append(parameter.name)
        return found

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Say why the method cannot take these arguments; None if it can."""
        return next(filter(None, (check(arguments) for check in self.method.checks)), None)

    def refusals(self, part: Slice) -> list[str]:
        """Say why the method cannot take a slice's numbers, in its first layer or in its last.

        Those are there in any model; what lies between is seen to when that is known.
        """
        words = {word for _, _, s in self.schedules(part) for word, _ in s.filters}
        ends = {0: "first", 1: "last"}
        if part is not self.slices[0] and all(len(s.layers or ()) == 1 for s in part.sources):
            del ends[0]  # the only layer takes the last of its values
        found: dict[str, set[str]] = {}
        for name, (place, where) in itertools.product(("", *words), ends.items()):
            given = self.arguments(part, name, place)
            if not self.missing(part, given) and (text := self.refusal(given)):
                found.setdefault(text, set()).add(where)
        return sorted(
            text if len(places) > 1 else f"at the {places.pop()} layer: {text}"
            for text, places in found.items()
        )

    def nothing_of(self) -> Iterator[tuple[Parameter, str]]:
        """Yield the models that a parameter leaves nothing of, wherever they take part."""
        found: dict[tuple[Parameter, str], set[float]] = {}
        for parameter, model, schedule in self.schedules():
            if parameter.above_low and model is not None:
                found.setdefault((parameter, model), set()).update(schedule.every_value())
        yield from (key for key, values in found.items() if values == {key[0].low})

    def in_need_of_one_number(self) -> list[Parameter]:
        """Return the parameters whose value needs one number for whole models, and lacks it."""
        varying = {p.name for p, _, schedule in self.schedules() if schedule.varies}
        return [
            parameter
            for parameter in self.method.parameters
            if parameter.same_for_all
            and self.values.get(parameter.name) != parameter.default
            and (parameter.same_for_all in varying or self.is_stack)
        ]

    def schedules(self, part: Slice | None = None) -> list[tuple[Parameter, str | None, Schedule]]:
        """Return the numbers of each model, and those of all models, whose model is None.

        Of a slice if one is given, else of all.
        """
        found: dict[tuple[str, str | None, Schedule], Parameter] = {}
        for parameter in self.method.parameters:
            for each in self.slices if part is None else [part]:
                owners = [(s.model, s.values) for s in each.sources]
                for owner, values in [(None, {**self.values, **each.values}), *owners]:
                    value = values.get(parameter.name)
                    if isinstance(value, Schedule):
                        found[parameter.name, owner, value] = parameter
        return [(parameter, owner, value) for (_, owner, value), parameter in found.items()]


def with_dtype(recipe: Recipe, asked: str | None) -> Recipe:
    """Return the recipe with the dtype that an option asks for, if one does."""
    dtype = "" if asked == "auto" else asked
    if dtype is None or dtype == recipe.dtype:
        return recipe
    text = "" if recipe.embedding_source is None else recipe.text  # of mergekit's form it is stale
    return replace(recipe, dtype=dtype, text=text)


def random_key(seed: int, name: str, model: int) -> int:
    """Return the key of a random mask: 64 bits, of the seed, the tensor and the model's number."""
    text = f"{seed}\0{name}\0{model}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def described(recipe: Recipe) -> str:
    """Return the method's equation, and how this recipe departs from it."""
    changed = [
        parameter.words[bool(value)] or f"without {parameter.name}"
        for parameter in recipe.method.parameters
        if parameter.is_switch
        and (value := recipe.values.get(parameter.name, parameter.default)) != parameter.default
    ]
    here = f"; here {', '.join(changed)}" if changed else ""
    return f"{recipe.method.equation}{here}"


def table(recipe: Recipe) -> str:
    """Return a recipe as text, one model or slice a line."""
    if recipe.embedding_source is not None:
        return _stack_table(recipe)
    of_models = [p.name for p in recipe.method.parameters if p.per_model]
    rows: list[tuple[str, ...]] = [("model", *["layers"] * recipe.is_stack, *of_models)]
    listed = [source.model for part in recipe.slices for source in recipe.operands(part)]
    if recipe.base is not None and recipe.base not in listed:
        rows.append((recipe.base, "donor only"))
    lines = [f"method: {', '.join([recipe.method.name, *_of_all(recipe, recipe.slices[0])])}"]
    if recipe.is_stack:
        lines = [f"method: {recipe.method.name}, {sum(map(_depth, recipe.slices))} layers"]
    for number, part in enumerate(recipe.slices):
        if recipe.is_stack:
            rows.append((", ".join([f"slice {number}", *_of_all(recipe, part)]),))
        rows += _rows(recipe, part, of_models)
    settings = {"tokenizer": recipe.tokenizer, "dtype": recipe.dtype}
    lines += aligned(rows) + [f"{key}: {value}" for key, value in settings.items() if value]
    return "\n".join([*lines, *recipe.notes])


def _rows(recipe: Recipe, part: Slice, of_models: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each of the models of a slice: what it is, or its numbers."""
    rows = []
    for n, source in enumerate(recipe.operands(part)):
        layers = [_range(source)] if source.layers is not None else []
        numbers = [str(source.values[name]) for name in of_models if name in source.values]
        if recipe.method.base == OPERAND:
            numbers = [f"t = {n}"]
        elif recipe.takes_base and n == 0:
            numbers = ["base"]
        rows.append((source.model, *layers, *numbers))
    return rows


def _of_all(recipe: Recipe, part: Slice) -> list[str]:
    """Return the values that hold for all models of a slice, as text."""
    found: list[str] = []
    for parameter in recipe.method.parameters:
        value = {**recipe.values, **part.values}.get(parameter.name)
        if isinstance(value, bool):
            found += filter(None, [parameter.words[value]])
        elif value is not None and (not parameter.with_base or recipe.takes_base):
            found.append(f"{parameter.name} = {value}")
    return found


def _depth(part: Slice) -> int:
    return len(part.sources[0].layers or ())


def _range(source: Source) -> str:
    layers = source.layers or range(0)
    return f"{layers.start} to {layers.stop}, exclusive"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, their columns aligned; below the first, rows of one cell are titles."""
    columns = max(map(len, rows))
    cells = [[*row, *[""] * (columns - len(row))] for row in rows]
    counted = [rows[0], *(row for row in rows[1:] if len(row) > 1)]
    widths = [
        max((len(row[i]) for row in counted if i < len(row)), default=0) for i in range(columns)
    ]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _stack_table(recipe: Recipe) -> str:
    rows: list[tuple[str, ...]] = []
    depth = 0
    for part in recipe.slices:
        (source,) = part.sources
        depth += _depth(part)
        scale = part.values["scale"]
        scaled = f", scale {scale}" if scale != Factors() else ""
        rows.append((source.model, f"layers {_range(source)}{scaled}"))
    return "\n".join(
        [
            f"stack of {depth} layers",
            *aligned(rows),
            f"embedding and tokenizer: {recipe.embedding_source}",
            f"final norm and head: {recipe.lm_head_source}",
        ]
    )
