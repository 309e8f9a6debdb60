"""Compute a merge while the libraries load that planning it takes.

To load transformers takes over a second, of one processor, and often most of the time of merging
small models. Meanwhile a forked process takes for granted what holds of most merges: that each
tensor is made of those of its name, by the same numbers. It writes shards into the staged folder.
When the plan is there, either it is that very one, of those very files, and the shards are used;
or they are thrown away. No refusal, no byte and no message is to depend on them.
"""

import argparse
import ctypes
import hashlib
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from merging.models.folders import weight_files
from merging.models.opening import Found
from merging.models.weight_files import read_folder
from merging.plans.plan import PlannedTensor, nbytes_of, planned, uses
from merging.problems import Problems
from merging.recipes.recipe import Recipe
from merging.runs.computing import available_processors
from merging.runs.outputs import space_problems
from merging.runs.shards import Shards, shards_of, write_shards
from merging.runs.staging import STOP_SIGNALS, postponed, siblings, uninterrupted

SMALLEST = 500_000_000  # bytes of all inputs for which it is worth a process
DIE_WITH_PARENT = 1  # Linux' PR_SET_PDEATHSIG
DONE = b"done"


class HeadStart:
    """A process that computes what is likely to be asked for, or none.

    `staged` is the context of the folder that the model is to be written in.
    """

    def __init__(self, staged: AbstractContextManager[Path]) -> None:
        self.staged = staged
        self._process = 0
        self._pipe = -1
        self._folder = Path()  # in the staged one, from which save_pretrained removes weights

    def begin(
        self,
        folder: Path,
        recipe: Recipe,
        found: Mapping[str, Found],
        arguments: argparse.Namespace,
    ) -> None:
        """Fork the process, which writes into a folder of its own in this one; if it can be."""
        self._folder = folder / "early"
        parent = os.getpid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or nobody could wait for it
        with suppress(OSError), postponed():  # until it is known which process there is to end
            self._pipe, end = os.pipe()
            try:
                self._process = os.fork()
                if self._process == 0:
                    try:
                        _prepare(parent, end)
                        _compute(self._folder, recipe, found, arguments, end)
                    finally:  # whatever went wrong: it goes wrong again where it can be told
                        os._exit(0)
            finally:
                os.close(end)

    def has_written(
        self, plan: Mapping[str, PlannedTensor], shards: Shards, show_progress: bool
    ) -> bool:
        """Wait for the shards of a plan, and say whether they are in the staged folder.

        If others are computed, or that failed, nothing is there.
        """
        if not self._process:
            return False
        expected = _fingerprint(plan, shards)
        if _is_plain(plan) and self._told(len(expected)) == expected:
            self._wait(plan, shards, show_progress)
            if self._told(len(DONE)) == DONE:
                for file in self._folder.iterdir():
                    file.rename(self._folder.parent / file.name)
                self._folder.rmdir()
                return True
        self.end()
        if self._folder.exists():
            shutil.rmtree(self._folder)
        return False

    def _wait(self, plan: Mapping[str, PlannedTensor], shards: Shards, show_progress: bool) -> None:
        files = [self._folder / file for file in shards]
        nbytes = nbytes_of(plan)
        with tqdm(total=nbytes, unit="B", unit_scale=True, disable=not show_progress) as bar:
            says = select.poll()
            says.register(self._pipe)
            while bar.n < nbytes:
                has_ended = says.poll(100)
                written = sum(file.stat().st_size for file in files if file.exists())
                bar.update(min(written, nbytes) - bar.n)
                if has_ended:
                    break

    def _told(self, size: int) -> bytes:
        """Return what the process says next, or as much of it as it says."""
        said = b""
        while len(said) < size and (more := os.read(self._pipe, size - len(said))):
            said += more
        return said

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process:
            with uninterrupted():
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
                self._process = 0
                os.close(self._pipe)


def is_likely_to_help(
    recipe: Recipe, found: Mapping[str, Found], arguments: argparse.Namespace
) -> bool:
    """Whether a merge is large, of whole models by the same numbers everywhere, and of nothing odd.

    Of a run by itself, on processors of Linux: elsewhere a fork is slow, or not safe. And where
    nothing is left of another run, which would be told of too early.
    """
    schedules = [schedule for _, _, schedule in recipe.schedules()]
    is_plain = not (
        recipe.is_stack
        or recipe.tokenizer is not None
        or recipe.pad_to_multiple_of
        or recipe.values.get("trim_scope") == "model"
        or any(schedule.varies for schedule in schedules)
        or any(pair.adapter is not None for pair in found.values())
        or arguments.report
        or arguments.cuda
        or arguments.dry_run
        or any(map(os.path.lexists, siblings(Path(arguments.output).resolve())))
    )
    has_room = sys.platform == "linux" and (arguments.threads or available_processors()) > 1
    if not (is_plain and has_room):
        return False
    try:
        files = [file for pair in found.values() for file in weight_files(pair.folder)[0]]
        nbytes = sum(file.stat().st_size for file in files)
    except (OSError, Problems):  # told when they are opened, or not downloaded yet
        return False
    return nbytes >= SMALLEST and all(file.suffix == ".safetensors" for file in files)


def _prepare(parent: int, pipe: int) -> None:
    """Make this the parent's process alone: it says nothing, and does not outlive the parent."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    for each in STOP_SIGNALS:  # they are the parent's, which ends this process
        signal.signal(each, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in {0, 1, 2} - {pipe}:  # which has such a number if one of them was closed
        os.dup2(nothing, stream)


def _compute(
    folder: Path,
    recipe: Recipe,
    found: Mapping[str, Found],
    arguments: argparse.Namespace,
    pipe: int,
) -> None:
    """Write what is likely to be asked for, and say first what that is, and last that it is."""
    plan = _likely_plan(recipe, found)
    shards = shards_of(plan, arguments.max_shard_size)
    nbytes = nbytes_of(plan)
    if space_problems(folder, 3 * nbytes):  # leave the disk to those who can tell that it is full
        return
    os.write(pipe, _fingerprint(plan, shards))
    folder.mkdir()
    threads = arguments.threads or available_processors()
    write_shards(folder, shards, plan, torch.device("cpu"), threads)
    for part in uses(plan):
        part.check()
    os.write(pipe, DONE)


def _likely_plan(recipe: Recipe, found: Mapping[str, Found]) -> dict[str, PlannedTensor]:
    """Return the plan of models that have the same tensors; raise if they have not."""
    (part,) = recipe.slices
    stored = {name: read_folder(name, pair.folder) for name, pair in found.items()}
    operands = [source.model for source in recipe.operands(part)]
    plan = {}
    for name, given in stored[recipe.models[0]].items():
        sources = tuple(stored[model][name] for model in operands)
        if any(source.shape != given.shape for source in sources):
            raise ValueError(f"{name}: not of one shape")
        arguments = recipe.arguments(part, name, 0.0)
        plan[name] = planned(recipe, sources, given, arguments)
    return plan


def _is_plain(plan: Mapping[str, PlannedTensor]) -> bool:
    """Whether all tensors are made of tensors as files have them."""
    return not any(
        tensor.own_rows or any(s.parts or s.start is None for s in tensor.sources)
        for tensor in plan.values()
    )


def _fingerprint(plan: Mapping[str, PlannedTensor], shards: Shards) -> bytes:
    """Return what two plain plans have in common only if they give the same bytes."""
    described: list[object] = []
    for file, names in shards.items():
        for name in names:
            tensor = plan[name]
            method = None if tensor.method is None else tensor.method.name
            described += [file, name, tensor.shape, tensor.dtype, method, tensor.has_base]
            described += sorted(tensor.arguments.items())
            for source in tensor.sources:
                state = None if source.file is None else source.file.state
                described += [state, source.start, source.shape, source.dtype]
    return hashlib.sha256(repr(described).encode("utf-8", "surrogatepass")).digest()


@contextmanager
def head_start(
    recipe: Recipe,
    found: Mapping[str, Found],
    arguments: argparse.Namespace,
    staged: AbstractContextManager[Path],
    by_itself: bool,
) -> Iterator[HeadStart]:
    """Give a head start, if it is likely to help and the process runs a script, by itself.

    Then the folder is staged already, and stays so until the end of the `with` of it, or of this.
    """
    start = HeadStart(staged)
    if not (by_itself and is_likely_to_help(recipe, found, arguments)):
        yield start
        return
    with ExitStack() as stack:
        folder = stack.enter_context(staged)
        stack.callback(start.end)
        start.begin(folder, recipe, found, arguments)
        start.staged = _rest(stack, folder)
        yield start


@contextmanager
def _rest(stack: ExitStack, folder: Path) -> Iterator[Path]:
    """Do at the end of this `with` what the stack would have done at its own."""
    with stack.pop_all():
        yield folder
