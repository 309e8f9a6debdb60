"""Checkpoints: a model's folder, its config, and the named tensors of its weight files."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from merging.models.folders import read_json
from merging.models.tensors import LazyTensor
from merging.problems import Problems, cause, refuse, some

# Config values that do not change what a model computes with the same tensors: those that every
# config has, and those of vocabularies (whose rows are matched), training and initial values.
OF_EVERY_CONFIG = PretrainedConfig().to_dict().keys() - {"model_type"}
MEANINGLESS = re.compile(
    r"^_|^per_layer_config$|^vocab_size|_token_ids?$|_token_index$|dropout|drop$|initializer"
    r"|init_std|use_cache"
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
    tokens_of_adapter: bool = False  # whether its tokenizer is that in the adapter's folder
    notes: tuple[str, ...] = ()  # what the user should know of it

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer."""
        return self.adapter if self.adapter and self.tokens_of_adapter else self.folder


def read_config(model: str, folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's config; Problems if transformers does not understand it."""
    content = read_json(model, folder / "config.json")
    names = filter(is_method, content)
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
        own_code = content.get("auto_map")
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


def value_of(config: PretrainedConfig, key: str, default: Any = None) -> Any:
    """Return a value of a config, under whatever name it has it; the default where layers differ.

    transformers refuses to read from the whole config what its layers say differently.
    """
    try:
        return getattr(config, key, default)
    except RuntimeError:
        return default


def size_problems(
    models: Mapping[str, PretrainedConfig], donor: str, sizes: Sequence[str]
) -> list[str]:
    """Return where models differ from the donor in config values that give tensors their shapes."""
    reference = text_config(models[donor])
    return [
        f"{name}: {key} is {found}, expected the {expected} of {donor}; merge models of one size"
        for name, config in models.items()
        for key in sizes
        if (found := value_of(text_config(config), key)) != (expected := value_of(reference, key))
    ]


def meaning_warnings(
    models: Mapping[str, PretrainedConfig], donor: str, followed: Set[str] = frozenset()
) -> list[str]:
    """Return where models differ from the donor in what their tensors mean, not in their shapes.

    But for the keys that `followed` what each model says, so that the output has no one's value.
    """
    reference = text_config(models[donor])
    return [
        f"warning: {name}: {key} is {found}, in {donor} it is {expected}; the output has the latter"
        for name, config in models.items()
        for key, found, expected in _differences(text_config(config), reference, followed)
    ]


def _differences(
    config: PretrainedConfig, reference: PretrainedConfig, left_out: Set[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two configs differ, in values of all layers and of single ones."""
    values, expected = config.to_dict(), reference.to_dict()
    single = layer_attributes(config) | layer_attributes(reference)
    for key in [*expected, *(values.keys() - expected.keys())]:
        means_nothing = key in OF_EVERY_CONFIG | left_out or MEANINGLESS.search(key)
        if not means_nothing and key not in single and values.get(key) != expected.get(key):
            yield key, values.get(key), expected.get(key)
    for key in sorted(single - left_out):
        found, wanted = of_layers(config, key), of_layers(reference, key)
        layers = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
        if layers:
            named = f"{key} of layer{'s' * (len(layers) > 1)} {some(map(str, layers))}"
            yield named, found[layers[0]], wanted[layers[0]]


def layer_attributes(config: PretrainedConfig) -> set[str]:
    """Return the values that a config gives to single layers (`per_layer_config`)."""
    return set(getattr(config, "per_layer_attributes", None) or ())


def of_layers(config: PretrainedConfig, key: str) -> list[Any]:
    """Return a value of each layer, whether the config gives it to them or to all."""
    return [getattr(layer, key, None) for layer in config.per_layer_config]
