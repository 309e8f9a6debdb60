"""The parameters of a recipe: numbers, gradients and filters, as mergekit reads them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merging.recipes.declarations import DONOR, Method, Parameter
from merging.recipes.methods import METHODS, PASSTHROUGH
from merging.recipes.numbers import Schedule, is_too_small
from merging.recipes.yaml_files import Document, Fields, is_number, kind

Values = Mapping[str, Any]  # of parameters, by name

# Parameters of ours that mergekit's method of that name does not read. They have an effect where
# the recipe says `beyond_mergekit: true`, as those that are made by options do.
NOT_MERGEKITS = {
    "karcher": ("weight",),
    **dict.fromkeys(
        "nuslerp multislerp model_stock sce ram ramplus_tl nearswap arcee_fusion".split(),
        ("lambda",),
    ),
}
# What mergekit reads and nothing here does, with the value that asks for what is done here.
ONLY: Mapping[str, Mapping[str, bool]] = {
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"normalize_weights": True},
    "model_stock": {"filter_wise": False},
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties"), {"rescale": False}),
}
# What mergekit reads, or has read, to steer its speed or the way to a result.
WITHOUT_EFFECT = ("int8_mask", "max_iter", "tol", "eps", "embed_slerp")
PARAMETERS = {p.name for m in (*METHODS.values(), PASSTHROUGH) for p in m.parameters}
KNOWN = PARAMETERS.union(WITHOUT_EFFECT, *ONLY.values())
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
A_NUMBER = "a number, a list of numbers, or a list of {filter, value}"


@dataclass(frozen=True)
class Reader:
    """What the values of a recipe are read with, and what of it has no effect, by reason."""

    document: Document
    method: Method
    base: str | None = None  # or the donor
    beyond: bool = False  # whether parameters that mergekit does not read have an effect
    merges_base: bool = False  # whether the base is merged too, where it is listed
    only_donor: bool = False  # whether the base gives config and tokenizer alone
    idle: dict[str, list[str]] = field(default_factory=dict)

    def is_base(self, model: str | None) -> bool:
        """Whether a model that is listed is what the others are compared with."""
        return model == self.base is not None and self.method.base != DONOR and not self.merges_base

    def without_effect(self, path: str, reason: str = "") -> None:
        self.idle.setdefault(reason, []).append(path)

    def notes(self) -> tuple[str, ...]:
        """Return lines on what is accepted and has no effect."""
        lines = [
            f"no effect here{f' ({reason})' if reason else ''}: {', '.join(paths)}"
            for reason, paths in self.idle.items()
        ]
        return tuple(lines)


def is_per_source(parameter: Parameter, method: Method) -> bool:
    """Whether a source may have its own: a number of a model, or the scale of the only source."""
    return parameter.per_model or method is PASSTHROUGH


def read_values(reader: Reader, content: Any, path: str, owner: str) -> Values:
    """Return the parameters that one level of a recipe gives the method.

    `owner` is whose they are: "recipe", "slice", "source", or "base", which takes no numbers of a
    model.
    """
    document, method = reader.document, reader.method
    if content is None:
        return {}
    if not isinstance(content, dict):
        document.wrong(path, f"expected a mapping of parameters, found {kind(content)}")
        return {}
    found: dict[str, Any] = {}
    own = {parameter.name: parameter for parameter in method.parameters}
    for name, value in content.items():
        place = f"{path}.{name}"
        parameter = own.get(name)
        only = ONLY.get(method.name, {}).get(name)
        if parameter is not None:
            if not (reason := _idle(reader, parameter, owner)):
                found[name] = read_value(reader, value, place, parameter)
            else:
                reader.without_effect(place, reason)
        elif only is not None:
            if _switch(value) is not only:
                document.wrong(place, f"only {str(only).lower()} is done here; leave it out")
        elif name in KNOWN:
            reader.without_effect(place, "" if name in WITHOUT_EFFECT else f"of {method.name}")
        else:
            document.wrong(place, f"unknown parameter; {method.name} takes {listed(own)}")
    return found


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _idle(reader: Reader, parameter: Parameter, owner: str) -> str:
    """Say why a parameter of the method has no effect where it stands; nothing if it has."""
    name, method = parameter.name, reader.method
    if name in NOT_MERGEKITS.get(method.name, ()) and not reader.beyond:
        return f"mergekit's {method.name} has no {name}; `beyond_mergekit: true` gives it one"
    if parameter.with_base and reader.base is None:
        return f"{name} scales the change to a base, and there is none"
    if owner == "base" and parameter.per_model:
        return "the base is what the others are compared with"
    if owner in ("source", "base") and not is_per_source(parameter, method):
        return f"one {name} is for all models, and stands beside them"
    if owner == "slice" and not (parameter.is_number or parameter.is_switch):
        return f"one {name} is for the whole recipe"
    return ""


def read_value(reader: Reader, value: Any, path: str, parameter: Parameter) -> Any:
    """Return a parameter's value: a switch, a choice, a seed, or a number's schedule."""
    document = reader.document
    if parameter.is_number:
        return _schedule(reader, value, path, parameter)
    if parameter.is_switch:
        if (switch := _switch(value)) is None:
            document.wrong(path, f"expected true or false, found {kind(value)}")
        return switch
    if parameter.choices:
        if value not in parameter.choices:
            document.wrong(path, f"expected {' or '.join(parameter.choices)}, found {kind(value)}")
        return value
    if not (isinstance(value, int) and not isinstance(value, bool) and parameter.allows(value)):
        document.wrong(path, f"expected a whole number in {parameter.range}, found {kind(value)}")
    return value


def _switch(value: Any) -> bool | None:
    """Return a switch, which recipes also write as 1.0, or yes; None if it is none."""
    if isinstance(value, str):
        value = WORDS.get(value.lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _schedule(reader: Reader, value: Any, path: str, parameter: Parameter) -> Schedule:
    """Return the schedule of a number, a list, or a list of {filter, value}, the first wins."""
    entries = [value] if isinstance(value, dict) else value
    if not (isinstance(entries, list) and any(isinstance(entry, dict) for entry in entries)):
        return Schedule(_numbers(reader.document, value, path, parameter), anywhere=True)
    filters: list[tuple[str, tuple[float, ...]]] = []
    rest: tuple[float, ...] = ()
    for i, entry in enumerate(entries):
        place = path if entries is not value else f"{path}[{i}]"
        fields = Fields(reader.document, entry, place, ("filter", "value"))
        word = fields.take("filter", _is_filter, "a part of the names of tensors, or *", None)
        given = fields.take("value", lambda value: value is not None, "a number or a list")
        if given is None:
            continue
        numbers = _numbers(reader.document, given, fields.at("value"), parameter)
        if rest or word in dict(filters):
            reader.without_effect(place, "one before it holds")
        elif word is None or word == "*":
            rest = numbers
        else:
            filters.append((word, numbers))
    return Schedule(rest, tuple(filters), anywhere=True)


def _is_filter(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value))


def _numbers(document: Document, value: Any, path: str, parameter: Parameter) -> tuple[float, ...]:
    """Return the numbers of a gradient, or the only one; recipes may have them in quotes."""
    entries = value if isinstance(value, list) else [value]
    numbers = [_unquoted(entry) for entry in entries]
    if not numbers or not all(map(is_number, numbers)):
        document.wrong(path, f"expected {A_NUMBER}, found {kind(value)}")
        return (1.0,)  # to go on with
    for number in numbers:
        if not parameter.allows(number):
            found = f"expected {parameter.name} in {parameter.range}, found {number:g}"
            document.wrong(path, found)
        elif is_too_small(number):
            document.wrong(path, f"{number:g} is too small to compute with")
    return tuple(float(number) for number in numbers)


def _unquoted(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def resolved(parameter: Parameter, levels: Sequence[Values]) -> Any:
    """Return what holds of a parameter's values, the innermost first; then its default.

    Where a schedule has no value for a tensor, the next one's holds.
    """
    default = parameter.default
    if parameter.recipe_default is not ...:
        default = parameter.recipe_default
    given = [values[parameter.name] for values in levels if parameter.name in values]
    if not parameter.is_number:
        return given[0] if given else default
    filters: list[tuple[str, tuple[float, ...]]] = []
    for schedule in given:
        filters += [pair for pair in schedule.filters if pair[0] not in dict(filters)]
        if schedule.values:
            return Schedule(schedule.values, tuple(filters), anywhere=True)
    rest = () if default is None else (float(default),)
    return Schedule(rest, tuple(filters), anywhere=True)
