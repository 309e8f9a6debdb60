"""Write the model card of an output: what it was made of and how, for people and for the Hub.

Everything is read from the inputs' own folders; no network is used.
"""

import sys
from collections.abc import Iterable, Sequence
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
    title: str, inputs: Iterable[Checkpoint], method: Method, resolved: str, made_by: Sequence[str]
) -> str:
    """Return a model card: metadata that the Hub understands, and a description.

    `made_by` are fenced blocks of code: the command, and the file that it reads, if any.
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
        f"- `{name}`" + (f", revision `{origin[1]}`" if origin else ", a local directory")
        for name, origin in origins.items()
    ]
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    body = [
        f"# {title}",
        "A merge of language models, tensor by tensor.",
        "## Method",
        f"{method.name}: {method.equation}" + f" ({method.source})" * bool(method.source),
        f"```text\n{resolved}\n```",
        "## Models",
        "\n".join(models),
        "## Made by",
        *made_by,
        f"With Python {sys.version.split()[0]}, {', '.join(versions)}.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def _sources(checkpoint: Checkpoint) -> list[tuple[str, Path]]:
    """Return the names and folders of a model and of its adapter, if it has one."""
    model, adapter = split_adapter(checkpoint.name)
    if adapter is None or checkpoint.adapter is None:
        return [(checkpoint.name, checkpoint.path)]
    return [(model, checkpoint.path), (adapter, checkpoint.adapter)]


def _agreed(folders: Sequence[Path]) -> dict[str, Any]:
    """Return what the cards of all inputs say alike of licence and language."""
    cards = [_metadata(folder) for folder in folders]
    groups = (("license", "license_name", "license_link"), ("language",))
    agreed: dict[str, Any] = {}
    for keys in groups:
        values = [{key: card[key] for key in keys if key in card} for card in cards]
        if all(value == values[0] for value in values):
            agreed |= values[0]
    return agreed


def _metadata(folder: Path) -> dict[str, Any]:
    if not (folder / "README.md").is_file():
        return {}
    try:
        return dict(metadata_load(folder / "README.md") or {})
    except Exception:  # a card that cannot be read says nothing
        return {}
