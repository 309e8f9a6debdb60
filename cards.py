"""Write the model card of an output: what it was made of and how, for people and for the Hub.

Everything is read from the inputs' own folders; no network is used.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from checkpoints import Checkpoint
from files import hub_origin, split_adapter

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")


class Method(NamedTuple):
    """What a card says of how the tensors were made."""

    name: str
    equation: str
    source: str  # a link, or nothing


def model_card(
    title: str,
    inputs: Iterable[Checkpoint],
    method: Method,
    resolved: str,
    made_by: Mapping[str, str],
) -> str:
    """Return a model card: metadata that the Hub understands, and a description.

    `made_by` is the command, and the text of the file that it reads, if any, by language.
    """
    sources = [source for checkpoint in inputs for source in _sources(checkpoint)]
    origins = {name: hub_origin(name, folder) for name, folder in sources}
    ids = [origin[0] for origin in origins.values() if origin]
    data = ModelCardData(
        base_model=list(dict.fromkeys(ids)) or None,  # the Hub takes nothing but its own ids here
        base_model_relation="merge" if ids else None,
        library_name="transformers",
        tags=["merge", method.name.lower().replace(" ", "-")],
        **_agreed([folder for _, folder in sources]),
    )
    models = [
        f"- {_code(name)}" + (f", revision `{origin[1]}`" if origin else ", a local directory")
        for name, origin in origins.items()
    ]
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    body = [
        f"# {_code(title)}",
        "A merge of language models, tensor by tensor.",
        "## Method",
        f"{method.name}: {method.equation}" + f" ({method.source})" * bool(method.source),
        _fenced(resolved, "text"),
        "## Models",
        "\n".join(models),
        "## Made by",
        *(_fenced(text, language) for language, text in made_by.items()),
        f"With Python {sys.version.split()[0]}, {', '.join(versions)}.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def _code(text: str) -> str:
    """Return a name as code in a line, whatever is in it."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return ticks + space + re.sub(r"\s", " ", text) + space + ticks


def _fenced(text: str, language: str) -> str:
    """Return a block of code, whatever is in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"


def _sources(checkpoint: Checkpoint) -> list[tuple[str, Path]]:
    """Return the names and folders of a model and of its adapter, if it has one."""
    model, adapter = split_adapter(checkpoint.name)
    if adapter is None or checkpoint.adapter is None:
        return [(checkpoint.name, checkpoint.path)]
    return [(model, checkpoint.path), (adapter, checkpoint.adapter)]


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
        return dict(metadata_load(folder / "README.md") or {})
    except Exception:  # a card that cannot be read says nothing
        return {}
