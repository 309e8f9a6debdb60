"""The recipes of mergekit, as published on model cards: YAML that says what to merge and how.

What a key means is what mergekit 0.1.5 takes it for. Nothing is ignored in silence: what has no
effect is said, and what nothing here does is refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging.problems import Problems, reading, refuse
from merging.recipes.chat_templates import BY_NAME as TEMPLATES
from merging.recipes.declarations import DONOR, OPERAND, ORIGIN
from merging.recipes.methods import METHODS, PASSTHROUGH
from merging.recipes.model_names import as_path
from merging.recipes.numbers import Schedule
from merging.recipes.recipe import Recipe, Slice, Source
from merging.recipes.recipe_sources import (
    MISPLACED,
    is_anything,
    read_model,
    read_models,
    read_slices,
)
from merging.recipes.recipe_values import Reader, Values, read_values, resolved
from merging.recipes.user_files import read_text
from merging.recipes.word_options import LARGEST_MULTIPLE
from merging.recipes.yaml_files import (
    LARGEST,
    Document,
    Fields,
    is_count,
    is_list,
    is_name,
    kind,
    parse_yaml,
)

FENCE = re.compile(r"( *)(`{3,}|~{3,}) *(\w*)[^`]*")
IS_RECIPE = re.compile(r"^ *([\"']?)merge_method\1 *:", re.MULTILINE)
DTYPES = ("float16", "bfloat16", "float32", "float64")
KEYS = (
    "merge_method base_model models slices parameters dtype out_dtype tokenizer_source tokenizer "
    "chat_template"
).split()
OWN = ("donor", "merge_base", "beyond_mergekit")  # what options can say, and mergekit's YAML cannot
# Keys that mergekit does not read in a recipe, though people write them there.
IDLE = (
    "name lazy_unpickle low_cpu_memory read_to_gpu multi_gpu cuda device num_threads async_write "
    "write_threads out_shard_size clone_tensors copy_tokenizer"
).split()
REFUSED = {
    **MISPLACED,
    "layer_slices": "a stack of bakllama.py: give the file to that",
    "modules": "no model is merged by modules here; if it is `default` alone, write what is under "
    "it at the top",
}
BY_NAME = {**METHODS, PASSTHROUGH.name: PASSTHROUGH}


def read_recipe(path: Path) -> Recipe:
    """Read and check the recipe of a file, or the first of a model card.

    Problems list all that is wrong with it, with its key's path and line.
    """
    document, notes = _find(path)
    top = Fields(document, document.content, "", (*KEYS, *OWN), REFUSED, IDLE)
    methods = ", ".join(BY_NAME)
    name = top.take("merge_method", lambda v: str(v) in BY_NAME, f"one of {methods}")
    if name is None:
        raise Problems(*document.problems)
    reader = _reader(document, top, str(name))
    for key in filter(top.__contains__, IDLE):
        reader.without_effect(key)
    outer = read_values(
        reader, top.take("parameters", is_anything, "", None), "parameters", "recipe"
    )
    slices = _slices(reader, top, outer)
    settings = _settings(document, top)
    alone = [f"slices[{i}]" for i, part in enumerate(slices) if not part.sources]
    for place in alone if len(alone) < len(slices) else ():
        document.wrong(place, f"expected models besides {reader.base}, as in the other slices")
    refuse(document.problems)
    recipe = _recipe(reader, slices, outer, settings)
    _check_words(document, top, recipe)
    _check_together(reader, recipe)
    return replace(recipe, text=document.text, notes=(*notes, *recipe.notes, *reader.notes()))


# -------------------------------------------------------------------- finding the text


def _find(path: Path) -> tuple[Document, list[str]]:
    """Return the YAML of a file, or of the first block of a model card that has a merge_method."""
    with reading(path, "cannot be read"):
        text = read_text(path, LARGEST)
    if path.suffix.lower() not in (".md", ".markdown"):
        return parse_yaml(str(path), text), []
    found = [block for block in fenced_blocks(text) if IS_RECIPE.search(block[1])]
    if not found:
        raise Problems(f"{path}: no block of YAML with merge_method, as cards of merges have")
    notes = [f"{path} has {len(found)} recipes; this is the first"] if len(found) > 1 else []
    first_line, content = found[0]
    return parse_yaml(str(path), content, first_line), notes


def fenced_blocks(text: str) -> list[tuple[int, str]]:
    """Return the blocks of YAML, or of no language, in Markdown: the first line, the content.

    One that is not closed goes on to the end.
    """
    found: list[tuple[int, str]] = []
    opened: re.Match[str] | None = None
    content: list[str] = []
    for number, line in enumerate([*text.splitlines(), None], 1):
        fence = FENCE.fullmatch(line or "")
        if opened is None:
            opened, content = fence, []
        elif line is None or (fence and fence[2].startswith(opened[2]) and not fence[3]):
            if opened[3].lower() in ("", "yaml", "yml"):
                found.append((number - len(content), "".join(f"{line}\n" for line in content)))
            opened = None
        else:
            indent = min(len(opened[1]), len(line) - len(line.lstrip(" ")))
            content.append(line[indent:])
    return found


# -------------------------------------------------------------------- the top


def _reader(document: Document, top: Fields, name: str) -> Reader:
    """Return what the rest is read with: the method, its base, and our own switches."""
    method = BY_NAME[name]

    def switch(key: str) -> bool:
        return bool(top.take(key, lambda v: isinstance(v, bool), "true or false", False))

    given, donor = (top.take(key, is_anything, "", None) for key in ("base_model", "donor"))
    base = None if given is None else read_model(document, given, "base_model")
    if donor is not None:
        base = read_model(document, donor, "donor")
        if method.base != DONOR or given is not None:
            document.wrong("donor", f"give base_model instead, as {name} takes it")
    elif given is None and method.base in (ORIGIN, OPERAND):
        what = "the model at t = 0" if method.base == OPERAND else method.base.split(" (")[0]
        document.wrong("base_model", f"{name} needs it, {what}")
    return Reader(
        document, method, base, switch("beyond_mergekit"), switch("merge_base"), donor is not None
    )


def _slices(reader: Reader, top: Fields, outer: Values) -> list[Slice]:
    """Return the slices: those of the recipe, or one of whole models."""
    entries = {
        key: given
        for key in ("models", "slices")
        if (given := top.take(key, is_anything, "", None)) is not None
    }
    wrong = [key for key, given in entries.items() if not is_list(given)]
    for key in wrong:
        reader.document.wrong(key, f"expected a list of entries, found {kind(entries[key])}")
    if "slices" in entries and reader.merges_base:
        reader.document.wrong("merge_base", "is for whole `models`; slices list what they merge")
    if len(entries) == 1 and not wrong:
        ((key, listed),) = entries.items()
        return (read_models if key == "models" else read_slices)(reader, listed, outer)
    if len(entries) != 1 and "modules" not in top:
        found = "both" if entries else "neither"
        reader.document.wrong("", f"expected either `models` or `slices`, found {found}")
    return []


def _settings(document: Document, top: Fields) -> dict[str, Any]:
    """Return what the recipe says of dtype, tokenizer and chat template."""
    expected = f"one of {', '.join(DTYPES)}"
    dtypes = [
        str(value).removeprefix("torch.")
        for key in ("out_dtype", "dtype")
        if (value := top.take(key, _is_dtype, expected, None)) is not None
    ]
    found: dict[str, Any] = {"dtype": dtypes[0]} if dtypes else {}
    source = top.take("tokenizer_source", is_anything, "", None)
    words = top.take("tokenizer", is_anything, "", None)
    if source is not None:
        found["tokenizer"] = read_model(document, source, "tokenizer_source")
    if words is not None:
        if source is not None:
            document.wrong("tokenizer", "stands beside tokenizer_source; give one of them")
        found |= _tokenizer(document, words)
    template = top.take("chat_template", lambda v: v is None or is_name(v), "a text", None)
    return found | ({"chat_template": TEMPLATES.get(template, template)} if template else {})


def _is_dtype(value: Any) -> bool:
    return value is None or str(value).removeprefix("torch.") in DTYPES


def _tokenizer(document: Document, content: Any) -> dict[str, Any]:
    """Return what the mapping `tokenizer` says: whose it is, and its padding."""
    own = {"tokens": "tokens with embeddings of their own are not made here"}
    if isinstance(content, Mapping) and not content.get("tokens"):
        own = {}
    fields = Fields(document, content, "tokenizer", ("source", "pad_to_multiple_of", "tokens"), own)
    source = fields.take("source", is_anything, "", "union")
    multiple = fields.take(
        "pad_to_multiple_of",
        lambda v: v is None or (is_count(v) and 1 <= v <= LARGEST_MULTIPLE),
        f"a whole number from 1 to {LARGEST_MULTIPLE}",
        None,
    )
    return {
        "tokenizer": read_model(document, source, "tokenizer.source"),
        "pad_to_multiple_of": multiple,
    }


# -------------------------------------------------------------------- putting it together


def _recipe(
    reader: Reader, slices: list[Slice], outer: Values, settings: Mapping[str, Any]
) -> Recipe:
    method = reader.method
    values = {
        p.name: resolved(p, [outer]) for p in method.parameters if not (p.per_model or p.is_number)
    }
    if not any(part.sources for part in slices):
        copied = [Slice((part.base or Source(str(reader.base)),)) for part in slices]
        notes = (f"only the base is there, so nothing is merged by {method.name}: it is copied",)
        scale = {"scale": Schedule((1.0,))}
        return Recipe(PASSTHROUGH, tuple(copied), reader.base, scale, notes=notes, **settings)
    return Recipe(method, tuple(slices), reader.base, values, **settings)


def _check_words(document: Document, top: Fields, recipe: Recipe) -> None:
    """Find a tokenizer or chat template that nobody has."""
    models = ", ".join(recipe.models)
    if recipe.tokenizer not in (None, "base", "union", *recipe.models):
        path = "tokenizer.source" if "tokenizer" in top else "tokenizer_source"
        expected = f"base, union, or a model that is merged ({models})"
        document.wrong(path, f"expected {expected}, found {recipe.tokenizer}")
    template = recipe.chat_template
    is_text = "{" in template or "\n" in template
    if not (
        is_text or template in ("auto", "donor", *recipe.models) or as_path(template).is_file()
    ):
        known = f"auto, {', '.join(TEMPLATES)}, a model that is merged ({models}), a file or a text"
        document.wrong("chat_template", f"expected {known}, found {template}")


def _check_together(reader: Reader, recipe: Recipe) -> None:
    """Find numbers that do not go together, for the first or the last layer of a slice."""
    for number, part in enumerate(recipe.slices):
        for refusal in recipe.refusals(part):
            reader.document.wrong(f"slices[{number}]" if recipe.is_stack else "models", refusal)
    for parameter, model in recipe.nothing_of():
        found = f"expected {parameter.name} in {parameter.range}, found {parameter.low:g}"
        reader.document.wrong(
            "slices" if recipe.is_stack else "models", f"{found} for all of {model}"
        )
    for parameter in recipe.in_need_of_one_number():
        value, fixed = recipe.values[parameter.name], parameter.same_for_all
        needed = f"{value} needs whole models, and one {fixed} for the whole of each"
        reader.document.wrong(f"parameters.{parameter.name}", needed)
    refuse(reader.document.problems)
