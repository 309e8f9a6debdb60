"""Open a checkpoint; save a planned one, lazily.

A checkpoint is a directory (or a Hub repository, downloaded first) with a config and the named
tensors of its weight files. A plan maps each output name to the `Recipe` of its tensor; `save`
computes them in order, a few ahead of the one that is being written.
"""

import ctypes
import json
import mmap
import re
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from files import read_json, weight_files
from problems import collecting, refuse, some
from staging import staged
from vocabularies import Vocabulary, match, read_tokens, report

# Buffers that old checkpoints stored and models now compute; matched against the end of a name.
COMPUTED_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|(attn|attention)\.(masked_)?bias"
    r"|embeddings\.position_ids)$"
)
# Config values that change what a model computes with the same tensors.
MEANINGS = (
    "model_type rope_parameters rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps hidden_act "
    "hidden_activation activation_function num_attention_heads num_key_value_heads head_dim "
    "sliding_window layer_types no_rope_layers partial_rotary_factor query_pre_attn_scalar "
    "attn_logit_softcapping final_logit_softcapping logit_scale embedding_multiplier "
    "residual_multiplier attention_multiplier logits_scaling num_experts_per_tok "
    "use_parallel_residual"
).split()
AHEAD = 1 << 28  # bytes of computed tensors that may wait to be written
WORKERS = 4  # threads that compute tensors
WRITE_AT_ONCE = 1 << 26  # bytes
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS_DTYPES = {  # in the order in which a file has them
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
    readers: dict[Path, Any] = field(repr=False)  # file -> open safetensors file, or .bin's tensors

    def read(self, name: str) -> Tensor:
        """Return a stored tensor, memory-mapped."""
        _, _, file, key = self.tensors[name]
        reader = self.readers[file]
        tensor: Tensor = reader[key] if isinstance(reader, dict) else reader.get_tensor(key)
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


@dataclass(frozen=True)
class Recipe:
    """How an output tensor is made: `combine` of the sources, or a copy of the only one."""

    how: str  # one word for the user: merged, scaled, copied
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    combine: Callable[[list[Tensor]], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Plan = dict[str, Recipe]


@dataclass(frozen=True)
class Planned:
    """A planned model: its tensors, its class and config, and the stored tensors left out."""

    donor: str
    plan: Plan
    model: PreTrainedModel  # of the output's class and config, without values
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what the user should know of it

    @property
    def parameters(self) -> int:
        return sum(torch.Size(recipe.shape).numel() for recipe in self.plan.values())

    @property
    def nbytes(self) -> int:
        return sum(recipe.nbytes for recipe in self.plan.values())

    def shards(self, max_shard_size: str) -> dict[str, list[str]]:
        """Return the names of the tensors in each file, as huggingface_hub divides them."""
        sizes = {
            name: torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
            for name, recipe in self.plan.items()
        }
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
        shards: dict[str, list[str]] = split.filename_to_tensors
        return shards


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
    readers: dict[Path, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    problems = []
    files, listed = weight_files(folder)
    for file in files:
        try:
            readers[file] = _open_weights(file)
            for name, info in _headers(file, readers[file]):
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
    tensors: Mapping[str, TensorInfo | Recipe],
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


def main_dtype(tensors: Mapping[str, TensorInfo | Recipe]) -> torch.dtype:
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
    ties: dict[str, str] = dict(model.all_tied_weights_keys)
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


def vocabulary_dims(
    cls: type[PreTrainedModel], config: PretrainedConfig, stored: Iterable[str]
) -> dict[str, int]:
    """Map the stored tensors that have one entry a token to the dimension that counts them.

    A tensor is one if it grows with the config's vocabulary, whatever it is called and whatever
    other dimensions happen to be as large.
    """
    size = text_config(config).vocab_size
    larger = changed_config(config, vocab_size=size + 64)
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
                tokens = read_tokens(checkpoint.path)
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
        if model.tensors[name].shape[dims[name]] != vocabularies[model].rows:
            return None  # a difference of shapes, reported as such
        chosen = torch.tensor(found)
        return Rows(dims[name], chosen.clamp_min(0), (chosen < 0).nonzero().flatten(), given)

    return rows, notes


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the language model."""
    try:
        return config.get_text_config()
    except ValueError:  # several parts qualify
        return config


def says_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(text_config(config), "tie_word_embeddings", False))


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


def output_dtype(stored: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    return requested if requested and stored in FLOAT_DTYPES else stored


# ---------------------------------------------------------------------------- saving


def _make(name: str, recipe: Recipe, device: torch.device) -> Tensor:
    """Read the sources of a recipe and combine them on the device. Returns a CPU tensor."""
    tensors = [source.read().to(device) for source in recipe.sources]
    result = recipe.combine(tensors) if recipe.combine else tensors[0].to(recipe.dtype)
    if not _is_finite(result):
        raise ValueError(_blame(name, recipe, tensors))
    return result.to("cpu").contiguous()


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _blame(name: str, recipe: Recipe, tensors: Sequence[Tensor]) -> str:
    """Say which source brought a NaN or infinity, or that the output dtype is too small."""
    for source, tensor in zip(recipe.sources, tensors, strict=True):
        if not _is_finite(tensor):
            return f"{source.checkpoint.name}: {source.name} contains NaN or infinity"
    dtype = str(recipe.dtype).removeprefix("torch.")
    return f"{name}: the result overflows {dtype}; try another --dtype, or smaller weights"


def save(
    planned: Planned,
    files: Mapping[str, Path],
    output: Path,
    *,
    device: torch.device,
    threads: int,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    show_progress: bool = False,
) -> int:
    """Compute and write a planned model and copy other files. Returns the number of shards.

    The output appears under its name when all is written and has been read back. Raises OSError
    where it cannot be written, ValueError for values that are not finite.
    """
    shards = planned.shards(max_shard_size)
    with staged(output, overwrite=overwrite) as folder:
        planned.model.save_pretrained(folder, state_dict={})  # the config and what belongs to it
        with (
            workers(threads) as pool,
            tqdm(total=planned.nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar,
        ):
            names = [name for shard in shards.values() for name in _file_order(shard, planned.plan)]
            tensors = computed(planned.plan, names, device, pool)
            for file, shard in shards.items():
                _write_shard(folder / file, _file_order(shard, planned.plan), planned, tensors, bar)
        if len(shards) > 1:
            _write_index(folder / "model.safetensors.index.json", shards, planned)
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        _verify(folder, planned)
    return len(shards)


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Give a few threads, each of which may use its share of the processors inside torch."""
    count = min(threads, WORKERS)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def computed(
    plan: Plan, names: Iterable[str], device: torch.device, pool: ThreadPoolExecutor
) -> Iterator[Tensor]:
    """Yield the tensors of a plan in the order of the names, computed ahead by a pool.

    No more than `AHEAD` bytes of results, or one tensor, wait to be taken; the sources of those
    under way are being read from the disk meanwhile.
    """
    waiting = deque(names)
    pending: deque[tuple[str, Future[Tensor]]] = deque()
    held = 0
    while waiting or pending:
        while waiting and (not pending or held + plan[waiting[0]].nbytes <= AHEAD):
            name = waiting.popleft()
            held += plan[name].nbytes
            for source in plan[name].sources:
                _read_ahead(source.checkpoint.read(source.name))
            pending.append((name, pool.submit(_make, name, plan[name], device)))
        name, future = pending.popleft()
        yield future.result()
        held -= plan[name].nbytes


def _read_ahead(tensor: Tensor) -> None:
    """Ask the system to start reading a mapped tensor's pages, where it knows how."""
    if hasattr(mmap, "MADV_WILLNEED") and tensor.nbytes > mmap.PAGESIZE:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, mmap.MADV_WILLNEED)


# The files are written here, not by safetensors' save_file, which wants all tensors of a file in
# memory first: so a file takes no more memory than a tensor, and is written while the next are
# computed. The bytes are those that save_file would write.


def _file_order(names: Iterable[str], plan: Plan) -> list[str]:
    """Return names in the order of a safetensors file: by dtype, wide ones first, then by name."""
    ranks = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES.values())}
    return sorted(names, key=lambda name: (ranks[plan[name].dtype], name))


def _write_shard(
    file: Path, names: Sequence[str], planned: Planned, tensors: Iterator[Tensor], bar: Any
) -> None:
    """Write a safetensors file: the size of the header, the header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        recipe = planned.plan[name]
        begin, end = end, end + recipe.nbytes
        code = next(code for code, dtype in SAFETENSORS_DTYPES.items() if dtype == recipe.dtype)
        header[name] = {
            "dtype": code,
            "shape": list(recipe.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb", buffering=0) as stream:
        _write(stream, struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            bar.set_postfix_str(name, refresh=False)
            tensor = next(tensors)
            if (tensor.shape, tensor.dtype) != (planned.plan[name].shape, planned.plan[name].dtype):
                raise AssertionError(f"{name}: computed {tensor.dtype} {tuple(tensor.shape)}")
            _write(stream, tensor.reshape(-1).view(torch.uint8).numpy())
            bar.update(tensor.nbytes)


def _write(stream: FileIO, content: Any) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest[:WRITE_AT_ONCE]) :]


def _write_index(file: Path, shards: Mapping[str, Sequence[str]], planned: Planned) -> None:
    index = {
        "metadata": {"total_parameters": planned.parameters, "total_size": planned.nbytes},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verify(folder: Path, planned: Planned) -> None:
    """Read back what was written; ValueError if it differs from the plan."""
    plan = planned.plan
    written = open_checkpoint("output", folder, type(planned.model.config).from_pretrained(folder))
    expected = {name: (recipe.shape, recipe.dtype) for name, recipe in plan.items()}
    found = {name: (info.shape, info.dtype) for name, info in written.tensors.items()}
    if found != expected:
        wrong = {n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)}
        raise ValueError(f"the output differs from the plan in {some(wrong)}")
    refuse(assemble(type(planned.model), written.config, written.tensors)[1])
