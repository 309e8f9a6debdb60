"""What transformers knows of a model's structure: its class, names, ties and vocabulary.

Everything is asked of models on the meta device, where tensors have shapes and no memory.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from merging.models.checkpoints import Checkpoint, says_tied
from merging.models.layers import NUMBERED
from merging.models.tensors import FLOAT_DTYPES
from merging.models.trial import Trial, tried
from merging.problems import Problems, reading, refuse, some

# Buffers that old checkpoints stored and models now compute; matched against the end of a name.
COMPUTED_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|(attn|attention)\.(masked_)?bias"
    r"|embeddings\.position_ids)$"
)

# Names of what stands before the layers, though it is no embedding, and of what only sounds so.
BEFORE_LAYERS = re.compile(
    r"(?<!un)emb|project_in|patch_conv|(^|\.)conv\d\.|pre_?layr?norm|layernorm_pre|(^|\.)ln_pre"
    r"|per_layer_model_projection|per_layer_projection_norm|input_hidden_states"
    r"|(^|\.)altup_projections|(^|\.)position_bias\.|feature_projection|(^|\.)conv_layers\.\d"
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
            with reading(folder, f"its own code, {reference}"):
                remote_class: type[PreTrainedModel]
                remote_class = get_class_from_dynamic_module(reference, folder)
                return remote_class
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise Problems(
            f"{folder}: transformers {transformers.__version__} has no class {name!r}, "
            "which config.json names in architectures; if the model brings its own code that you "
            "trust, use --trust-remote-code"
        )
    return found


@contextmanager
def _meta_alone() -> Iterator[None]:
    """Keep transformers from fusing very large tensors on the CPU: of the meta device, none can."""
    original = WeightConverter.force_cpu
    WeightConverter.force_cpu = property(lambda converter: False, original.__set__)
    try:
        yield
    finally:
        WeightConverter.force_cpu = original


def assemble(
    name: str,
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, Shaped],
) -> tuple[PreTrainedModel, list[str]]:
    """Load tensors of these shapes into the class, without values: the model, what does not fit.

    transformers itself does it, on the meta device, with all the renaming and fusing that it does
    for a real load. `name` is the model's, for messages.
    """
    values = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    with _meta_alone(), reading(name, f"{cls.__name__} cannot be built from config and tensors"):
        model, report = cls.from_pretrained(
            None,
            config=type(config).from_dict(config.to_dict()),
            state_dict=values,
            device_map="meta",
            dtype=_main_dtype(tensors),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    problems = []
    if report["missing_keys"]:
        problems.append(f"{name}: {cls.__name__} misses {some(report['missing_keys'])}")
    unexpected = {n for n in report["unexpected_keys"] if not COMPUTED_BUFFERS.search(n)}
    if unexpected:
        problems.append(f"{name}: {cls.__name__} has no place for {some(unexpected)}")
    for key, found, expected in sorted(report["mismatched_keys"]):
        problems.append(
            f"{name}: {cls.__name__} expects {key} of shape {tuple(expected)}, not {tuple(found)}"
        )
    return model, problems


def _main_dtype(tensors: Mapping[str, Shaped]) -> torch.dtype:
    """Return the floating dtype that holds the most bytes."""
    sizes = {dtype: 0 for dtype in FLOAT_DTYPES}
    for tensor in tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _shapes(tensors: Mapping[str, Shaped]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Structure:
    """What the class of a checkpoint makes of stored tensors; Problems if they do not fit it."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
        self.config = checkpoint.config
        self.cls = model_class(checkpoint.config, checkpoint.folder, trust_remote_code)
        self.model, problems = assemble(
            checkpoint.name, self.cls, checkpoint.config, checkpoint.tensors
        )
        refuse(problems)
        self._modules = dict(self.model.named_modules())
        self.ties = self._possible_ties(checkpoint.tensors)
        self._wanted = checkpoint.tensors.keys() | self.ties.keys() | set(self.ties.values())
        self._own_shapes = _shapes(checkpoint.tensors)
        self._tied: dict[Checkpoint, frozenset[str]] = {}

    # ------------------------------------------------------------------------ names

    @cached_property
    def _own(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())

    @cached_property
    def _parents(self) -> set[str]:
        """Where the wanted tensors are: the names of their modules, and of the modules of these."""
        parts = (name.split(".") for name in self._wanted)
        return {".".join(part[:i]) for part in parts for i in range(1, len(part))}

    @cached_property
    def _renamings(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def parameters_of(self, stored: Iterable[str]) -> dict[str, str]:
        """Map stored names to those of the model's own parameters, as transformers does on load."""
        prefix, own = self.model.base_model_prefix, self._own

        def rename(name: str) -> str:
            renamed = rename_source_key(name, *self._renamings, prefix, own)[0]
            return name if renamed not in own and name in own else renamed

        return {name: rename(name) for name in stored}

    def assembled(
        self, makers: str, config: PretrainedConfig, tensors: Mapping[str, Shaped]
    ) -> tuple[PreTrainedModel, list[str]]:
        """Return a model of the class, of other tensors and another config perhaps, as assemble."""
        if config is self.config and _shapes(tensors) == self._own_shapes:
            return self.model, []
        return assemble(makers, self.cls, config, tensors)

    def module_of(self, parameter: str) -> nn.Module | None:
        """Return the module that has a parameter."""
        return self._modules.get(parameter.rpartition(".")[0])

    def renamed(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return another checkpoint of the class with its tensors under this one's names.

        Some were saved without the prefix of the model inside (`wte.weight`), others of the same
        architecture with it (`transformer.wte.weight`); a tied head may be stored instead of the
        embedding.
        """
        prefix = f"{self.model.base_model_prefix}."

        def rename(name: str) -> str:
            candidates = (name, prefix + name, name.removeprefix(prefix))
            if COMPUTED_BUFFERS.search(name):  # which this one need not store
                beside = (c for c in candidates if self._parents & {*_around(c)})
                return next(beside, name)
            return next((c for c in candidates if c in self._wanted), name)

        tensors = {rename(name): tensor for name, tensor in checkpoint.tensors.items()}
        for target, source in self.ties.items():
            if says_tied(checkpoint.config) and source not in tensors and target in tensors:
                tensors[source] = tensors.pop(target)
        return replace(checkpoint, tensors=tensors)

    def ignored(self, checkpoints: Iterable[Checkpoint]) -> set[str]:
        """Return the stored tensors that are buffers which the model computes by itself."""
        stored = {name for checkpoint in checkpoints for name in checkpoint.tensors}
        buffers = self.parameters_of(filter(COMPUTED_BUFFERS.search, stored))
        return {name for name, parameter in buffers.items() if parameter not in self._own}

    # ------------------------------------------------------------------------ embeddings

    @cached_property
    def _embeddings(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules of the input and output embeddings; None where a model has none."""
        try:
            return self.model.get_input_embeddings(), self.model.get_output_embeddings()
        except (NotImplementedError, AttributeError):  # e.g. of a vision model
            return None, None

    def _possible_ties(self, stored: Iterable[str]) -> dict[str, str]:
        """Map each tensor that a checkpoint of this class may leave out, to that it is tied to.

        The head to the embedding, above all, whatever the config says. In stored names, where there
        are any; a tensor that is not stored goes by its name in the model.
        """
        declared = dict(getattr(self.model, "_tied_weights_keys", None) or {})
        ties = {t: s for t, s in declared.items() if t in self._own and s in self._own}
        ties |= self.model.all_tied_weights_keys
        places = {module: name for name, module in self._modules.items()}
        embedding, head = self._embeddings
        if (
            isinstance(embedding, nn.Embedding)
            and isinstance(head, nn.Linear)
            and head.weight.shape == embedding.weight.shape
        ):
            ties.setdefault(f"{places[head]}.weight", f"{places[embedding]}.weight")
        names = {parameter: name for name, parameter in self.parameters_of(stored).items()}
        return {names.get(t, t): names.get(s, s) for t, s in ties.items()}

    def tied(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Return those of the possible ties that a checkpoint has: not stored, or stored equal."""
        if checkpoint not in self._tied:
            tensors = checkpoint.tensors
            self._tied[checkpoint] = frozenset(
                target
                for target, source in self.ties.items()
                if says_tied(checkpoint.config)
                and source in tensors
                and (
                    target not in tensors
                    or torch.equal(tensors[target].read(), tensors[source].read())
                )
            )
        return self._tied[checkpoint]

    def stored_name(self, checkpoint: Checkpoint, name: str) -> str:
        """Return under which name a checkpoint stores a tensor: if tied, under another."""
        return self.ties[name] if name in self.tied(checkpoint) else name

    def embedding_name(self, stored: Iterable[str]) -> str | None:
        """Return the stored name of the input embedding, if it has one row a token."""
        embedding, _ = self._embeddings
        if not isinstance(embedding, nn.Embedding):
            return None
        wanted = next(f"{name}.weight" for name, m in self._modules.items() if m is embedding)
        found = self.parameters_of(stored).items()
        return next((name for name, parameter in found if parameter == wanted), None)

    def before_layers(self, stored: Iterable[str], layers: str = "") -> set[str]:
        """Return the stored tensors of modules before the layers: embeddings, what goes with them.

        To be asked of tensors outside the layers; the others come after them, as norm and head do.
        Given the path of the `layers`, modules are told by when they are called, if that is known.
        """
        _, head = self._embeddings
        called = self._called_before(layers) if layers else {}

        def is_before(parameter: str) -> bool:
            module = self.module_of(parameter)
            if head is not None and module is head:
                return False
            if (found := called.get(parameter.rpartition(".")[0])) is not None:
                return found
            return isinstance(module, nn.Embedding) or is_named_before(parameter)

        return {name for name, p in self.parameters_of(stored).items() if is_before(p)}

    @cached_property
    def trial(self) -> Trial:
        """The inputs on which the model runs without values, and the order of its modules."""
        return tried(self.model)

    def _called_before(self, layers: str) -> dict[str, bool]:
        """Tell of modules whether they are called before the layers, or after; not of others."""
        order = self.trial.order
        inside = [n for n, name in enumerate(order) if name.startswith(f"{layers}.")]
        if not inside:
            return {}
        before, after = set(order[: inside[0]]), set(order[inside[-1] :])
        told = {name: name in before for name in before ^ after}
        return {name: b for name, b in told.items() if name and not layers.startswith(f"{name}.")}

    def path_of(self, stack: str, stored: Iterable[str]) -> str:
        """Return where the model has the layers that are stored as `stack`.0, `stack`.1, ..."""
        names = (name for name in stored if name.startswith(f"{stack}."))
        parameters = (self.parameters_of([name])[name] for name in names)
        match = NUMBERED.match(next((p for p in parameters if p in self._own), ""))
        return match["stack"] if match else stack


def _around(name: str) -> Iterator[str]:
    """Yield the names of the module that a tensor is in, and of the one that this is in."""
    for _ in range(2):
        name = name.rpartition(".")[0]
        yield name


def is_named_before(parameter: str) -> bool:
    """Whether a name tells that a tensor stands before the layers."""
    return bool(BEFORE_LAYERS.search(parameter) and not AFTER_LAYERS.search(parameter))
