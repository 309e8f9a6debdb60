"""Find the files of models, on this disk or on the Hub, and the place for an output.

Nothing here loads torch or transformers, so that a mistyped path is reported at once.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from problems import some
from staging import siblings

# Weight files in the order in which transformers prefers them, each with its index of shards.
WEIGHT_FILES = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")
WEIGHT_SUFFIXES = "safetensors bin pt pth ckpt gguf ggml onnx onnx_data h5 msgpack ot npz tflite"
WEIGHT_PATTERNS = [f"*.{suffix}" for suffix in WEIGHT_SUFFIXES.split()]
# Not the model's: original-format duplicates, training leftovers, and the donor's own model card.
UNCOPIED_FOLDERS = re.compile(
    r"^(\.|checkpoint-|global_step|runs$|original$|onnx$|openvino$|coreml$)"
)
UNCOPIED_FILES = re.compile(
    r"(^|/)\.|^config\.json$|\.index\.json$|^README\.md$|^trainer_state\.json$"
    r"|^adapter_config\.json$"
)
TOKENIZER_FILES = re.compile(
    r"tokeniz|^tekken\.json$|^bpe\.codes$|^vocab\.|^merges\.txt$|^special_tokens_map\.json$"
    r"|^added_tokens\.json$|\.model$|\.tiktoken$|chat_template"
)
# Of Hub repositories: what is never needed, whatever the format of the weights.
NOT_DOWNLOADED = [*WEIGHT_PATTERNS, "*/*.safetensors*", "original/*", "onnx/*", "openvino/*"]


def split_adapter(model: str) -> tuple[str, str | None]:
    """Split BASE+ADAPTER. What exists as a whole is a path; a path may have a + of its own.

    Raises ValueError if one is empty.
    """
    if "+" not in model or Path(os.path.expanduser(model)).exists():
        return model, None
    splits = [(model[:i], model[i + 1 :]) for i, sign in enumerate(model) if sign == "+"]
    sensible = [pair for pair in splits if all(map(_could_be_model, pair))]
    base, adapter = (sensible or splits)[-1]
    if not base or not adapter:
        raise ValueError(f"{model}: expected BASE+ADAPTER, one of them is empty")
    return base, adapter


def _could_be_model(name: str) -> bool:
    return bool(name) and bool(HUB_ID.match(name) or Path(os.path.expanduser(name)).exists())


def is_local(model: str) -> bool:
    """Whether a name is meant as a path: it exists, or no Hub id looks like it."""
    repo = model.partition("@")[0]
    looks_like_path = model.startswith((".", "/", "~")) or "\\" in model or repo.count("/") > 1
    return looks_like_path or Path(model).exists()


def hub_origin(model: str, folder: Path) -> tuple[str, str] | None:
    """Return the Hub id and commit of a model, known by its name or its place in a cache."""
    snapshot = folder.resolve()
    cached = snapshot.parent.parent.name
    if snapshot.parent.name != "snapshots" or not cached.startswith("models--"):
        return None
    repo = cached.removeprefix("models--").replace("--", "/")
    if not HUB_ID.match(repo) or not re.fullmatch(r"[0-9a-f]{40}", snapshot.name):
        return None
    return (repo if is_local(model) else model.partition("@")[0]), snapshot.name


def find(model: str, cache_dir: str | None = None) -> Path:
    """Return the folder of a model; of a Hub id, a snapshot that has all but the weights so far.

    Raises FileNotFoundError if there is none, and ValueError for what is no model to merge.
    """
    folder = Path(os.path.expanduser(model))
    if is_local(model):
        if not folder.exists():
            raise FileNotFoundError(f"{model}: looked for a local directory, there is none")
        if not folder.is_dir():
            raise ValueError(f"{model}: expected a directory with a model, found a file")
    else:
        folder = _snapshot(model, cache_dir, ignore_patterns=NOT_DOWNLOADED)
    _check_config(model, folder)
    return folder


def _snapshot(model: str, cache_dir: str | None, **patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo, _, revision = model.partition("@")
    try:
        snapshot = snapshot_download(
            repo, revision=revision or None, cache_dir=cache_dir, **patterns
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{model}: a gated model; accept its terms on its page on the Hub, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{model}: no local directory and no model of the Hub, or a private one, for which to "
            "log in with `hf auth login`"
        ) from error
    except Exception as error:  # network libraries raise errors of many kinds
        where = "in the cache (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "on the Hub"
        raise FileNotFoundError(
            f"{model}: looked for a local directory and {where}, found no such model: "
            f"{_first_line(error)}"
        ) from error
    return Path(snapshot)


def find_adapter(adapter: str, cache_dir: str | None = None) -> Path:
    """Return the folder of a LoRA adapter; of a Hub id, a snapshot of the adapter alone."""
    folder = Path(os.path.expanduser(adapter))
    if not is_local(adapter):
        folder = _snapshot(
            adapter, cache_dir, allow_patterns=[ADAPTER_CONFIG, *ADAPTER_FILES, "README.md"]
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{adapter}: no {ADAPTER_CONFIG} in {folder}, so it is no adapter")
    return folder


def adapter_weights(model: str, folder: Path) -> Path:
    """Return the weight file of an adapter."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{model}: no {' or '.join(ADAPTER_FILES)} in {folder}")


def fetch_weights(model: str, folder: Path, cache_dir: str | None = None) -> None:
    """Download the weights of a Hub model into its snapshot, in one format; nothing if local."""
    if is_local(model):
        return
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, commit = model.partition("@")[0], folder.name
    try:
        for single, index in WEIGHT_FILES.items():
            try:
                hf_hub_download(repo, single, revision=commit, cache_dir=cache_dir)
                return
            except EntryNotFoundError:  # not on the Hub; offline, not in the cache
                pass
            if (folder / index).exists():
                shards = sorted(set(_weight_map(folder / index).values()))
                snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=shards)
                return
    except Exception as error:
        raise FileNotFoundError(
            f"{model}: its weights could not be downloaded: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def read_json(model: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{model}: {file.name} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{model}: {file.name} holds no JSON object")
    return content


def _check_config(model: str, folder: Path) -> None:
    """Refuse a folder without a config, an adapter, and a quantised model, by name."""
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{model}: a LoRA adapter, not a whole model; name it with its base model, as "
                f"BASE+{model}"
            )
        raise FileNotFoundError(f"{model}: no config.json in {folder}, so it is not a model")
    config = read_json(model, folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        quantisation = part.get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise ValueError(
                f"{model}: quantised ({method or quantisation}); expected plain weights, merge the "
                "model that it was quantised from"
            )


def _weight_map(index: Path) -> dict[str, str]:
    """Return an index's map from tensor to file; the files must lie beside the index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a JSON index with a weight_map: {error!r}") from error
    outside = {file for file in entries.values() if Path(file).name != file or "\\" in file}
    if outside:
        raise ValueError(f"{index}: expected files beside the index, found {some(outside)}")
    return entries


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the weight files that transformers would load, and what their index says, if any."""
    for single, index in WEIGHT_FILES.items():
        if (folder / single).is_file():
            return [folder / single], None
        if (folder / index).is_file():
            listed = _weight_map(folder / index)
            shards = sorted(set(listed.values()))
            missing = [file for file in shards if not (folder / file).is_file()]
            if missing:
                raise FileNotFoundError(f"{folder}: {index} names {some(missing)}, missing there")
            return [folder / file for file in shards], listed
    raise FileNotFoundError(
        f"{folder}: no weights; expected {' or '.join(WEIGHT_FILES)}, or an index of shards"
    )


def donor_files(donor: Path, tokenizer_from: Path | None) -> dict[str, Path]:
    """List a donor folder's non-weight files, with the tokenizer's from another folder, or none."""
    files = {n: p for n, p in _other_files(donor) if not TOKENIZER_FILES.search(n)}
    if tokenizer_from:
        files |= {n: p for n, p in _other_files(tokenizer_from) if TOKENIZER_FILES.search(n)}
    return files


def _other_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (
            path.is_file()
            and not any(UNCOPIED_FOLDERS.search(part) for part in name.parts[:-1])
            and not UNCOPIED_FILES.search(name.as_posix())
            and not any(name.match(pattern) for pattern in WEIGHT_PATTERNS)
        ):
            yield name.as_posix(), path


def output_problems(output: Path, inputs: Iterable[Path], overwrite: bool) -> list[str]:
    """Return what speaks against writing a model to this directory.

    Inputs are the folders of models, and other files that are read.
    """
    try:
        target = output.resolve(strict=output.is_symlink() and not output.exists())
    except (OSError, RuntimeError) as error:
        return [f"{output}: cannot be resolved: {error}"]
    if target.parent == target:
        return [f"{output}: the root directory cannot be an output"]
    problems = []
    for given in inputs:
        source = given.resolve()
        if (
            source in (target, *siblings(target))
            or target in source.parents
            or source in target.parents
        ):
            problems.append(
                f"{output}: the output is, contains or lies in the input {given}; name another"
            )
        elif source.is_dir():
            linked = [f.name for f in source.iterdir() if target in f.resolve().parents]
            if linked:
                problems.append(f"{output}: holds files that {given} links to: {some(linked)}")
    if _is_mount(target):
        problems.append(f"{output}: a mount point, which cannot be replaced; name a folder in it")
    elif output.exists() and not output.is_dir():
        problems.append(f"{output}: the output is a file; name a directory")
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            problems.append(f"{output}: not empty; name another directory, or use --overwrite")
        elif not _is_model(output):
            problems.append(f"{output}: not a model, so --overwrite does not replace it")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        problems.append(f"{output}: {existing} is a file, so nothing can be written below it")
    elif not os.access(existing, os.W_OK):
        problems.append(f"{output}: {existing} cannot be written to")
    if len(os.fsencode(siblings(target)[1].name)) > 255:
        problems.append(f"{output}: the name is too long; use at most 240 characters")
    return problems


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model, and no version control that would be lost with it."""
    weights = [name for pair in WEIGHT_FILES.items() for name in pair]
    has_weights = any((folder / name).is_file() for name in weights)
    return (folder / "config.json").is_file() and has_weights and not (folder / ".git").exists()


def _is_mount(target: Path) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        return str(target) in [line.split()[4] for line in mounts.splitlines()]
    except OSError:  # not Linux
        return os.path.ismount(target)


def space_problems(output: Path, needed: int) -> list[str]:
    """Return a problem if the disk of the output has less than `needed` bytes free."""
    target = output.resolve()
    existing = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    return [
        f"{output}: needs {needed / 1e9:.2f} GB of disk, {existing} has {free / 1e9:.2f} GB free"
    ]
