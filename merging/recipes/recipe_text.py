"""A recipe as YAML from which the same recipe is read, for the cards of models made by options."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from merging.recipes.declarations import DONOR, OPERAND, Parameter
from merging.recipes.numbers import Schedule
from merging.recipes.recipe import Recipe, Slice, Source, Value
from merging.recipes.recipe_values import NOT_MERGEKITS

PLAIN = re.compile(r"(?!(true|false|null)$)([a-z]|\.{0,2}/|~/)[\w./@+-]*", re.IGNORECASE)


def as_yaml(recipe: Recipe) -> str:
    """Return the YAML of a recipe of methods, for `--recipe`."""
    method = recipe.method
    base, slices = recipe.base, recipe.slices
    if base is None and method.base == OPERAND:  # the first of two: in YAML, the base
        (part,) = slices
        base, slices = part.sources[0].model, (Slice(part.sources[1:], part.values),)
    listed = {source.model for part in slices for source in part.sources}
    content: dict[str, Any] = {"merge_method": method.name}
    if base is not None:
        is_donor = method.base == DONOR and base not in listed and not recipe.is_stack
        content["donor" if is_donor else "base_model"] = base
        if method.base != DONOR and base in listed:
            content["merge_base"] = True
    if recipe.is_stack:
        content["slices"] = [_slice(recipe, part) for part in slices]
        content |= _values(recipe, recipe.values, per_model=False)
    else:
        content["models"] = [_source(recipe, source) for source in slices[0].sources]
        content |= _values(recipe, {**recipe.values, **slices[0].values}, per_model=False)
    given = [recipe.values, *(part.values for part in slices)]
    given += [source.values for part in slices for source in part.sources]
    if any(_is_beyond(recipe, p) and _is_given(p, v) for p in method.parameters for v in given):
        content["beyond_mergekit"] = True
    return _dumped(content | _settings(recipe))


def _is_beyond(recipe: Recipe, parameter: Parameter) -> bool:
    """Whether mergekit's method of that name does not read a parameter."""
    return parameter.name in NOT_MERGEKITS.get(recipe.method.name, ())


def _is_given(parameter: Parameter, values: Mapping[str, Value]) -> bool:
    """Whether a parameter has a value other than its default."""
    value = values.get(parameter.name)
    return value is not None and _plain(value) != parameter.default


def _slice(recipe: Recipe, part: Slice) -> dict[str, Any]:
    sources = [*([part.base] if part.base else []), *part.sources]
    content: dict[str, Any] = {"sources": [_source(recipe, source) for source in sources]}
    return content | _values(recipe, part.values, per_model=False)


def _source(recipe: Recipe, source: Source) -> dict[str, Any]:
    content: dict[str, Any] = {"model": source.model}
    if source.layers is not None:
        content["layer_range"] = [source.layers.start, source.layers.stop]
    return content | _values(recipe, source.values, per_model=True)


def _values(recipe: Recipe, values: Mapping[str, Value], per_model: bool) -> dict[str, Any]:
    """Return the key `parameters` of one level, if it has any."""
    found = {
        p.name: _plain(value)
        for p in recipe.method.parameters
        if p.per_model == per_model and (value := values.get(p.name)) is not None
        if not _is_beyond(recipe, p) or _is_given(p, values)
    }
    return {"parameters": found} if found else {}


def _plain(value: Value) -> Any:
    """Return a parameter's value as YAML has it: a number, a list, or a list of {filter, value}."""
    if not isinstance(value, Schedule):
        return value
    if not value.filters:
        return _numbers(value.values)
    entries = [
        {"filter": word if value.anywhere else f".{word}.", "value": _numbers(numbers)}
        for word, numbers in value.filters
    ]
    return [*entries, *([{"value": _numbers(value.values)}] if value.values else [])]


def _numbers(values: Sequence[float]) -> float | list[float]:
    return values[0] if len(values) == 1 else list(values)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says of dtype, tokenizer and chat template."""
    found: dict[str, Any] = {"dtype": recipe.dtype} if recipe.dtype else {}
    if recipe.pad_to_multiple_of is not None:
        padding = {"pad_to_multiple_of": recipe.pad_to_multiple_of}
        found["tokenizer"] = {"source": recipe.tokenizer or "base", **padding}
    elif recipe.tokenizer is not None:
        found["tokenizer_source"] = recipe.tokenizer
    if recipe.chat_template != "auto":
        found["chat_template"] = recipe.chat_template
    return found


def _dumped(content: Mapping[str, Any]) -> str:
    """Return YAML in which every text is read as text, by whatever rules numbers are found."""
    import yaml

    def text(dumper: Any, value: str) -> Any:
        style = None if PLAIN.fullmatch(value) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    dumper: Any = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    dumper.add_representer(str, text)
    written: str = yaml.dump(
        dict(content), Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000,
        default_flow_style=None,
    )  # fmt: skip
    return written
