"""Open a checkpoint; save one, lazily and atomically.

A checkpoint is a directory (or a Hub repository, downloaded first) with a config and the named
tensors of its weight files. A plan maps each output name to the `Recipe` of its tensor; `save`
computes them one by one as transformers' `save_pretrained` writes them, shard by shard.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from problems import refuse, some

# Weight files in the order in which transformers prefers them, each with its index of shards.
WEIGHT_FILES = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
WEIGHT_SUFFIXES = "safetensors bin pt pth ckpt gguf ggml onnx onnx_data h5 msgpack ot npz tflite"
WEIGHT_PATTERNS = [f"*.{suffix}" for suffix in WEIGHT_SUFFIXES.split()]
# Not the model's: original-format duplicates, training leftovers, and the donor's own model card.
UNCOPIED_FOLDERS = re.compile(
    r"^(\.|checkpoint-|global_step|runs$|original$|onnx$|openvino$|coreml$)"
)
UNCOPIED_FILES = re.compile(
    r"^\.|^config\.json$|\.index\.json$|^README\.md$|^trainer_state\.json$|^adapter_config\.json$"
)
TOKENIZER_FILES = re.compile(
    r"tokenizer|^vocab\.|^merges\.txt$|^special_tokens_map\.json$|^added_tokens\.json$|\.model$"
    r"|\.tiktoken$|chat_template"
)
# Buffers that old checkpoints stored and models now compute; matched against the end of a name.
COMPUTED_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|(attn|attention)\.(masked_)?bias"
    r"|embeddings\.position_ids)$"
)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
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

    def read(self, name: str, *, fresh: bool = False) -> Tensor:
        """Return a stored tensor, memory-mapped; with `fresh`, mapped anew at another address."""
        _, _, file, key = self.tensors[name]
        reader = _open_weights(file) if fresh else self.readers[file]
        tensor: Tensor = reader[key] if isinstance(reader, dict) else reader.get_tensor(key)
        return tensor


class Source(NamedTuple):
    """A tensor of a checkpoint, as one of the ingredients of an output tensor."""

    checkpoint: Checkpoint
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.tensors[self.name]


@dataclass(frozen=True)
class Recipe:
    """How an output tensor is made: `combine` of the sources, or a copy of the only one."""

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
    """A planned model: its tensors, config and class, and the stored tensors that are left out."""

    plan: Plan
    config: PretrainedConfig
    cls: type[PreTrainedModel]
    ignored: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(recipe.shape).numel() for recipe in self.plan.values())


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def _download(model: str, cache_dir: str | None) -> Path:
    """Fetch a Hub repository's config, tokenizer, code and one format of its weights."""
    repo, _, revision = model.partition("@")
    skipped = [*WEIGHT_PATTERNS, "*/*.safetensors*", "original/*", "onnx/*", "openvino/*"]
    folder = Path(
        snapshot_download(
            repo, revision=revision or None, cache_dir=cache_dir, ignore_patterns=skipped
        )
    )
    commit = folder.name
    for single, index in WEIGHT_FILES.items():
        try:
            hf_hub_download(repo, single, revision=commit, cache_dir=cache_dir)
            return folder
        except (EntryNotFoundError, LocalEntryNotFoundError):
            pass
        if (folder / index).exists():
            shards = sorted(set(_weight_map(folder / index).values()))
            snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=shards)
            return folder
    return folder


def find(model: str, cache_dir: str | None = None) -> Path:
    """Return the directory of a model: a local one, or the snapshot of a Hub id, downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{model}: expected a directory with a model, found a file")
    if _looks_like_path(model):
        raise FileNotFoundError(f"{model}: no such directory")
    try:
        return _download(model, cache_dir)
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are of these kinds
        cause = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{model}: no such local directory, and the Hub gave no model of that name: {cause}"
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a JSON index with a weight_map: {error!r}") from error


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would load from a folder."""
    for single, index in WEIGHT_FILES.items():
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / file for file in sorted(set(_weight_map(folder / index).values()))]
    raise FileNotFoundError(
        f"{folder}: no weights; expected {' or '.join(WEIGHT_FILES)}, or an index of shards"
    )


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
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: expected a dictionary of tensors")
    return tensors


def _headers(file: Path, reader: Any) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the name and header of each tensor in an open weight file."""
    if isinstance(reader, dict):
        for name, tensor in reader.items():
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


def _read_config(model: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{model}: a LoRA adapter, not a whole model; merge it into its base")
        raise FileNotFoundError(f"{model}: no config.json in {folder}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"{model}: transformers cannot read its config.json: {error}") from error
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise ValueError(
            f"{model}: quantised ({method or quantisation}); merge the unquantised model instead"
        )
    return config


def open_checkpoint(
    model: str, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a local directory or a Hub id (`org/name`, `org/name@revision`); reads headers only.

    Raises FileNotFoundError or ValueError for what is missing, damaged, quantised or an adapter.
    """
    folder = find(model, cache_dir)
    config = _read_config(model, folder, trust_remote_code)
    readers: dict[Path, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        if not file.is_file():
            raise FileNotFoundError(f"{model}: {file.name} is named in the index, but missing")
        readers[file] = _open_weights(file)
        for name, info in _headers(file, readers[file]):
            if name in tensors:
                raise ValueError(f"{model}: {name} is in {file.name} and {tensors[name].file.name}")
            tensors[name] = info
    return Checkpoint(model, folder, config, tensors, readers)


def model_class(config: PretrainedConfig, folder: Path, trust: bool) -> type[PreTrainedModel]:
    """Return the class that a config names, from transformers or the model's own remote code."""
    architectures = getattr(config, "architectures", None)
    if not architectures:
        names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        architectures = [names.get(config.model_type, "")]
    for reference in (getattr(config, "auto_map", None) or {}).values():
        if trust and isinstance(reference, str) and reference.endswith(f".{architectures[0]}"):
            remote_class: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder)
            return remote_class
    found = getattr(transformers, architectures[0] or "-", None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} has no class {architectures[0]!r}, "
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
    except RuntimeError as error:  # e.g. experts of one layer that cannot be stacked
        return cls(config), [f"{cls.__name__} cannot be built from the tensors: {error}"]
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


def aligned(checkpoint: Checkpoint, donor: Checkpoint, prefix: str) -> Checkpoint:
    """Return a checkpoint whose tensors go by the donor's names.

    Some checkpoints were saved without the prefix of the model inside (`wte.weight`), others of the
    same architecture with it (`transformer.wte.weight`).
    """

    def rename(name: str) -> str:
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((c for c in candidates if c in donor.tensors), name)

    renamed = {rename(name): info for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=renamed)


def possible_ties(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map each tensor that a checkpoint of this class may leave out, to the one it is tied to.

    The head to the embedding, above all, whatever the config says. In stored names, where there are
    any; a tensor that is not stored goes by its name in the model.
    """
    ties: dict[str, str] = dict(model.all_tied_weights_keys)
    places = {module: name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight.shape == embedding.weight.shape:
        ties.setdefault(f"{places[head]}.weight", f"{places[embedding]}.weight")
    stored_names = {module: name for name, module in module_names(model, stored).items()}
    return {stored_names.get(t, t): stored_names.get(s, s) for t, s in ties.items()}


def says_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def is_tied(checkpoint: Checkpoint, target: str, source: str) -> bool:
    """Whether a checkpoint has one tensor for both: not stored twice, or stored twice and equal."""
    if not says_tied(checkpoint.config) or source not in checkpoint.tensors:
        return False
    if target not in checkpoint.tensors:
        return True
    return torch.equal(checkpoint.read(target), checkpoint.read(source))


def changed_config(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Return a copy of a config in which attributes of its text part are changed."""
    copy = type(config).from_dict(config.to_dict())
    part = copy.get_text_config()
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


class LazyStateDict(dict[str, Tensor]):
    """A state dict for `save_pretrained` whose values are computed when they are taken out.

    Until then a value is a meta tensor: it tells shape and dtype, and costs nothing.
    """

    def __init__(self, plan: Plan, compute: Callable[[str], Tensor]) -> None:
        super().__init__(
            (name, torch.empty(recipe.shape, dtype=recipe.dtype, device="meta"))
            for name, recipe in plan.items()
        )
        self._compute = compute

    def pop(self, name: str) -> Tensor:  # type: ignore[override]
        super().pop(name)
        return self._compute(name)


def _make(name: str, recipe: Recipe, device: torch.device, *, fresh: bool) -> Tensor:
    """Read the sources of a recipe and combine them on the device. Returns a CPU tensor."""
    tensors = [s.checkpoint.read(s.name, fresh=fresh).to(device) for s in recipe.sources]
    result = recipe.combine(tensors) if recipe.combine else tensors[0].to(recipe.dtype)
    if not _is_finite(result):
        raise ValueError(_blame(name, recipe, tensors))
    return result.to("cpu")


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


def donor_files(donor: Checkpoint, tokenizer_from: Checkpoint | None) -> dict[str, Path]:
    """List the non-weight files of a donor, with the tokenizer's files from another, or none."""
    files = {n: p for n, p in _other_files(donor.path) if not TOKENIZER_FILES.search(n)}
    if tokenizer_from:
        files |= {n: p for n, p in _other_files(tokenizer_from.path) if TOKENIZER_FILES.search(n)}
    return files


def _other_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (
            path.is_file()
            and not any(UNCOPIED_FOLDERS.search(part) for part in name.parts[:-1])
            and not UNCOPIED_FILES.search(name.name)
            and not any(name.match(pattern) for pattern in WEIGHT_PATTERNS)
        ):
            yield name.as_posix(), path


def check_output(output: Path, inputs: Sequence[Checkpoint], overwrite: bool) -> list[str]:
    """Return what speaks against writing a model to this directory."""
    target = output.resolve()
    problems = []
    for checkpoint in inputs:
        source = checkpoint.path.resolve()
        if target == source or target in source.parents or source in target.parents:
            problems.append(f"{output}: the output is, contains or lies in the input {source}")
    if output.exists() and not output.is_dir():
        problems.append(f"{output}: the output is a file; name a directory")
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            problems.append(f"{output}: not empty; choose another directory, or use --overwrite")
        elif not (output / "config.json").is_file():
            problems.append(f"{output}: not a model, so --overwrite does not replace it")
    return problems


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a hidden sibling directory to write in, and the output's name once all went well."""
    output = output.absolute()
    created = next((p for p in reversed(output.parents) if not p.exists()), None)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.{os.getpid()}.partial"
    replaced = output.parent / f".{output.name}.{os.getpid()}.replaced"
    try:
        staging.mkdir()
        yield staging
        if output.exists():
            output.rename(replaced)
        staging.rename(output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        shutil.rmtree(staging, ignore_errors=True)
        if created is not None:
            shutil.rmtree(created, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def save(
    planned: Planned,
    files: Mapping[str, Path],
    output: Path,
    *,
    device: torch.device,
    max_shard_size: str = "5GB",
    show_progress: bool = False,
) -> int:
    """Compute and write a planned model and copy other files. Returns the number of shards.

    Tensors are computed when `save_pretrained` takes them, so memory holds one shard. The output
    appears under its name when all is written and has been read back.
    """
    plan = planned.plan
    model, problems = assemble(planned.cls, planned.config, plan)
    refuse(problems)
    used: set[Source] = set()

    with (
        staged(output) as folder,
        tqdm(
            total=sum(recipe.nbytes for recipe in plan.values()),
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        ) as bar,
    ):

        def compute(name: str) -> Tensor:
            recipe = plan[name]
            bar.set_postfix_str(name, refresh=False)
            # A mapped tensor that is written twice must not look like one shared by two names.
            fresh = recipe.sources[0] in used
            used.add(recipe.sources[0])
            result = _make(name, recipe, device, fresh=fresh)
            bar.update(recipe.nbytes)
            return result

        state = LazyStateDict(plan, compute)
        # How save_pretrained tells meta tensors apart, to find tied ones: here, none is shared.
        model.get_parameter_or_buffer = dict(state).__getitem__
        model._keys_to_ignore_on_save = None
        model.save_pretrained(
            folder, state_dict=state, max_shard_size=max_shard_size, save_original_format=False
        )
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        for path in folder.rglob("*"):
            path.chmod(0o777 & ~_umask() if path.is_dir() else 0o666 & ~_umask())
        return _verify(folder, planned)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _verify(folder: Path, planned: Planned) -> int:
    """Read back what was written; ValueError if it differs from the plan. Returns shards."""
    plan = planned.plan
    written = open_checkpoint(str(folder))
    expected = {name: (recipe.shape, recipe.dtype) for name, recipe in plan.items()}
    found = {name: (info.shape, info.dtype) for name, info in written.tensors.items()}
    if found != expected:
        wrong = {n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)}
        raise ValueError(f"the output differs from the plan in {some(wrong)}")
    refuse(assemble(planned.cls, written.config, written.tensors)[1])
    return len(written.readers)
