"""Compute a planned model and write it: a tensor at a time, a few ahead of the one being written.

A plan maps each output name to the `Recipe` of its tensor.
"""

import ctypes
import json
import mmap
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from architecture import assemble
from checkpoints import FLOAT_DTYPES, SAFETENSORS_DTYPES, Source, open_checkpoint
from direct import DirectFile
from problems import refuse, some
from staging import staged

AHEAD = 1 << 28  # bytes of computed tensors that may wait to be written; more for many workers
WORKERS = 32  # threads that compute tensors, at most: each takes about 10 MB
DEVICE_WORKERS = 4  # the same with an accelerator, whose memory holds the tensors of all
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Recipe:
    """How an output tensor is made: `combine` of the sources, or a copy of the only one."""

    how: str  # one word for the user: merged, scaled, copied
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    combine: Callable[[list[Tensor], torch.device], Tensor] | None = None

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
        """Return the names in each file, in its order, as huggingface_hub divides them."""
        sizes = {
            name: torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
            for name, recipe in self.plan.items()
        }
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
        shards: dict[str, list[str]] = split.filename_to_tensors
        return {file: _file_order(names, self.plan) for file, names in shards.items()}


def output_dtype(stored: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    return requested if requested and stored in FLOAT_DTYPES else stored


def _make(name: str, recipe: Recipe, device: torch.device) -> Tensor:
    """Read the sources of a recipe and combine them on the device. Returns a CPU tensor."""
    tensors = [source.read() for source in recipe.sources]
    result = _combine(recipe, tensors, device)
    if not _is_finite(result):
        raise ValueError(_blame(name, recipe, tensors))
    return result.to("cpu").contiguous()


def _combine(recipe: Recipe, tensors: list[Tensor], device: torch.device) -> Tensor:
    """Combine CPU tensors on a device: as a whole, or in chunks where its memory is too small."""
    if recipe.combine is None:
        return tensors[0].to(recipe.dtype)
    try:
        return recipe.combine([tensor.to(device) for tensor in tensors], device)
    except torch.OutOfMemoryError:  # which only accelerators raise
        pass  # and free what was tried, before trying again
    with ONE_AT_A_TIME:
        return recipe.combine(tensors, device)


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
    card: bytes | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> int:
    """Write a planned model, other files and a model card. Returns the number of shards.

    The output appears under its name when all is written and has been read back. Raises OSError
    where it cannot be written, ValueError for values that are not finite.
    """
    shards = planned.shards(max_shard_size)
    count = min(threads, WORKERS if device.type == "cpu" else DEVICE_WORKERS)
    with staged(output, overwrite=overwrite) as folder:
        planned.model.save_pretrained(folder, state_dict={})  # the config and what belongs to it
        with (
            workers(count, threads) as pool,
            tqdm(total=planned.nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar,
        ):
            names = [name for shard in shards.values() for name in shard]
            tensors = computed(planned.plan, names, device, pool, count)
            for file, shard in shards.items():
                _write_shard(folder / file, shard, planned, tensors, bar)
        if len(shards) > 1:
            _write_index(folder / "model.safetensors.index.json", shards, planned)
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        if card is not None:
            (folder / "README.md").write_bytes(card)
        _verify(folder, planned)
    return len(shards)


@contextmanager
def workers(count: int, threads: int) -> Iterator[ThreadPoolExecutor]:
    """Give so many threads; torch divides the work of each, so that all use `threads`."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def computed(
    plan: Plan,
    names: Iterable[str],
    device: torch.device,
    pool: ThreadPoolExecutor,
    workers: int = 1,
) -> Iterator[Tensor]:
    """Yield the tensors of a plan in the order of the names, computed ahead by a pool.

    No more than `AHEAD` bytes of results (an eighth of that for each worker, if that is more), or
    one tensor, wait to be taken; the sources of those under way are read from the disk meanwhile.
    """
    limit = max(AHEAD, AHEAD // 8 * workers)
    waiting = deque(names)
    pending: deque[tuple[str, Future[Tensor]]] = deque()
    held = 0
    while waiting or pending:
        while waiting and (not pending or held + plan[waiting[0]].nbytes <= limit):
            name = waiting.popleft()
            held += plan[name].nbytes
            for source in plan[name].sources:
                _read_ahead(source.checkpoint.stored(source.name))
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
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        recipe = planned.plan[name]
        begin, end = end, end + recipe.nbytes
        header[name] = {
            "dtype": codes[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with closing(DirectFile(file)) as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            bar.set_postfix_str(name, refresh=False)
            tensor = next(tensors)
            if (tensor.shape, tensor.dtype) != (planned.plan[name].shape, planned.plan[name].dtype):
                raise AssertionError(f"{name}: computed {tensor.dtype} {tuple(tensor.shape)}")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy())
            bar.update(tensor.nbytes)


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
