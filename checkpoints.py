"""Open checkpoints: a config, and the named tensors of its weight files, without reading them.

Values are memory-mapped: they are read from the disk when they are used, and never changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from files import read_json, weight_files
from problems import refuse, some

# Config values that change what a model computes with the same tensors.
MEANINGS = (
    "model_type rope_parameters rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps hidden_act "
    "hidden_activation activation_function num_attention_heads num_key_value_heads head_dim "
    "sliding_window layer_types no_rope_layers partial_rotary_factor query_pre_attn_scalar "
    "attn_logit_softcapping final_logit_softcapping logit_scale embedding_multiplier "
    "residual_multiplier attention_multiplier logits_scaling num_experts_per_tok "
    "use_parallel_residual"
).split()
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS_DTYPES = {  # in the order in which a file has them
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


Change = Callable[[Tensor], Tensor]


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor, and where its bytes are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    key: str  # its name in the file

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: the name the user gave, its directory, config and stored tensors."""

    name: str
    path: Path
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    readers: Mapping[Path, Callable[[str], Tensor]] = field(repr=False)  # by file, then key
    changes: Mapping[TensorInfo, tuple[Change, ...]] = field(default_factory=dict, repr=False)
    adapter: Path | None = None  # the folder of the adapter that brings the changes

    def stored(self, name: str) -> Tensor:
        """Return a tensor as it is stored, memory-mapped."""
        info = self.tensors[name]
        return self.readers[info.file](info.key)

    def read(self, name: str) -> Tensor:
        """Return a tensor as the model has it: as stored, or changed by an adapter."""
        tensor = self.stored(name)
        for change in self.changes.get(self.tensors[name], ()):
            tensor = change(tensor)
        return tensor


class Rows(NamedTuple):
    """Which rows of a tensor to take, along `dim`; where none is to be had, those of another."""

    dim: int
    chosen: Tensor  # (rows of the result), 0 where missing
    missing: Tensor  # (number of missing rows), their places in the result
    substitute: "Source"


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, or its rows rearranged, as an ingredient of an output tensor."""

    checkpoint: Checkpoint
    name: str
    rows: Rows | None = None

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.tensors[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.info.shape
        if self.rows is None:
            return shape
        return (*shape[: self.rows.dim], len(self.rows.chosen), *shape[self.rows.dim + 1 :])

    def read(self) -> Tensor:
        tensor = self.checkpoint.read(self.name)
        if self.rows is None:
            return tensor
        dim, chosen, missing, substitute = self.rows
        gathered = tensor.index_select(dim, chosen)
        if len(missing):
            others = substitute.read().index_select(dim, missing)
            gathered = gathered.to(torch.promote_types(gathered.dtype, others.dtype))
            gathered.index_copy_(dim, missing, others.to(gathered.dtype))
        return gathered


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the language model."""
    try:
        return config.get_text_config()
    except ValueError:  # several parts qualify
        return config


def _open_weights(file: Path) -> Any:
    """Open a weight file without reading its tensors: they are mapped into memory when used."""
    if file.suffix == ".safetensors":
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{file}: cannot be read as plain tensors: {str(error).splitlines()[0]} "
            "Convert it to safetensors, with transformers' save_pretrained, if you trust it."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        for name, tensor in tensors.items()
    ):
        raise ValueError(f"{file}: expected a dictionary of named, dense tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _headers(file: Path, reader: Any) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the name and header of each tensor in an open weight file."""
    if isinstance(reader, dict):
        for name, tensor in reader.items():
            if tensor.dtype not in SAFETENSORS_DTYPES.values():
                raise ValueError(f"{file}: {name} is {tensor.dtype}, which cannot be merged")
            yield name, TensorInfo(tuple(tensor.shape), tensor.dtype, file, name)
        return
    for name in reader.keys():
        view = reader.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{file}: {name} is stored as {view.get_dtype()}, which cannot be merged; "
                "dequantise the model first"
            )
        yield name, TensorInfo(tuple(view.get_shape()), dtype, file, name)


def read_tensors(file: Path) -> tuple[Callable[[str], Tensor], dict[str, TensorInfo]]:
    """Open a weight file: a reader of tensors by name, and their headers."""
    opened = _open_weights(file)
    reader = opened.__getitem__ if isinstance(opened, dict) else opened.get_tensor
    return reader, dict(_headers(file, opened))


def read_config(model: str, folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's config; ValueError if transformers does not understand it."""
    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        cause = " ".join(str(error).split())[:500]
        own_code = "auto_map" in read_json(model, folder / "config.json")
        if own_code and not trust_remote_code:
            cause = "it brings its own code; if you trust that, use --trust-remote-code"
        raise ValueError(f"{model}: transformers cannot read its config.json: {cause}") from error


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
        for key, found, expected in _differences(models[name], models[donor], MEANINGS)
    ]


def _differences(
    config: PretrainedConfig, reference: PretrainedConfig, keys: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    one, other = text_config(config), text_config(reference)
    for key in keys:
        found, expected = getattr(one, key, None), getattr(other, key, None)
        if found != expected:
            yield key, found, expected


def open_checkpoint(model: str, folder: Path, config: PretrainedConfig) -> Checkpoint:
    """Open the weight files of a folder; reads their headers only.

    Raises ValueError with all that is wrong: files missing, truncated, corrupt or not as the index
    says, and tensors that are stored twice or in a dtype that cannot be merged.
    """
    readers: dict[Path, Callable[[str], Tensor]] = {}
    tensors: dict[str, TensorInfo] = {}
    problems = []
    files, listed = weight_files(folder)
    for file in files:
        try:
            readers[file], headers = read_tensors(file)
            for name, info in headers.items():
                if name in tensors:
                    other = tensors[name].file.name
                    problems.append(f"{model}: {name} is stored twice, in {other} and {file.name}")
                tensors[name] = info
        except (ValueError, OSError) as error:
            problems.append(f"{model}: {error}")
    if listed is not None and not problems:
        lost = listed.keys() - tensors.keys()
        moved = {n for n in listed.keys() & tensors.keys() if tensors[n].file.name != listed[n]}
        if lost or moved:
            problems.append(
                f"{model}: the index names {some(lost | moved)}, which the shards do not hold so; "
                "expected an index and shards of one save, download or save the model again"
            )
    refuse(problems)
    return Checkpoint(model, folder, config, tensors, readers)
