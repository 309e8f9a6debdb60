"""Models of the Hugging Face Hub: download them in one format, or find them in the cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from merging.problems import Problems, first_line
from merging.recipes.model_names import HUB_ID, is_local

WEIGHT_SUFFIXES = "safetensors bin pt pth ckpt gguf ggml onnx onnx_data h5 msgpack ot npz tflite"
# Of repositories: what is never needed, or comes later, in the format that is wanted.
NOT_DOWNLOADED = [f"*.{suffix}" for suffix in WEIGHT_SUFFIXES.split()]
NOT_DOWNLOADED += ["*/*.safetensors*", "original/*", "onnx/*", "openvino/*"]


def download(model: str, cache_dir: str | None, only: Sequence[str] | None = None) -> Path:
    """Return a snapshot of a repository that has its files but the weights, or `only` some."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo, _, revision = model.partition("@")
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision or None,
            cache_dir=cache_dir,
            allow_patterns=None if only is None else list(only),
            ignore_patterns=NOT_DOWNLOADED if only is None else None,
        )
    except GatedRepoError as error:
        raise Problems(
            f"{model}: a gated model; accept its terms on its page on the Hub, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise Problems(
            f"{model}: no local directory and no model of the Hub, or a private one, for which to "
            "log in with `hf auth login`"
        ) from error
    except Exception as error:  # network libraries raise errors of many kinds
        where = "in the cache (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "on the Hub"
        raise Problems(
            f"{model}: looked for a local directory and {where}, found no such model: "
            f"{first_line(error)}"
        ) from error
    return Path(snapshot)


def origin(model: str, folder: Path) -> tuple[str, str] | None:
    """Return the Hub id and commit of a model, known by its name or its place in a cache."""
    snapshot = folder.resolve()
    cached = snapshot.parent.parent.name
    if snapshot.parent.name != "snapshots" or not cached.startswith("models--"):
        return None
    repo = cached.removeprefix("models--").replace("--", "/")
    if not HUB_ID.match(repo) or not re.fullmatch(r"[0-9a-f]{40}", snapshot.name):
        return None
    return (repo if is_local(model) else model.partition("@")[0]), snapshot.name
