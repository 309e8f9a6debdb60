"""Apply a LoRA adapter to a checkpoint: its tensors change as they are read, nothing is stored.

    W + scale * B A,   scale = alpha / r, or alpha / sqrt(r) with rsLoRA    (arXiv 2106.09685)

rounded once to the dtype of W, as peft's merge_and_unload has it. Tensors that the adapter holds
whole (modules_to_save, biases) replace the model's.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import architecture as arch
from checkpoints import FLOAT_DTYPES, Change, Checkpoint, TensorInfo, read_tensors
from files import ADAPTER_CONFIG, adapter_weights, read_json
from problems import refuse, some

BLOCK = 1 << 20  # elements of a weight that are changed at a time
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.(?P<factor>lora_(?:embedding_)?[AB])(?:\.weight)?$")
# Settings of peft that change what an adapter's tensors mean.
UNSUPPORTED = (
    "use_dora use_qalora lora_bias target_parameters trainable_token_indices layer_replication "
    "megatron_config alora_invocation_tokens arrow_config monteclora_config velora_config "
    "use_bdlora kasa_config"
).split()
# Initialisations after which the base is still the one that was published.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
WRAPPERS = re.compile(r"\.base_layer\.|\.modules_to_save\.(default\.)?")
DEFAULT_ALPHA = 8  # peft's


class Factors(NamedTuple):
    """The two matrices whose product is added to a module's weight."""

    a: str
    b: str
    is_embedding: bool


def adapted(checkpoint: Checkpoint, folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Return a checkpoint as a LoRA adapter changes it.

    Raises ValueError for other kinds of adapters, and for tensors that do not fit the checkpoint.
    """
    config = read_json(checkpoint.name, folder / ADAPTER_CONFIG)
    refuse([f"{checkpoint.name}: {problem}" for problem in _unsupported(config)])
    file = adapter_weights(checkpoint.name, folder)
    reader, headers = read_tensors(file)
    factors, whole, problems = _sorted_keys(headers)

    cls = arch.model_class(checkpoint.config, checkpoint.path, trust_remote_code)
    skeleton, misfits = arch.assemble(cls, checkpoint.config, checkpoint.tensors)
    refuse([f"{checkpoint.name}: {misfit}" for misfit in misfits])
    ties = arch.possible_ties(skeleton, checkpoint.tensors)
    [checkpoint] = arch.aligned([checkpoint], skeleton.base_model_prefix, ties)
    tied = {t: ties[t] for t in arch.tied_names(checkpoint, ties)}
    asked = [*whole.values(), *(f"{module}.weight" for module in factors)]
    names = _Names(skeleton, checkpoint, asked)

    tensors = {n: info for n, info in checkpoint.tensors.items() if n not in tied}
    replaced: set[str] = set()
    changes: dict[TensorInfo, tuple[Change, ...]] = {}
    # The weights under factors come last: a tied head's is the embedding, unless that is replaced.
    for key, parameter in sorted(whole.items(), key=lambda item: ".base_layer." in item[0]):
        name = names.stored(parameter)
        of_base = ".base_layer." in key
        place = tied[name] if of_base and name in tied and tied[name] not in replaced else name
        original = checkpoint.tensors.get(tied.get(name, name))
        if original is None:
            problems.append(f"the adapter's {key} matches no tensor of the model")
        elif original.shape != headers[key].shape:
            problems.append(
                f"the adapter's {key} is {headers[key].shape}, the model has {original.shape}; "
                "resize the model's vocabulary first, if that is what the adapter was trained with"
            )
        else:
            tensors[place] = headers[key]._replace(dtype=original.dtype)
            changes[tensors[place]] = (_cast(original.dtype),)
            replaced |= set() if of_base else {place}
    untied = _untie(checkpoint, tensors, tied, replaced)
    for module, found in factors.items():
        name = names.stored(f"{module}.weight")
        place = name if name in tensors else tied.get(name, name)
        if place not in tensors:
            problems.append(f"the adapter's {found.a} matches no tensor of the model")
            continue
        a, b = reader(found.a), reader(found.b)
        flipped = found.is_embedding or names.is_flipped(place)
        shape = (b.shape[0], a.shape[1])[:: -1 if flipped else 1] if a.ndim == b.ndim == 2 else ()
        if shape != tensors[place].shape or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            problems.append(
                f"the adapter's {found.a} {tuple(a.shape)} and {found.b} {tuple(b.shape)} do not "
                f"make a change of {place} {tensors[place].shape}"
            )
            continue
        left, right = (a.T, b.T) if flipped else (b, a)
        change = _add_product(left, right, _scale(config, module, a.shape[0]))
        changes[tensors[place]] = (*changes.get(tensors[place], ()), change)
    refuse([f"{checkpoint.name}: {problem}" for problem in problems])
    return replace(
        checkpoint,
        config=arch.changed_config(checkpoint.config, tie_word_embeddings=False)
        if untied
        else checkpoint.config,
        tensors=tensors,
        changes=changes,
        adapter=folder,
        readers={**checkpoint.readers, file: reader},
    )


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
        if not isinstance(alpha, int | float) or not math.isfinite(alpha)
    ]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"alpha_pattern.{pattern}: not a regular expression: {error}")
    return problems


def _sorted_keys(
    headers: Mapping[str, TensorInfo],
) -> tuple[dict[str, Factors], dict[str, str], list[str]]:
    """Sort an adapter's tensors into pairs by module, and whole ones by key: and what is odd."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    problems = []
    for key, header in headers.items():
        name = key.removeprefix(PREFIX)
        if header.dtype not in FLOAT_DTYPES:
            problems.append(f"the adapter's {key} is {header.dtype}, expected a floating dtype")
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
    if not headers:
        problems.append("the adapter holds no tensors")
    return factors, whole, problems


class _Names:
    """Find stored tensors by the names that they have as parameters, as adapters call them."""

    def __init__(
        self, skeleton: PreTrainedModel, checkpoint: Checkpoint, asked: Iterable[str]
    ) -> None:
        self._current = arch.module_names(skeleton, asked)  # of those that older versions gave
        self._parameters = arch.module_names(skeleton, checkpoint.tensors)
        self._stored: dict[str, list[str]] = {}
        for name, parameter in self._parameters.items():
            self._stored.setdefault(parameter, []).append(name)
        self._prefix = f"{skeleton.base_model_prefix}."
        self._modules = dict(skeleton.named_modules())

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
        module = self._parameters.get(stored, stored).rpartition(".")[0]
        return isinstance(self._modules.get(module), Conv1D)


def _untie(
    checkpoint: Checkpoint,
    tensors: dict[str, TensorInfo],
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


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(config.get("lora_alpha", DEFAULT_ALPHA))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _cast(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def _add_product(left: Tensor, right: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """Return the change that adds scale * left @ right, a few rows at a time."""

    def change(weight: Tensor) -> Tensor:
        result = torch.empty(weight.shape, dtype=weight.dtype)
        rows = max(1, BLOCK // max(1, weight.shape[1]))
        wide = right.double()
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            product = left[block].double() @ wide
            result[block] = product.mul_(scale).add_(weight[block])
        return result

    return change
