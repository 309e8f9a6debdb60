"""The models of a recipe: whole ones, or slices of their layers, each with its parameters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.recipes.declarations import DONOR, OPERAND, Parameter
from merging.recipes.methods import PASSTHROUGH
from merging.recipes.model_names import split_adapter
from merging.recipes.numbers import Schedule
from merging.recipes.recipe import Slice, Source
from merging.recipes.recipe_values import PARAMETERS, Reader, Values, read_values, resolved
from merging.recipes.yaml_files import (
    A_MODEL,
    Document,
    Fields,
    is_count,
    is_list,
    is_name,
    kind,
)

RANGE = re.compile(r"\s*\[?\s*([0-9]+)\s*,\s*([0-9]+)\s*\]?\s*")
MISPLACED = {name: "write it under `parameters`" for name in PARAMETERS}
REFUSED_OF_A_SOURCE = {**MISPLACED, "revision": "write it behind the model's name: NAME@REVISION"}
REFUSED_OF_A_MODEL = {
    **REFUSED_OF_A_SOURCE,
    "layer_range": "whole models have none; list them as sources of `slices`",
}
REFUSED_OF_A_SLICE = {
    **MISPLACED,
    "residual_weight": "nothing here has it; passthrough has a `scale`, with filters",
}


@dataclass(frozen=True)
class Listed:
    """A source as a recipe lists it."""

    model: str
    values: Values
    path: str
    layers: range | None = None


def is_anything(value: Any) -> bool:
    return True


# -------------------------------------------------------------------- reading


def read_model(document: Document, value: Any, path: str) -> str | None:
    """Return a model's name, which mergekit also writes as a mapping."""
    if isinstance(value, dict):
        no_class = {"override_architecture": "a model is of the class that its config names"}
        fields = Fields(document, value, path, ("model", "lora"), no_class)
        parts = [_read_path(document, fields, key) for key in ("model", "lora") if key in fields]
        value = "+".join(filter(None, parts)) if "model" in fields else None
    if not is_name(value):
        document.wrong(path, f"expected {A_MODEL}, found {kind(value)}")
        return None
    try:
        split_adapter(value.strip())
    except ValueError as error:
        document.wrong(path, str(error))
    return str(value).strip()


def _read_path(document: Document, fields: Fields, key: str) -> str | None:
    """Return the name of a model in a mapping: a text, or a mapping of path and revision."""
    value = fields.take(key, is_anything, "", None)
    if not isinstance(value, dict):
        return value if is_name(value) else None
    inner = Fields(document, value, fields.at(key), ("path", "revision"))
    path = inner.take("path", is_name, A_MODEL)
    revision = inner.take("revision", lambda v: v is None or is_name(v), "a revision", None)
    return f"{path}@{revision}" if revision else path


def read_models(reader: Reader, entries: Sequence[Any], outer: Values) -> list[Slice]:
    """Return whole models as the one slice that they are."""
    listed = [_read_source(reader, e, f"models[{i}]", whole=True) for i, e in enumerate(entries)]
    others = [source for source in listed if not reader.is_base(source.model)]
    if reader.method.base == DONOR and not reader.only_donor:
        if reader.base is not None and reader.base not in [source.model for source in listed]:
            others.append(Listed(reader.base, {}, "base_model"))  # which mergekit merges too
    _check_once(reader, listed)
    return [_complete(reader, others, [outer], "models")]


def read_slices(reader: Reader, entries: Sequence[Any], outer: Values) -> list[Slice]:
    return [_read_slice(reader, entry, f"slices[{i}]", outer) for i, entry in enumerate(entries)]


def _read_slice(reader: Reader, entry: Any, path: str, outer: Values) -> Slice:
    document = reader.document
    known = ("sources", "parameters", "base_model")
    fields = Fields(document, entry, path, known, REFUSED_OF_A_SLICE)
    own, place = fields.take("base_model", is_anything, "", None), fields.at("base_model")
    if own is not None and read_model(document, own, place) not in (None, reader.base):
        document.wrong(place, "one base is for all slices; write it at the top")
    entries = fields.take("sources", is_list, "a list of sources") or ()
    given = fields.take("parameters", is_anything, "", None)
    values = read_values(reader, given, fields.at("parameters"), "slice")
    path = fields.at("sources")
    listed = [_read_source(reader, e, f"{path}[{i}]", whole=False) for i, e in enumerate(entries)]
    others = [source for source in listed if not reader.is_base(source.model)]
    bases = [source for source in listed if reader.is_base(source.model)]
    _check_once(reader, listed)
    if reader.is_base(reader.base) and entries and not bases:
        document.wrong(path, f"{reader.base}, the base, must be among them, with its layers")
    if len({len(source.layers or ()) for source in listed if source.layers}) > 1:
        found = ", ".join(str(len(source.layers or ())) for source in listed)
        document.wrong(path, f"expected as many layers of each source, found {found}")
    part = _complete(reader, others, [values, outer], path)
    held = [Source(s.model, {}, s.layers, document.at(f"{s.path}.layer_range")) for s in bases]
    return Slice(part.sources, part.values, held[0] if held else None)


def _read_source(reader: Reader, entry: Any, path: str, whole: bool) -> Listed:
    """Read an entry of models, or of the sources of a slice."""
    document = reader.document
    if whole:
        fields = Fields(document, entry, path, ("model", "parameters"), REFUSED_OF_A_MODEL)
    else:
        known = ("model", "layer_range", "parameters")
        fields = Fields(document, entry, path, known, REFUSED_OF_A_SOURCE)
    if not isinstance(entry, dict):
        return Listed("", {}, path)
    model = read_model(document, fields.take("model", is_anything, "", None), fields.at("model"))
    given = fields.take("parameters", is_anything, "", None)
    owner = "base" if reader.is_base(model) else "source"
    values = read_values(reader, given, fields.at("parameters"), owner)
    place = fields.at("layer_range")
    layers = None if whole else _read_layers(document, entry.get("layer_range"), place)
    return Listed(model or "", values, path, layers)


def _read_layers(document: Document, value: Any, path: str) -> range:
    """Return a range of layers: two numbers in a list, or in a text."""
    match = RANGE.fullmatch(value) if isinstance(value, str) else None
    numbers = [*match.groups()] if match else value
    if isinstance(numbers, list):  # in quotes, perhaps
        numbers = [int(n) if isinstance(n, str) and n.isdecimal() else n for n in numbers]
    if not (isinstance(numbers, list) and len(numbers) == 2 and all(map(is_count, numbers))):
        document.wrong(path, f"expected [first layer, layer after the last], found {kind(value)}")
        return range(0)
    if not numbers[0] < numbers[1]:
        document.wrong(path, f"expected a layer after the last that is above it, found {numbers}")
    return range(*numbers)


# -------------------------------------------------------------------- putting it together


def _check_once(reader: Reader, listed: Sequence[Listed]) -> None:
    bases = [source for source in listed if reader.is_base(source.model)]
    for source in bases[1:]:
        reader.document.wrong(source.path, f"{reader.base} is the base, and is listed already")


def _complete(
    reader: Reader, listed: Sequence[Listed], levels: Sequence[Values], path: str
) -> Slice:
    """Return a slice of sources that have all numbers of a model; the slice has the others.

    `levels` are the values that hold where a source has none, the slice's before the recipe's.
    """
    document, method = reader.document, reader.method
    _check_count(reader, len(listed), path)
    sources = []
    for source in listed:
        values = {
            p.name: resolved(p, [source.values, *levels]) for p in method.parameters if p.per_model
        }
        for name in (p.name for p in method.parameters if p.per_model and _is_missing(values, p)):
            document.wrong(
                source.path,
                f"{method.name} needs a {name} of {source.model or 'it'}: give it under its "
                "`parameters`, or those at the top",
            )
        where = document.at(f"{source.path}.layer_range")
        sources.append(Source(source.model, values, source.layers, where))
    inner = [source.values for source in listed] if method is PASSTHROUGH else []
    of_all = [p for p in method.parameters if not p.per_model and (p.is_number or p.is_switch)]
    values = {p.name: resolved(p, [*inner, *levels]) for p in of_all}
    for name in (p.name for p in of_all if _is_missing(values, p)):
        document.wrong("parameters", f"{method.name} needs {name}")
    return Slice(tuple(sources), values)


def _is_missing(values: Values, parameter: Parameter) -> bool:
    """Whether nobody gives a number, for no tensor."""
    value = values[parameter.name]
    return isinstance(value, Schedule) and not (value.values or value.filters)


def may_be_alone(reader: Reader) -> bool:
    """Whether the base can be there without others: published recipes copy one so."""
    return reader.is_base(reader.base) and reader.method.models == (1, None)


def _check_count(reader: Reader, count: int, path: str) -> None:
    """Find too few or too many models, the base of changes not counted."""
    method = reader.method
    fewest, most = method.models
    if count == 0 and may_be_alone(reader):
        return
    if reader.base is not None and method.base == OPERAND:
        count += 1
    besides = " besides the base" if reader.is_base(reader.base) and method.base != OPERAND else ""
    if not fewest <= count <= (most or count):
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
        reader.document.wrong(path, f"{method.name} merges {wanted} models{besides}, found {count}")
