"""Checkpoints: a model's folder, its config, and the named tensors of its weight files."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from merging.models.folders import read_json
from merging.models.tensors import LazyTensor
from merging.problems import Problems, cause, refuse

# Config values that do not change what a model computes with the same tensors: those that every
# config has, and those of vocabularies (whose rows are matched), training and initial values.
OF_EVERY_CONFIG = PretrainedConfig().to_dict().keys() - {"model_type"}
MEANINGLESS = re.compile(
    r"^_|^vocab_size|_token_ids?$|_token_index$|dropout|drop$|initializer|init_std|use_cache"
    r"|max_position_embeddings|n_positions|n_ctx|router_aux_loss|router_jitter|output_router_logits"
    r"|^auto_map$|pretraining_tp|^tie_|_label$|^label"
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: the name the user gave, its folder, config and tensors."""

    name: str
    folder: Path
    config: PretrainedConfig
    tensors: Mapping[str, LazyTensor]
    adapter: Path | None = None  # the folder of the adapter that changes it


def read_config(model: str, folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's config; Problems if transformers does not understand it."""
    names = [key for key in read_json(model, folder / "config.json") if is_method(key)]
    refuse(f"{model}: config.json has {key}, which is no setting" for key in names)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if not isinstance(text_config(config), PretrainedConfig):
            raise ValueError("the config of its text part is no mapping")
        return config
    except (Exception, SystemExit) as error:  # of many kinds, about a user's file and its code
        found = cause(error)
        own_code = read_json(model, folder / "config.json").get("auto_map")
        if own_code and not trust_remote_code:
            found = "it brings its own code; if you trust that, use --trust-remote-code"
        elif own_code:
            found = f"{found} (it brings its own code: {own_code})"
        raise Problems(f"{model}: transformers cannot read its config.json: {found}") from error


def is_method(key: str) -> bool:
    """Whether a config's key would take the place of what all configs do."""
    return key.startswith("__") or callable(getattr(PretrainedConfig, key, None))


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the language model."""
    try:
        return config.get_text_config()
    except ValueError:  # several parts qualify
        return config


def changed_config(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Return a copy of a config in which attributes of its text part are changed."""
    copy = type(config).from_dict(config.to_dict())
    part = text_config(copy)
    for name, value in changes.items():
        setattr(part, name, value)
    if "tie_word_embeddings" in changes:
        copy.tie_word_embeddings = changes["tie_word_embeddings"]
    return copy


def says_tied(config: PretrainedConfig) -> bool:
    """Whether a config ties embedding and head, in its text part or as a whole."""
    parts = (config, text_config(config))
    return any(getattr(part, "tie_word_embeddings", False) for part in parts)


def size_problems(
    models: Mapping[str, PretrainedConfig], donor: str, sizes: Sequence[str]
) -> list[str]:
    """Return where models differ from the donor in config values that give tensors their shapes."""
    return [
        f"{name}: {key} is {found}, expected the {expected} of {donor}; merge models of one size"
        for name in models
        for key, found, expected in _differences(models[name], models[donor], sizes)
    ]


def meaning_warnings(models: Mapping[str, PretrainedConfig], donor: str) -> list[str]:
    """Return where models differ from the donor in what their tensors mean, not in their shapes."""
    return [
        f"{name}: {key} is {found}, in {donor} it is {expected}; the output has the latter"
        for name in models
        for key, found, expected in _differences(models[name], models[donor])
        if key not in OF_EVERY_CONFIG and not MEANINGLESS.search(key)
    ]


def _differences(
    config: PretrainedConfig, reference: PretrainedConfig, keys: Iterable[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two text parts differ: of these keys, or of all that either has."""
    one, other = text_config(config), text_config(reference)
    values, expected = one.to_dict(), other.to_dict()
    for key in keys or [*expected, *(values.keys() - expected.keys())]:
        found, wanted = (
            c.model_type if key == "model_type" else getattr(c, key, v.get(key))
            for c, v in ((one, values), (other, expected))
        )
        if found != wanted:
            yield key, found, wanted
