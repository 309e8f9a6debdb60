"""Open weight files without reading their tensors: these are mapped into memory when used."""

import json
import math
import struct
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from merging.models.folders import weight_files
from merging.models.records import check_records
from merging.models.tensors import LazyTensor, WatchedFile
from merging.problems import Problems, collecting, first_line, reading, refuse, some
from merging.recipes.user_files import check_readable

SAFETENSORS_DTYPES = {  # in the order in which a file has them
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_folder(model: str, folder: Path) -> dict[str, LazyTensor]:
    """Return all tensors of a model's folder by name; reads the headers of its files only.

    Problems tell all that is wrong: files missing, truncated, corrupt or not as the index says,
    and tensors that are stored twice or in a dtype that cannot be merged.
    """
    tensors: dict[str, LazyTensor] = {}
    file_of: dict[str, str] = {}
    problems: list[str] = []
    files, listed = weight_files(folder)
    for file in files:
        with collecting(problems):
            for name, tensor in read_file(model, file).items():
                if name in tensors:
                    problems.append(f"{name} is stored twice, in {file_of[name]} and {file.name}")
                tensors[name], file_of[name] = tensor, file.name
    if listed is not None and not problems:
        lost = listed.keys() - tensors.keys()
        moved = {n for n in listed.keys() & tensors.keys() if file_of[n] != listed[n]}
        if lost or moved:
            problems.append(
                f"the index names {some(lost | moved)}, which the shards do not hold so; "
                "expected an index and shards of one save, download or save the model again"
            )
    refuse(f"{model}: {problem}" for problem in problems)
    return tensors


def read_file(model: str, file: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a weight file, by name."""
    if file.suffix == ".safetensors":
        return _read_safetensors(model, file)
    return _read_pickle(model, file)


def _read_safetensors(model: str, file: Path) -> dict[str, LazyTensor]:
    """Let safetensors say whether a file is whole, and map its tensors one by one."""
    with reading(file, "not a whole safetensors file"):
        check_readable(file)
        watched = WatchedFile(file)
        with safe_open(file, framework="pt") as opened:
            names = [*opened.keys()]
        (size,) = struct.unpack("<Q", watched.read(8))
        header = json.loads(watched.read(size).decode())
        kinds = [(header[name]["dtype"], tuple(header[name]["shape"])) for name in names]
        starts = [8 + size + header[name]["data_offsets"][0] for name in names]
    tensors = {}
    for name, (code, shape), start in zip(names, kinds, starts, strict=True):
        dtype = SAFETENSORS_DTYPES.get(code)
        if dtype is None:
            raise Problems(
                f"{file}: {name} is stored as {code}, which cannot be merged; "
                "dequantise the model first"
            )
        read = partial(_mapped, watched, start, shape, dtype)
        label = f"{model}: {name}"
        tensors[name] = LazyTensor(label, shape, dtype, read, file=watched, start=start)
    return tensors


def _mapped(file: WatchedFile, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return file.mapped(start, math.prod(shape), dtype).view(shape)


def _read_pickle(model: str, file: Path) -> dict[str, LazyTensor]:
    with reading(file, "cannot be read"):
        check_readable(file)
        watched = WatchedFile(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, about a user's file
        raise Problems(
            f"{file}: cannot be read as plain tensors: {first_line(error)} "
            "Convert it to safetensors, with transformers' save_pretrained, if you trust it."
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        for name, tensor in found.items()
    ):
        raise Problems(f"{file}: expected a dictionary of named, dense tensors")
    with reading(file, "cannot be read"):
        check_records(file)
    tensors = {}
    for name, tensor in found.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise Problems(f"{file}: {name} is {tensor.dtype}, which cannot be merged")
        shape, read = tuple(tensor.shape), partial(Tensor.detach, tensor)
        tensors[name] = LazyTensor(f"{model}: {name}", shape, tensor.dtype, read, file=watched)
    return tensors
