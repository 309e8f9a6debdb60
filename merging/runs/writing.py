"""Write a planned model: its files in one staged folder, read back before they get their name.

save_pretrained writes the config and what belongs to it; shards.py the tensors.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from merging.models.structure import assemble
from merging.models.weight_files import read_folder
from merging.plans.plan import Plan
from merging.problems import reading, some
from merging.runs.computing import available_processors
from merging.runs.head_start import HeadStart
from merging.runs.reporting import Reporting
from merging.runs.shards import Shards, write_shards
from merging.runs.thresholds import with_thresholds


def save(
    plan: Plan,
    shards: Shards,
    files: Mapping[str, Path | bytes],
    arguments: argparse.Namespace,
    device: torch.device,
    card: str,
    reporting: Reporting,
    start: HeadStart,
    show_progress: bool = False,
) -> None:
    """Compute a planned model and save it, with copies of other files, whole or not at all.

    Tensors that have a head start are taken from it. Reports are written besides. The folder is
    read back before it gets its name. Raises Problems if a value is not finite.
    """
    threads = arguments.threads or available_processors()
    plan = with_thresholds(plan, device, threads, show_progress)
    with start.staged as folder:
        with reading(plan.donor, "its config or generation config cannot be saved"):
            plan.model.save_pretrained(folder, state_dict={})
        if not start.has_written(plan.tensors, shards, show_progress):
            observe = reporting.observe
            write_shards(folder, shards, plan.tensors, device, threads, observe, show_progress)
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
