"""What transformers knows of a model's structure: its class, names, ties and vocabulary.

Everything is asked of models on the meta device, where tensors have shapes and no memory.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from checkpoints import FLOAT_DTYPES, Checkpoint, Rows, Source, text_config
from problems import collecting, refuse, some
from vocabularies import MISSING, Vocabulary, match, read_tokens, report

# Buffers that old checkpoints stored and models now compute; matched against the end of a name.
COMPUTED_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|(attn|attention)\.(masked_)?bias"
    r"|embeddings\.position_ids)$"
)

# Names of what stands before the layers, though it is no embedding, and of what only sounds so.
BEFORE_LAYERS = re.compile(
    r"(?<!un)emb|project_in|patch_conv|(^|\.)conv\d\.|pre_?layr?norm|layernorm_pre|(^|\.)ln_pre"
    r"|per_layer_model_projection|per_layer_projection_norm"
)
AFTER_LAYERS = re.compile(r"embedding_norm\.|multi_modal_projector|(^|\.)mtp|(^|\.)lm_head")


class Shaped(Protocol):
    """What is known of a tensor without its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...


def model_class(config: PretrainedConfig, folder: Path, trust: bool) -> type[PreTrainedModel]:
    """Return the class that a config names, from transformers or the model's own remote code."""
    listed = getattr(config, "architectures", None)
    if not listed:
        names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        listed = [names.get(config.model_type)]
    name = listed[0] if isinstance(listed, list) and isinstance(listed[0], str) else str(listed)
    auto_map = getattr(config, "auto_map", None)
    for reference in auto_map.values() if isinstance(auto_map, dict) and trust else ():
        if isinstance(reference, str) and reference.endswith(f".{name}"):
            remote_class: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder)
            return remote_class
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} has no class {name!r}, "
            "which config.json names in architectures; if the model brings its own code that you "
            "trust, use --trust-remote-code"
        )
    return found


def assemble(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, Shaped],
) -> tuple[PreTrainedModel, list[str]]:
    """Load tensors of these shapes into the class, without values: the model, what does not fit.

    transformers itself does it, on the meta device, where tensors have shapes and no memory, with
    all the renaming and fusing that it does for a real load.
    """
    values = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    try:
        model, report = cls.from_pretrained(
            None,
            config=type(config).from_dict(config.to_dict()),
            state_dict=values,
            device_map="meta",
            dtype=main_dtype(tensors),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # e.g. experts that cannot be stacked, or a senseless config value
        cause = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{cls.__name__} cannot be built from config and tensors: {cause}"
        ) from error
    problems = []
    if report["missing_keys"]:
        problems.append(f"{cls.__name__} misses {some(report['missing_keys'])}")
    unexpected = {n for n in report["unexpected_keys"] if not COMPUTED_BUFFERS.search(n)}
    if unexpected:
        problems.append(f"{cls.__name__} has no place for {some(unexpected)}")
    for name, found, expected in sorted(report["mismatched_keys"]):
        problems.append(
            f"{cls.__name__} expects {name} of shape {tuple(expected)}, not {tuple(found)}"
        )
    return model, problems


def main_dtype(tensors: Mapping[str, Shaped]) -> torch.dtype:
    """Return the floating dtype that holds the most bytes."""
    sizes = {dtype: 0 for dtype in FLOAT_DTYPES}
    for info in tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def module_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map stored names to the names of the model's own parameters, as transformers does on load."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def rename(name: str) -> str:
        renamed = rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        return name if renamed not in state and name in state else renamed

    return {name: rename(name) for name in stored}


def aligned(
    checkpoints: Sequence[Checkpoint], prefix: str, ties: Mapping[str, str]
) -> list[Checkpoint]:
    """Return the checkpoints with their tensors under the names of the first.

    Some checkpoints were saved without the prefix of the model inside (`wte.weight`), others of the
    same architecture with it (`transformer.wte.weight`); a tied head may be stored instead of the
    embedding. A checkpoint that is given twice stays one.
    """
    wanted = checkpoints[0].tensors.keys() | ties.keys() | set(ties.values())

    def renamed(checkpoint: Checkpoint) -> Checkpoint:
        def rename(name: str) -> str:
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            return next((c for c in candidates if c in wanted), name)

        tensors = {rename(name): info for name, info in checkpoint.tensors.items()}
        for target, source in ties.items():
            if says_tied(checkpoint.config) and source not in tensors and target in tensors:
                tensors[source] = tensors.pop(target)
        return replace(checkpoint, tensors=tensors)

    once = {checkpoint: renamed(checkpoint) for checkpoint in dict.fromkeys(checkpoints)}
    return [once[checkpoint] for checkpoint in checkpoints]


def _embeddings(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the modules of the input and output embeddings; None where a model has none."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # e.g. of a vision model
        return None, None


def possible_ties(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map each tensor that a checkpoint of this class may leave out, to the one it is tied to.

    The head to the embedding, above all, whatever the config says. In stored names, where there are
    any; a tensor that is not stored goes by its name in the model.
    """
    own = model.state_dict()
    declared = getattr(model, "_tied_weights_keys", None)
    ties = {t: s for t, s in dict(declared or {}).items() if t in own and s in own}
    ties |= model.all_tied_weights_keys
    places = {module: name for name, module in model.named_modules()}
    embedding, head = _embeddings(model)
    if (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and head.weight.shape == embedding.weight.shape
    ):
        ties.setdefault(f"{places[head]}.weight", f"{places[embedding]}.weight")
    stored_names = {module: name for name, module in module_names(model, stored).items()}
    return {stored_names.get(t, t): stored_names.get(s, s) for t, s in ties.items()}


def embedding_name(model: PreTrainedModel, stored: Iterable[str]) -> str | None:
    """Return the stored name of the input embedding, if it has one row a token."""
    embedding, _ = _embeddings(model)
    if not isinstance(embedding, nn.Embedding):
        return None
    places = {module: name for name, module in model.named_modules()}
    wanted = f"{places[embedding]}.weight"
    return next((n for n, module in module_names(model, stored).items() if module == wanted), None)


def before_layers(model: PreTrainedModel, stored: Iterable[str]) -> set[str]:
    """Return the stored tensors of modules before the layers: embeddings and what goes with them.

    To be asked of tensors outside the layers; the others come after them, as norm and head do.
    """
    _, head = _embeddings(model)
    modules = dict(model.named_modules())

    def is_before(parameter: str) -> bool:
        module = modules.get(parameter.rpartition(".")[0])
        if head is not None and module is head:
            return False
        named_so = BEFORE_LAYERS.search(parameter) and not AFTER_LAYERS.search(parameter)
        return isinstance(module, nn.Embedding) or bool(named_so)

    names = module_names(model, stored)
    return {name for name, parameter in names.items() if is_before(parameter)}


def vocabulary_dims(
    cls: type[PreTrainedModel], config: PretrainedConfig, stored: Iterable[str]
) -> dict[str, int]:
    """Map the stored tensors that have one entry a token to the dimension that counts them.

    A tensor is one if it grows with the config's vocabulary, whatever it is called and whatever
    other dimensions happen to be as large.
    """
    part = text_config(config)
    sizes = ("vocab_size", "vocab_size_per_layer_input")
    larger = changed_config(
        config, **{key: getattr(part, key) + 64 for key in sizes if hasattr(part, key)}
    )
    with torch.device("meta"), no_init_weights():
        model, grown = cls(changed_config(config)), cls(larger).state_dict()
    dims = {
        name: next(
            d for d, (a, b) in enumerate(zip(t.shape, grown[name].shape, strict=True)) if a != b
        )
        for name, t in model.state_dict().items()
        if t.shape != grown[name].shape
    }
    names = module_names(model, stored)
    return {name: dims[module] for name, module in names.items() if module in dims}


def vocabulary_rows(
    cls: type[PreTrainedModel],
    skeleton: PreTrainedModel,
    donor: Checkpoint,
    models: Sequence[Checkpoint],
    trust_remote_code: bool = False,
) -> tuple[Callable[[Checkpoint, str, Source], Rows | None], list[str]]:
    """Match the vocabularies of models with the donor's, by token.

    Returns a function that gives for a model, the stored name of one of its tensors, and the
    donor's tensor of that role, which rows to take; and lines for the user. Raises Problems.
    """
    embedding = embedding_name(skeleton, donor.tensors)
    if embedding is None:
        return lambda model, name, given: None, []
    problems: list[str] = []
    vocabularies: dict[Checkpoint, Vocabulary] = {}
    matches: dict[Checkpoint, list[int] | None] = {}
    for checkpoint in dict.fromkeys((donor, *models)):
        if embedding in checkpoint.tensors:  # else it is reported as missing
            with collecting(problems):
                tokens = read_tokens(checkpoint.path, trust_remote_code)
                size = checkpoint.tensors[embedding].shape[0]
                vocabularies[checkpoint] = Vocabulary(checkpoint.name, size, tokens)
    refuse(problems)
    for checkpoint, vocabulary in vocabularies.items():
        with collecting(problems):
            matches[checkpoint] = match(vocabularies[donor], vocabulary)
    refuse(problems)
    named = {checkpoint.name: found for checkpoint, found in vocabularies.items()}
    notes = report(vocabularies[donor], named, {c.name: rows for c, rows in matches.items()})
    if not any(matches.values()):
        return lambda model, name, given: None, notes
    dims = vocabulary_dims(cls, donor.config, {n for c in matches for n in c.tensors})

    def rows(model: Checkpoint, name: str, given: Source) -> Rows | None:
        found = matches.get(model)
        if found is None or name not in dims or name not in model.tensors:
            return None
        dim = dims[name]
        wanted, size = given.info.shape[dim], model.tensors[name].shape[dim]
        if wanted > len(found):
            return None  # a difference of shapes, reported as such
        chosen = torch.tensor(found[:wanted])
        chosen[chosen >= size] = MISSING
        return Rows(dim, chosen.clamp_min(0), (chosen < 0).nonzero().flatten(), given)

    return rows, notes


def says_tied(config: PretrainedConfig) -> bool:
    """Whether a config ties embedding and head, in its text part or as a whole."""
    parts = (config, text_config(config))
    return any(getattr(part, "tie_word_embeddings", False) for part in parts)


def tied_names(checkpoint: Checkpoint, ties: Mapping[str, str]) -> set[str]:
    """Return those of the possible ties that a checkpoint has: not stored, or stored and equal."""
    if not says_tied(checkpoint.config):
        return set()
    return {
        target
        for target, source in ties.items()
        if source in checkpoint.tensors
        and (
            target not in checkpoint.tensors
            or torch.equal(checkpoint.read(target), checkpoint.read(source))
        )
    }


def changed_config(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Return a copy of a config in which attributes of its text part are changed."""
    copy = type(config).from_dict(config.to_dict())
    part = text_config(copy)
    for name, value in changes.items():
        setattr(part, name, value)
    if "tie_word_embeddings" in changes:
        copy.tie_word_embeddings = changes["tie_word_embeddings"]
    return copy


def ignored_names(checkpoints: Iterable[Checkpoint], model: PreTrainedModel) -> set[str]:
    """Return the stored tensors that are buffers which the model computes by itself."""
    own = model.state_dict()
    stored = {name for checkpoint in checkpoints for name in checkpoint.tensors}
    buffers = module_names(model, filter(COMPUTED_BUFFERS.search, stored))
    return {name for name, module in buffers.items() if module not in own}
