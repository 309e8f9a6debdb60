"""Write the model card of an output: what it was made of and how, for people and for the Hub.

Everything is read from the inputs' own folders; no network is used.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from merging.models.checkpoints import Checkpoint
from merging.models.hub import origin
from merging.recipes.model_names import split_adapter
from merging.recipes.recipe import Recipe, described, table
from merging.recipes.recipe_text import as_yaml
from merging.recipes.user_files import read_text

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")
LARGEST = 1_000_000  # bytes of a card that is read


def model_card(
    title: str,
    inputs: Sequence[Checkpoint],
    recipe: Recipe,
    notes: Sequence[str],
    made_by: Mapping[str, str],
    picture: str | None = None,
) -> str:
    """Return a model card: metadata that the Hub understands, and a description.

    `made_by` is the command, and the text of the file that it reads, if any, by language; without
    such a file, the recipe is put in words. `picture` is a file beside the card.
    """
    method = "layer stack" if recipe.is_stack and recipe.copies else recipe.method.name
    if "yaml" not in made_by:
        made_by = {**made_by, "yaml": recipe.text or as_yaml(recipe)}
    sources = [source for checkpoint in inputs for source in _sources(checkpoint)]
    origins = {name: origin(name, folder) for name, folder in sources}
    ids = [found[0] for found in origins.values() if found]
    data = ModelCardData(
        base_model=list(dict.fromkeys(ids)) or None,  # the Hub takes nothing but its own ids here
        base_model_relation="merge" if ids else None,
        library_name="transformers",
        tags=["merge", method.replace(" ", "-")],
        **_agreed([folder for _, folder in sources]),
    )
    models = [
        f"- {_code(name)}" + (f", revision `{found[1]}`" if found else ", a local directory")
        for name, found in origins.items()
    ]
    link = f" ([{recipe.method.paper}]({recipe.method.link}))" if recipe.method.link else ""
    body = [
        f"# {_code(title)}",
        "A merge of language models, tensor by tensor.",
        "## Method",
        f"{method}: {described(recipe)}{link}",
        _fenced("\n".join([table(recipe), *notes]), "text"),
        *([f"![What it does to the models, layer by layer]({picture})"] if picture else []),
        "## Models",
        "\n".join(models),
        "## Made by",
        *(_fenced(text, language) for language, text in made_by.items()),
        f"With Python {sys.version.split()[0]}, {_versions()}.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _code(text: str) -> str:
    """Return a name as code in a line, whatever is in it."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return ticks + space + re.sub(r"\s", " ", text) + space + ticks


def _fenced(text: str, language: str) -> str:
    """Return a block of code, whatever is in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    content = text.removesuffix("\n")  # nothing else: in YAML, blank lines and indents may count
    return f"{ticks}{language}\n{content}\n{ticks}"


def _sources(checkpoint: Checkpoint) -> list[tuple[str, Path]]:
    """Return the names and folders of a model and of its adapter, if it has one."""
    model, adapter = split_adapter(checkpoint.name)
    if adapter is None or checkpoint.adapter is None:
        return [(checkpoint.name, checkpoint.folder)]
    return [(model, checkpoint.folder), (adapter, checkpoint.adapter)]


def _agreed(folders: Sequence[Path]) -> dict[str, Any]:
    """Return what the cards of all inputs say alike of licence and language."""
    cards = [_metadata(folder) for folder in folders]
    agreed: dict[str, Any] = {}
    languages = [_languages(card.get("language")) for card in cards]
    if languages[0] and all(set(found) == set(languages[0]) for found in languages):
        agreed["language"] = languages[0]
    keys = ("license", "license_name", "license_link")
    licences = [{key: card[key] for key in keys if key in card} for card in cards]
    licence = licences[0].get("license")
    is_valid = isinstance(licence, str) and re.fullmatch(r"[a-z0-9.-]+", licence)
    if is_valid and all(_is_line(value) for value in licences[0].values()):
        agreed |= licences[0] if all(found == licences[0] for found in licences) else {}
    return agreed


def _languages(value: object) -> list[str]:
    """Return the languages of a card; YAML reads Norwegian's `no` as false."""
    listed = value if isinstance(value, list) else [value]
    codes = ["no" if code is False else code for code in listed]
    return [code for code in codes if _is_line(code)]  # type: ignore[misc]


def _is_line(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value.splitlines()) == 1


def _metadata(folder: Path) -> dict[str, Any]:
    if not (folder / "README.md").is_file():
        return {}
    try:
        read_text(folder / "README.md", LARGEST)
        return dict(metadata_load(folder / "README.md") or {})
    except (ValueError, OSError, RecursionError, YAMLError):  # what cannot be read says nothing
        return {}
