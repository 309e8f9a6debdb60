"""Write a planned model: its files in one staged folder, read back before they get their name.

save_pretrained writes the config and what belongs to it. The shards are written here, as
safetensors' save_file wants all tensors of a file in memory first: so a file takes no more memory
than a tensor, and is written while the next are computed. The bytes are those of save_file.
"""

import argparse
import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm

from merging.arithmetic.memory import release
from merging.models.structure import assemble
from merging.models.weight_files import SAFETENSORS_DTYPES, read_folder
from merging.plans.plan import Plan
from merging.problems import reading, refuse, some
from merging.runs.computing import available_processors, compute, computed
from merging.runs.console import say
from merging.runs.direct import DirectFile
from merging.runs.outputs import overwrite_problems
from merging.runs.reporting import Reporting
from merging.runs.staging import staged
from merging.runs.thresholds import with_thresholds

Shards = Mapping[str, Sequence[str]]  # the names of the tensors in each file, in its order


def shards_of(plan: Plan, max_shard_size: str) -> Shards:
    """Divide a plan's tensors into files, as huggingface_hub does, in the order of safetensors.

    In a file, wide dtypes come first, and then it goes by name.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES.values())}
    sizes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in plan.tensors.items()
    }
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    return {
        file: sorted(names, key=lambda name: (ranks[plan.tensors[name].dtype], name))
        for file, names in split.filename_to_tensors.items()
    }


def save(
    plan: Plan,
    shards: Shards,
    files: Mapping[str, Path | bytes],
    output: Path,
    arguments: argparse.Namespace,
    device: torch.device,
    card: str,
    reporting: Reporting,
    show_progress: bool = False,
) -> None:
    """Compute a planned model and save it, with copies of other files, whole or not at all.

    Reports are written besides. The folder is read back before it gets its name. Raises Problems if
    a value is not finite.
    """
    names = [name for shard in shards.values() for name in shard]
    threads = arguments.threads or available_processors()
    plan = with_thresholds(plan, device, threads, show_progress)
    check = lambda: refuse(overwrite_problems(output))  # noqa: E731 - what appeared meanwhile
    with staged(output, overwrite=arguments.overwrite, tell=say, check=check) as folder:
        with reading(plan.donor, "its config or generation config cannot be saved"):
            plan.model.save_pretrained(folder, state_dict={})
        task = partial(compute, device=device, observe=reporting.observe)
        with (
            computed(plan, names, task, device, threads) as tensors,
            tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar,
        ):
            for file, shard in shards.items():
                write_shard(folder / file, shard, plan, tensors, bar)
        if len(shards) > 1:
            _write_index(folder / "model.safetensors.index.json", shards, plan)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        if arguments.model_card:
            (folder / "README.md").write_bytes(card.encode("utf-8", "backslashreplace"))
        reporting.write(folder if arguments.model_card else None)
        verify(folder, plan)
        plan.check_sources()


def write_shard(
    file: Path, names: Sequence[str], plan: Plan, tensors: Iterator[Tensor], bar: Any
) -> None:
    """Write a safetensors file: the size of the header, the header, the tensors' bytes."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        planned = plan.tensors[name]
        begin, end = end, end + planned.nbytes
        header[name] = {
            "dtype": codes[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with closing(DirectFile(file)) as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            bar.set_postfix_str(name, refresh=False)
            tensor, planned = next(tensors), plan.tensors[name]
            if (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
                raise AssertionError(f"{name}: computed {tensor.dtype} {tuple(tensor.shape)}")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy())
            bar.update(tensor.nbytes)
            if planned.method is not None:  # else it may be a mapped file
                release(tensor)
            del tensor  # a mapped file is let go before the next is asked for


def _write_index(file: Path, shards: Shards, plan: Plan) -> None:
    index = {
        "metadata": {"total_parameters": plan.parameters, "total_size": plan.nbytes},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify(folder: Path, plan: Plan) -> None:
    """Read back what was written. That it differs from the plan, which was tried, is a defect."""
    config = type(plan.model.config).from_pretrained(folder)
    written = read_folder("output", folder)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in plan.tensors.items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()}
    if found != expected:
        wrong = {n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)}
        raise AssertionError(f"the output differs from the plan in {some(wrong)}")
    _, problems = assemble("output", type(plan.model), config, written)
    if problems:
        raise AssertionError("; ".join(problems))
