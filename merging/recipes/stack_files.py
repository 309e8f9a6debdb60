"""The YAML file of bakllama.py: slices of layers, and where the tensors around them come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.problems import refuse
from merging.recipes.methods import PASSTHROUGH
from merging.recipes.model_names import split_adapter
from merging.recipes.numbers import Factors
from merging.recipes.recipe import Recipe, Slice, Source
from merging.recipes.yaml_files import (
    A_MODEL,
    Document,
    Fields,
    is_count,
    is_list,
    is_name,
    is_number,
    kind,
    read_yaml,
)

SOURCES = ("embedding_source", "lm_head_source")


def read_stack(path: Path) -> Recipe:
    """Read and check the file of a stack; Problems list all that is wrong, with its key's path."""
    document = read_yaml(path)
    top = Fields(document, document.content, "", ("layer_slices", *SOURCES))
    entries = top.take("layer_slices", is_list, "a list of at least one slice")
    slices = [
        _read_slice(document, entry, f"layer_slices[{i}]") for i, entry in enumerate(entries or ())
    ]
    embedding, head = (
        top.take(key, lambda value: value is None or is_name(value), A_MODEL, None)
        for key in SOURCES
    )
    named = [source.model for part in slices for source in part.sources] + [embedding, head]
    for model in filter(None, named):
        try:
            split_adapter(model)
        except ValueError as error:
            document.problems.append(f"{path}: {error}")
    refuse(document.problems)
    embedding = embedding or named[0]
    return Recipe(
        PASSTHROUGH,
        tuple(slices),
        embedding_source=embedding,
        lm_head_source=head or named[len(slices) - 1],
        asks_for_head=head not in (None, embedding),
        text=document.text,
        chat_template="donor",  # that of where the embedding is from, as its tokenizer
    )


def _read_slice(document: Document, entry: Any, path: str) -> Slice:
    fields = Fields(document, entry, path, ("model", "start", "end", "scale"))
    model = fields.take("model", is_name, A_MODEL)
    start, end = (
        fields.take(key, is_count, "a layer number of at least 0") for key in ("start", "end")
    )
    if start is not None and end is not None and not start < end:
        document.wrong(path, f"expected start < end, found start {start} and end {end}")
    scale = fields.take(
        "scale",
        lambda value: is_number(value) or isinstance(value, dict),
        "a finite number, or a mapping from module names to numbers",
        1.0,
    )
    if isinstance(scale, Mapping):
        for module, factor in scale.items():
            if not is_name(module):
                document.wrong(f"{path}.scale", f"expected names of modules, found {kind(module)}")
            elif not is_number(factor):
                document.wrong(
                    f"{path}.scale.{module}", f"expected a finite number, found {kind(factor)}"
                )
    source = Source(model, layers=range(start or 0, end or 0), where=document.at(path))
    return Slice((source,), {"scale": Factors(scale)})
