"""The folders of models: which files they have, and which of them an output gets.

Nothing here loads torch or transformers, so that a mistyped path is reported at once.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from merging.models.hub import download
from merging.problems import Problems, first_line, reading, some
from merging.recipes.model_names import as_path, is_local
from merging.recipes.user_files import read_text

# Weight files in the order in which transformers prefers them, each with its index of shards.
WEIGHT_FILES = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
# Names by which configs call the number of a decoder's layers.
DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "num_layers_per_stack"
).split()
OTHER_DEPTHS = ("encoder_layers", "num_encoder_layers", "depth")  # of encoders and vision towers
# Of numbers in a config: transformers makes something for each, whatever the files hold.
LIMITS = dict.fromkeys([*DEPTHS, *OTHER_DEPTHS], 100_000) | {"num_labels": 1_000_000}
LARGEST_JSON = 10_000_000  # bytes of a config
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What is downloaded of an adapter: itself, and a tokenizer if it has one.
OF_AN_ADAPTER = [ADAPTER_CONFIG, *ADAPTER_FILES, "README.md", "special_tokens*", "added_tokens*"]
OF_AN_ADAPTER += ["token*", "vocab*", "merges*", "*.model", "chat_template*"]
TOKENIZER_FILES = re.compile(
    r"^(tokeniz[^/]*|[^/]*_tokenizer[^/]*\.json|tekken\.json|bpe\.codes|vocab\.[^/]*|merges\.txt"
    r"|special_tokens_map\.json|added_tokens\.json|[^/]*\.(model|tiktoken|spm)|[^/]*\.bpe)$"
    r"|^dict\.txt$|^vocab-[^/]*\.json$|chat_template"
)
# What else a model's folder needs to be used and passed on: settings, code, licence.
MODEL_FILES = re.compile(
    r"^(generation_config\.json|[^/]*processor[^/]*\.json|feature_extract[^/]*\.json|[^/]+\.py"
    r"|(licen[cs]e|notice|copying|copyright|use_policy|usage_policy)[^/]*"
    r"|modules\.json|[^/]*sentence_[^/]*\.json|\d+_\w+/config\.json"  # of sentence-transformers
    r"|id2label\.json|label2id\.json)$",
    re.IGNORECASE,
)

# What else a folder may hold that is nothing but a model.
MADE_FILES = re.compile(
    r"^(config\.json|README\.md|merge\.svg|\.gitattributes|[^/]*\.safetensors(\.index\.json)?"
    r"|pytorch_model[^/]*\.bin(\.index\.json)?|\.cache/huggingface/.*)$"
)


def find_model(model: str, cache_dir: str | None = None) -> Path:
    """Return the folder of a model; of a Hub id, a snapshot that has all but the weights so far.

    Raises Problems if there is none, and for what is no model to merge.
    """
    folder = as_path(model)
    if not is_local(model):
        folder = download(model, cache_dir)
    elif not folder.exists():
        raise Problems(f"{model}: looked for a local directory, there is none{_nearest(model)}")
    elif not folder.is_dir():
        raise Problems(f"{model}: expected a directory with a model, found a file")
    _check_config(model, folder)
    return folder


def _nearest(model: str) -> str:
    """Suggest a folder beside a path that does not exist."""
    parent, slash, name = model.rpartition("/")
    try:
        beside = get_close_matches(name, os.listdir(as_path(parent + slash or ".")), 1)
    except (OSError, ValueError):
        return ""
    return f"; did you mean {parent}{slash}{beside[0]}?" if beside else ""


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model's config and weights."""
    names = [name for pair in WEIGHT_FILES.items() for name in pair]
    has_weights = any((folder / name).is_file() for name in names)
    return has_weights and (folder / "config.json").is_file()


def foreign_files(folder: Path) -> list[str]:
    """Return what lies in a folder that no model has: of other folders in it, their names."""
    found = []
    for path in folder.iterdir():
        below = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        names = [p.relative_to(folder).as_posix() for p in below if not p.is_dir()]
        if any(not _may_be_in_a_model(name) for name in names):
            found.append(path.name)
    return found


def _may_be_in_a_model(name: str) -> bool:
    """Whether a model may have a file of this name."""
    patterns = (MODEL_FILES.match, TOKENIZER_FILES.search, MADE_FILES.match)
    return any(match(name) for match in patterns)


def find_adapter(adapter: str, cache_dir: str | None = None) -> Path:
    """Return the folder of a LoRA adapter; of a Hub id, a snapshot of what is used of it."""
    folder = as_path(adapter)
    if not is_local(adapter):
        folder = download(adapter, cache_dir, OF_AN_ADAPTER)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise Problems(f"{adapter}: no {ADAPTER_CONFIG} in {folder}, so it is no adapter")
    return folder


def adapter_weights(model: str, folder: Path) -> Path:
    """Return the weight file of an adapter."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise Problems(f"{model}: no {' or '.join(ADAPTER_FILES)} in {folder}")


def read_json(model: str, file: Path) -> dict[str, Any]:
    with reading(model, f"{file.name} is not readable JSON"):
        content = json.loads(read_text(file, LARGEST_JSON))
    if not isinstance(content, dict):
        raise Problems(f"{model}: {file.name} holds no JSON object")
    return content


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config's mapping, and all mappings inside it."""
    waiting = [config]
    while waiting:
        yield (part := waiting.pop())
        waiting += [value for value in part.values() if isinstance(value, Mapping)]


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return what a JSON file of a model holds."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # of half a surrogate pair, what JSON writes


def _check_config(model: str, folder: Path) -> None:
    """Refuse a folder without a config, an adapter, and a quantised model, by name."""
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise Problems(
                f"{model}: a LoRA adapter, not a whole model; name it with its base model, as "
                f"BASE+{model}"
            )
        raise Problems(f"{model}: no config.json in {folder}, so it is not a model")
    for part in parts_of(read_json(model, folder / "config.json")):
        for key, limit in LIMITS.items():
            if isinstance(value := part.get(key), int) and value > limit:
                raise Problems(
                    f"{model}: config.json says {key} {value:.3g}, expected at most {limit}"
                )
        quantisation = part.get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise Problems(
                f"{model}: quantised ({method or quantisation}); expected plain weights, merge the "
                "model that it was quantised from"
            )


def weight_map(index: Path) -> dict[str, str]:
    """Return an index's map from tensor to file; the files must lie beside the index."""
    with reading(index, "expected a JSON index with a weight_map"):
        listed = json.loads(read_text(index))["weight_map"]
        entries = {str(name): str(file) for name, file in listed.items()}
    outside = {file for file in entries.values() if Path(file).name != file or "\\" in file}
    if outside:
        raise Problems(f"{index}: expected files beside the index, found {some(outside)}")
    return entries


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
                shards = sorted(set(weight_map(folder / index).values()))
                snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=shards)
                return
    except Problems:
        raise
    except Exception as error:
        raise Problems(
            f"{model}: its weights could not be downloaded: {first_line(error)}"
        ) from error


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the weight files that transformers would load, and what their index says, if any."""
    for single, index in WEIGHT_FILES.items():
        if (folder / single).is_file():
            return [folder / single], None
        if (folder / index).is_file():
            listed = weight_map(folder / index)
            shards = sorted(set(listed.values()))
            missing = [file for file in shards if not (folder / file).is_file()]
            if missing:
                raise Problems(f"{folder}: {index} names {some(missing)}, missing there")
            return [folder / file for file in shards], listed
    raise Problems(
        f"{folder}: no weights; expected {' or '.join(WEIGHT_FILES)}, or an index of shards"
    )


def files_of_a_model(donor: Path, tokenizer_from: Path | None) -> dict[str, Path]:
    """List a donor's files that belong to a model, beside its config and weights, which are made.

    Those of the tokenizer come from another folder, or from none.
    """
    own = {name: path for name, path in _plain_files(donor) if MODEL_FILES.match(name)}
    files = {name: path for name, path in own.items() if not TOKENIZER_FILES.search(name)}
    if tokenizer_from is not None:
        files |= {n: path for n, path in _plain_files(tokenizer_from) if TOKENIZER_FILES.search(n)}
    return files


def _plain_files(folder: Path) -> list[tuple[str, Path]]:
    """Return the files of a folder and of the folders in it, by name, but not the hidden ones.

    And no links to elsewhere: an output is passed on.
    """
    named = [(name, path) for name, path in _all_files(folder) if _is_own(folder, path)]
    return [(name, path) for name, path in named if "/." not in f"/{name}"]


def links_left_out(folder: Path) -> list[str]:
    """Return a model's files that are not copied because they are links to outside of it."""
    names = [name for name, path in _all_files(folder) if not _is_own(folder, path)]
    return [name for name in names if MODEL_FILES.match(name) or TOKENIZER_FILES.search(name)]


def _all_files(folder: Path) -> list[tuple[str, Path]]:
    found = sorted([*folder.glob("*"), *folder.glob("*/*")])
    return [(path.relative_to(folder).as_posix(), path) for path in found if path.is_file()]


def _is_own(folder: Path, path: Path) -> bool:
    """Whether a file lies in its model's folder, or in its own repository of the Hub's cache."""
    root, real = (Path(os.path.realpath(each)) for each in (folder, path))
    repository = root.parent.parent
    is_cached = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return root in real.parents or (is_cached and repository / "blobs" in real.parents)
