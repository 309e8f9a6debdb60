"""Apply a LoRA adapter to a checkpoint: its tensors change as they are read, nothing is stored.

    W + scale * B A,   scale = alpha / r, or alpha / sqrt(r) with rsLoRA    (arXiv 2106.09685)

rounded once to the dtype of W, as peft's merge_and_unload has it. Tensors that the adapter holds
whole (modules_to_save, biases) replace the model's.
"""

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

    tensors = {n: tensor for n, tensor in checkpoint.tensors.items() if n not in tied}
    replaced: set[str] = set()
    # The weights under factors come last: a tied head's is the embedding, unless that is replaced.
    for key, parameter in sorted(whole.items(), key=lambda item: ".base_layer." in item[0]):
        name = names.stored(parameter)
        of_base = ".base_layer." in key
        place = tied[name] if of_base and name in tied and tied[name] not in replaced else name
        original = checkpoint.tensors.get(tied.get(name, name))
        if problem := _misfit(key, stored[key], original):
            problems.append(problem)
        elif original is not None:
            tensors[place] = _cast(stored[key], original.dtype)
            replaced |= set() if of_base else {place}
    untied = _untie(checkpoint, tensors, tied, replaced)
    unfit = _apply(factors, stored, tensors, tied, names, config)
    refuse([f"{checkpoint.name}: {problem}" for problem in problems + unfit])
    changes = {"tie_word_embeddings": False} if untied else {}
    config_after = changed_config(checkpoint.config, **changes) if changes else checkpoint.config
    return replace(checkpoint, config=config_after, tensors=tensors, adapter=folder)


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


def _misfit(key: str, found: LazyTensor, original: LazyTensor | None) -> str | None:
    if original is None:
        return f"the adapter's {key} matches no tensor of the model"
    if original.shape != found.shape:
        return (
            f"the adapter's {key} is {found.shape}, the model has {original.shape}; resize the "
            "model's vocabulary first, if that is what the adapter was trained with"
        )
    return None


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


def _untie(
    checkpoint: Checkpoint,
    tensors: dict[str, LazyTensor],
    tied: Mapping[str, str],
    replaced: set[str],
) -> bool:
    """Give a tied model heads of their own if the adapter replaces one end of a tie only.

    Both ends are in the adapter where peft kept them tied; the config ties all of them, or none.
    """
    untied = any(len({target, source} & replaced) == 1 for target, source in tied.items())
    if untied:
        for target, source in tied.items():
            tensors.setdefault(target, checkpoint.tensors[source])
    return untied


def _scale(config: Mapping[str, Any], pattern: str | None, rank: int) -> float:
    alpha = float(config.get("lora_alpha", DEFAULT_ALPHA))
    if pattern is not None:
        alpha = float(config["alpha_pattern"][pattern])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(tensor.label, tensor.shape, dtype, lambda: tensor.read().to(dtype), (tensor,))


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
