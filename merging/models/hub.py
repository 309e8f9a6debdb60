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
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

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
    except RevisionNotFoundError as error:
        raise Problems(f"{model}: the Hub has no revision {revision} of {repo}") from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise Problems(_absent(model, constants.HF_HUB_OFFLINE, error)) from error
        raise Problems(f"{model}: {_unreachable(error)}, and it is not in the cache") from error
    except Exception as error:  # network libraries raise errors of many kinds
        raise Problems(_absent(model, constants.HF_HUB_OFFLINE, error)) from error
    return Path(snapshot)


def _absent(model: str, offline: bool, error: Exception) -> str:
    where = "in the cache (HF_HUB_OFFLINE is set)" if offline else "on the Hub"
    found = f"looked for a local directory and {where}, found no such model"
    return f"{model}: {found}: {first_line(error)}"


def _unreachable(error: Exception) -> str:
    """Say why the Hub gave nothing: what it answered, or that there was no answer."""
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 429:
        return "the Hub answered 429 and asks to wait; try again later"
    if status is not None:
        return f"the Hub answered {status} (busy or down); try again later"
    return f"the Hub cannot be reached: {first_line(cause)}"


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
