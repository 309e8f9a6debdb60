"""Apply a LoRA adapter to a checkpoint: its tensors change as they are read, nothing is stored.

    W + scale * B A,   scale = alpha / r, or alpha / sqrt(r) with rsLoRA    (arXiv 2106.09685)

rounded once to the dtype of W, as peft's merge_and_unload has it. Tensors that the adapter holds
whole (modules_to_save, biases) replace the model's; embeddings among them may have more rows, or
fewer, as after resize_token_embeddings.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from merging.models.checkpoints import Checkpoint, changed_config
from merging.models.folders import ADAPTER_CONFIG, adapter_weights, read_json
from merging.models.patterns import first_matches
from merging.models.structure import Structure
from merging.models.tensors import LazyTensor
from merging.models.tokens import has_tokenizer, read_tokens
from merging.models.vocabulary_sizes import PADDED, changed_rows
from merging.models.weight_files import read_file
from merging.problems import Problems, collecting, refuse, some
from merging.recipes.yaml_files import is_number

BLOCK = 1 << 20  # elements of a weight that are changed at a time
PREFIX = "base_model.model."
FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<factor>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?$"
)
# Settings of peft that change what an adapter's tensors mean.
UNSUPPORTED = (
    "use_dora use_qalora lora_bias target_parameters trainable_token_indices layer_replication "
    "megatron_config alora_invocation_tokens arrow_config monteclora_config velora_config "
    "use_bdlora kasa_config"
).split()
# Initialisations after which the base is still the one that was published.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
WRAPPERS = re.compile(r"\.base_layer\.|\.modules_to_save\.(default\.)?")
OTHER_MODEL = "probably an adapter of another model"
DEFAULT_ALPHA = 8  # peft's


class Factors(NamedTuple):
    """The two matrices whose product is added to a module's weight."""

    a: str
    b: str
    is_embedding: bool


def adapted(checkpoint: Checkpoint, folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Return a checkpoint as a LoRA adapter changes it.

    Raises Problems for other kinds of adapters, and for tensors that do not fit the checkpoint.
    """
    config = read_json(checkpoint.name, folder / ADAPTER_CONFIG)
    refuse([f"{checkpoint.name}: {problem}" for problem in _unsupported(config)])
    stored = read_file(checkpoint.name, adapter_weights(checkpoint.name, folder))
    factors, whole, problems = _sorted_keys(stored)
    structure = Structure(checkpoint, trust_remote_code)
    checkpoint = structure.renamed(checkpoint)
    tied = {target: structure.ties[target] for target in structure.tied(checkpoint)}
    asked = [*whole.values(), *(f"{module}.weight" for module in factors)]
    names = _Names(structure, checkpoint, asked)

    tensors, untied, strangers = _with_whole(checkpoint, stored, whole, names, tied, config)
    problems += strangers
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    with collecting(problems):
        if rows := changed_rows(structure, checkpoint, tensors):
            changes["vocab_size"] = rows
            tensors |= {n: _padded(t, rows) for n, t in tensors.items() if n.endswith(PADDED)}
    problems += _apply(factors, stored, tensors, tied, names, config)
    refuse([f"{checkpoint.name}: {problem}" for problem in problems])
    config_after = changed_config(checkpoint.config, **changes) if changes else checkpoint.config
    after = replace(checkpoint, config=config_after, tensors=tensors, adapter=folder)
    embedding = structure.embedding_name(checkpoint.tensors) or ""
    is_other = tensors.get(embedding) is not checkpoint.tensors.get(embedding)
    return _with_tokenizer(after, changes.get("vocab_size"), is_other, trust_remote_code)


def _with_tokenizer(
    checkpoint: Checkpoint, rows: int | None, has_embedding: bool, trust: bool
) -> Checkpoint:
    """Give an adapted checkpoint the tokenizer in the adapter's folder, if it has other tokens.

    It belongs to the embedding that the adapter changes, perhaps to another number of `rows`.
    """
    folder = checkpoint.adapter
    if folder is None or not (rows or has_embedding):
        return checkpoint
    resized = f"the adapter brings embeddings of {rows} rows" if rows else ""
    if not has_tokenizer(folder):
        used, instead = False, "no tokenizer in its folder, so that of the model tells the tokens"
    else:
        used = bool(rows) or _ids(folder, trust) != _ids(checkpoint.folder, trust)
        instead = "the tokenizer is that in the adapter's folder"
    said = "; ".join(filter(None, [resized, instead * (used or bool(rows))]))
    notes = (f"vocabulary: {checkpoint.name}: {said}",) if said else ()
    return replace(checkpoint, tokens_of_adapter=used, notes=notes)


def _ids(folder: Path, trust: bool) -> Mapping[str, int]:
    tokens = read_tokens(folder, trust)
    return {} if tokens is None else tokens.ids


def _with_whole(
    checkpoint: Checkpoint,
    stored: Mapping[str, LazyTensor],
    whole: Mapping[str, str],
    names: "_Names",
    tied: Mapping[str, str],
    config: Mapping[str, Any],
) -> tuple[dict[str, LazyTensor], bool, list[str]]:
    """Return the model's tensors with those that the adapter holds whole, and what is no such one.

    Modules that peft was asked to save have copies of their own, and no longer the other end's
    weight if they were tied: then all heads are apart, as the config ties all of them or none.
    Other tensors were saved of the model itself, and go where both ends of a tie find them.
    """
    own = {n: tensor for n, tensor in checkpoint.tensors.items() if n not in tied}
    ends = {*tied.keys(), *tied.values()} if config.get("ensure_weight_tying") else set()
    copies: dict[str, LazyTensor] = {}
    strangers = []
    for key, parameter in whole.items():
        name = names.stored(parameter)
        source = tied.get(name, name)
        if source not in checkpoint.tensors:
            strangers.append(f"the adapter's {key} matches no tensor of the model")
            continue
        paths = itertools.accumulate(parameter.split(".")[:-1], "{}.{}".format)
        asked = any(path.endswith(s) for path in paths for s in config.get("modules_to_save") or ())
        is_copy = name in ends or (asked and ".base_layer." not in key)
        tensor = _cast(stored[key], checkpoint.tensors[source].dtype)
        (copies if is_copy else own)[name if is_copy else source] = tensor
    untied = any(len({target, source} & copies.keys()) == 1 for target, source in tied.items())
    if untied:
        own |= {target: own[source] for target, source in tied.items()}
    return own | copies, untied, strangers


def _apply(
    factors: Mapping[str, Factors],
    stored: Mapping[str, LazyTensor],
    tensors: dict[str, LazyTensor],
    tied: Mapping[str, str],
    names: "_Names",
    config: Mapping[str, Any],
) -> list[str]:
    """Add to the tensors what pairs of factors make; return which of these do not fit."""
    unfit: list[str] = []
    patterns: dict[str, str | None] = dict.fromkeys(factors)
    with collecting(unfit):
        patterns = first_matches(list(config.get("alpha_pattern") or {}), list(factors))
    for module, found in factors.items():
        if len(stored[found.a].shape) > 2:
            unfit.append(f"the adapter's {found.a} is of a convolution, which cannot be applied")
            continue
        name = names.stored(f"{module}.weight")
        place = name if name in tensors else tied.get(name, name)
        if place not in tensors:
            unfit.append(f"the adapter's {found.a} matches no tensor of the model")
            continue
        flipped = found.is_embedding or names.is_flipped(place)
        rank = stored[found.a].shape[0] if stored[found.a].shape else 0
        scale = _scale(config, patterns[module], rank) if rank else 0.0
        with collecting(unfit):
            pair = (stored[found.a], stored[found.b])
            tensors[place] = _with_product(tensors[place], place, pair, scale, flipped)
    if len(unfit) > 5 and len(unfit) == len(factors):
        unfit = [f"none of the {len(unfit)} modules fits, as in: {unfit[0]}; {OTHER_MODEL}"]
    return unfit


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Return what an adapter's config says that cannot be applied."""
    kind, initialised = config.get("peft_type"), config.get("init_lora_weights")
    remedy = "merge it into its base with peft's merge_and_unload first"
    problems = [f"the adapter has {key}; {remedy}" for key in UNSUPPORTED if config.get(key)]
    if kind != "LORA":
        problems.append(f"an adapter of type {kind}, expected LORA; {remedy}")
    if initialised not in INITIALISATIONS:
        problems.append(
            f"the adapter was initialised by {initialised}, which changes the base model; {remedy}"
        )
    saved = config.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        problems.append(f"modules_to_save: expected a list of names, found {saved!r}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        problems.append(f"alpha_pattern: expected a mapping, found {patterns!r}")
        patterns = {}
    alphas = {"lora_alpha": config.get("lora_alpha", DEFAULT_ALPHA)}
    alphas |= {f"alpha_pattern.{pattern}": alpha for pattern, alpha in patterns.items()}
    problems += [
        f"{key}: expected a finite number, found {alpha!r}"
        for key, alpha in alphas.items()
        if not is_number(alpha)
    ]
    return problems


def _sorted_keys(
    stored: Mapping[str, LazyTensor],
) -> tuple[dict[str, Factors], dict[str, str], list[str]]:
    """Sort an adapter's tensors into pairs by module, and whole ones by key: and what is odd."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    problems = []
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        if not tensor.is_floating:
            problems.append(f"the adapter's {key} is {tensor.dtype}, expected a floating dtype")
        elif match := FACTOR.match(name):
            found = halves.setdefault(match["module"], {})
            if match["factor"] in found:
                problems.append(f"the adapter holds {name} twice")
            found[match["factor"]] = key
        elif ".original_module." not in name:  # what modules_to_save took the place of
            whole[key] = WRAPPERS.sub(".", name)
    factors = {}
    for module, found in halves.items():
        if found.keys() == {"lora_A", "lora_B"}:
            factors[module] = Factors(found["lora_A"], found["lora_B"], False)
        elif found.keys() == {"lora_embedding_A", "lora_embedding_B"}:
            factors[module] = Factors(found["lora_embedding_A"], found["lora_embedding_B"], True)
        else:
            problems.append(
                f"expected two factors of {module} in the adapter, found {some(found.values())}"
            )
    if not stored:
        problems.append("the adapter holds no tensors")
    return factors, whole, problems


class _Names:
    """Find stored tensors by the names that they have as parameters, as adapters call them."""

    def __init__(self, structure: Structure, checkpoint: Checkpoint, asked: Iterable[str]) -> None:
        self._structure = structure
        self._current = structure.parameters_of(asked)  # of those that older versions gave
        self._parameters = structure.parameters_of(checkpoint.tensors)
        self._stored: dict[str, list[str]] = {}
        for name, parameter in self._parameters.items():
            self._stored.setdefault(parameter, []).append(name)
        self._prefix = f"{structure.model.base_model_prefix}."

    def stored(self, parameter: str) -> str:
        """Return the stored name; of parameters fused of several tensors, none."""
        prefix = self._prefix
        current = self._current[parameter]
        for name in (parameter, prefix + parameter, parameter.removeprefix(prefix), current):
            if name in self._parameters:
                return name
            if len(self._stored.get(name, ())) == 1:
                return self._stored[name][0]
        return parameter

    def is_flipped(self, stored: str) -> bool:
        """Whether a weight is stored as inputs by outputs, as GPT-2's are."""
        return isinstance(self._structure.module_of(self._parameters.get(stored, stored)), Conv1D)


def _scale(config: Mapping[str, Any], pattern: str | None, rank: int) -> float:
    alpha = float(config.get("lora_alpha", DEFAULT_ALPHA))
    if pattern is not None:
        alpha = float(config["alpha_pattern"][pattern])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(tensor.label, tensor.shape, dtype, lambda: tensor.read().to(dtype), (tensor,))


def _padded(tensor: LazyTensor, size: int) -> LazyTensor:
    """Return a tensor with zeros at the end of its last dimension, or cut there."""
    shape, more = (*tensor.shape[:-1], size), (0, size - tensor.shape[-1])
    read = lambda: torch.nn.functional.pad(tensor.read(), more)  # noqa: E731
    return LazyTensor(tensor.label, shape, tensor.dtype, read, (tensor,))


def _with_product(
    weight: LazyTensor, name: str, pair: tuple[LazyTensor, LazyTensor], scale: float, flipped: bool
) -> LazyTensor:
    """Return weight + scale * B A, for a pair A and B, or its transpose if `flipped`.

    It is computed a few rows at a time. Raises Problems if the shapes do not fit.
    """
    a, b = pair
    is_pair = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0
    shape = (b.shape[0], a.shape[1])[:: -1 if flipped else 1] if is_pair else ()
    if not is_pair or shape != weight.shape:
        labels = [factor.label.rpartition(": ")[2] for factor in pair]
        raise Problems(
            f"the adapter's {labels[0]} {a.shape} and {labels[1]} {b.shape} do not make a change "
            f"of {name} {weight.shape}"
        )

    def read() -> Tensor:
        before, left, right = weight.read(), b.read(), a.read().double()
        if flipped:
            left, right = right.T, left.T.double()
        result = torch.empty(before.shape, dtype=before.dtype)
        rows = max(1, BLOCK // max(1, before.shape[1]))
        for start in range(0, len(before), rows):
            block = slice(start, start + rows)
            product = left[block].double() @ right
            result[block] = product.mul_(scale).add_(before[block])
        return result

    return LazyTensor(weight.label, weight.shape, weight.dtype, read, (weight, a, b))
