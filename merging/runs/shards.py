"""Write planned tensors as safetensors files: shards, and their index.

They are written here, as safetensors' save_file wants all tensors of a file in memory first: so a
file takes no more memory than a tensor, and is written while the next are computed. The bytes are
those of save_file.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm

from merging.arithmetic.memory import release
from merging.models.weight_files import SAFETENSORS_DTYPES
from merging.plans.plan import PlannedTensor, nbytes_of
from merging.runs.computing import Observer, compute, computed
from merging.runs.direct import DirectFile

Shards = Mapping[str, Sequence[str]]  # the names of the tensors in each file, in its order


def shards_of(plan: Mapping[str, PlannedTensor], max_shard_size: str) -> Shards:
    """Divide a plan's tensors into files, as huggingface_hub does, in the order of safetensors.

    In a file, wide dtypes come first, and then it goes by name.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES.values())}
    sizes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in plan.items()
    }
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    return {
        file: sorted(names, key=lambda name: (ranks[plan[name].dtype], name))
        for file, names in split.filename_to_tensors.items()
    }


def write_shards(
    folder: Path,
    shards: Shards,
    plan: Mapping[str, PlannedTensor],
    device: torch.device,
    threads: int,
    observe: Observer | None = None,
    show_progress: bool = False,
) -> None:
    """Compute planned tensors and write them, with an index if there are several files."""
    names = [name for shard in shards.values() for name in shard]
    places: dict[str, int] = {}
    for shard in shards.values():
        places |= places_in(shard, plan)
    task = partial(compute, device=device, observe=observe, places=places)
    nbytes = nbytes_of(plan)
    with (
        computed(plan, names, task, device, threads) as tensors,
        tqdm(total=nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar,
    ):
        for file, shard in shards.items():
            write_shard(folder / file, shard, plan, tensors, bar)
    if len(shards) > 1:
        _write_index(folder / "model.safetensors.index.json", shards, plan)


def write_shard(
    file: Path,
    names: Sequence[str],
    plan: Mapping[str, PlannedTensor],
    tensors: Iterator[Tensor],
    bar: Any,
) -> None:
    """Write a safetensors file: the size of the header, the header, the tensors' bytes."""
    with closing(DirectFile(file)) as stream:
        stream.write(_header(names, plan))
        for name in names:
            bar.set_postfix_str(name, refresh=False)
            tensor, planned = next(tensors), plan[name]
            if (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
                raise AssertionError(f"{name}: computed {tensor.dtype} {tuple(tensor.shape)}")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy())
            bar.update(tensor.nbytes)
            if planned.method is not None:  # else it may be a mapped file
                release(tensor)
            del tensor  # a mapped file is let go before the next is asked for


def places_in(names: Sequence[str], plan: Mapping[str, PlannedTensor]) -> dict[str, int]:
    """Return at which byte of a file each tensor begins."""
    first = len(_header(names, plan))
    return {name: first + begin for name, (begin, _) in _offsets(names, plan).items()}


def _offsets(names: Sequence[str], plan: Mapping[str, PlannedTensor]) -> dict[str, tuple[int, int]]:
    """Return where each tensor begins and ends in a file, after the header."""
    ends = accumulate((plan[name].nbytes for name in names), initial=0)
    return dict(zip(names, pairwise(ends), strict=True))


def _header(names: Sequence[str], plan: Mapping[str, PlannedTensor]) -> bytes:
    """Return what a safetensors file says of its tensors, which follow, after the size of that."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, offsets in _offsets(names, plan).items():
        header[name] = {
            "dtype": codes[plan[name].dtype],
            "shape": list(plan[name].shape),
            "data_offsets": offsets,
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_index(file: Path, shards: Shards, plan: Mapping[str, PlannedTensor]) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in plan.values()),
            "total_size": nbytes_of(plan),
        },
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
