"""Compute the tensors of a plan, a few ahead of the one that is being written."""

import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import merge_methods
from merging.arithmetic.likeness import Measuring
from merging.arithmetic.memory import placed
from merging.arithmetic.watching import watching
from merging.models.tensors import LazyTensor
from merging.plans.plan import PlannedTensor, uses
from merging.problems import Problems
from merging.runs.rows_apart import with_own_rows

Result = TypeVar("Result")

AHEAD = 1 << 28  # bytes of computed tensors that may wait to be written; more for many workers
# Is shown each tensor: its name and plan, its sources, the result, and what was measured meanwhile.
Observer = Callable[[str, PlannedTensor, list[Tensor], Tensor, Measuring], None]
WORKERS = 32  # threads that compute tensors, at most: each takes about 10 MB
DEVICE_WORKERS = 4  # the same with an accelerator, whose memory holds the tensors of all


class _Room:
    """A device's memory: shared by workers, or left to one for which it was too small."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0  # for all others to leave; until then, nobody else comes in

    @contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        with self._changed:
            self._waiting += alone
            self._changed.wait_for(lambda: not (self._inside if alone else self._waiting))
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._waiting -= alone
                self._changed.notify_all()


ROOM = _Room()


def compute(
    name: str,
    planned: PlannedTensor,
    device: torch.device,
    observe: Observer | None = None,
    places: Mapping[str, int] | None = None,
) -> Tensor:
    """Read the sources of a planned tensor and combine them on the device. Returns a CPU tensor.

    They are shown to the observer, if there is one. `places` says where tensors will lie in files.
    Raises Problems if a value is not finite, with the name of its source.
    """
    tensors = read_sources(planned)
    measuring = Measuring(math.prod(planned.shape)) if observe is not None else None
    try:
        with watching(measuring), placed((places or {}).get(name)):
            result = _combined(planned, tensors, device)
    except merge_methods.Undefined as error:
        raise Problems(f"{name}: {error}") from error
    if observe is not None and measuring is not None and result is not None:
        observe(name, planned, tensors, result, measuring)
    for source in planned.sources:
        source.check()
    if result is None:
        raise Problems(_blame(name, planned, tensors))
    return with_own_rows(planned, result)


def read_sources(planned: PlannedTensor) -> list[Tensor]:
    """Read the sources of a planned tensor; Problems if a file of one has changed."""
    for source in planned.sources:
        source.check()
    return [source.read() for source in planned.sources]


def _combined(planned: PlannedTensor, tensors: list[Tensor], device: torch.device) -> Tensor | None:
    """Combine CPU tensors on a device: as a whole, or in chunks where its memory is too small.

    Returns a CPU tensor, or None if a value is not finite.
    """
    if planned.method is None:
        return _on_host(tensors[0].to(planned.dtype))
    try:
        with ROOM.entered(alone=False):
            return _on_host(_apply(planned, [tensor.to(device) for tensor in tensors], device))
    except torch.OutOfMemoryError:  # which only accelerators raise
        pass  # and free what was tried, before trying again
    with ROOM.entered(alone=True):
        return _on_host(_apply(planned, tensors, device))


def _on_host(result: Tensor) -> Tensor | None:
    return result.to("cpu").contiguous() if _is_finite(result) else None


def _apply(planned: PlannedTensor, tensors: list[Tensor], device: torch.device) -> Tensor:
    """Call the planned tensor's method."""
    assert planned.method is not None
    base = {"base": tensors[0]} if planned.has_base else {}
    result: Tensor = getattr(merge_methods, planned.method.name)(
        tensors=tensors[len(base) :],
        **base,
        **planned.arguments,
        dtype=planned.dtype,
        device=device,
    )
    return result


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _blame(name: str, planned: PlannedTensor, tensors: Sequence[Tensor]) -> str:
    """Say which source brought a NaN or infinity, or that the output dtype is too small."""
    for source, tensor in zip(planned.sources, tensors, strict=True):
        if not _is_finite(tensor):
            return f"{source.label} contains NaN or infinity"
    dtype = str(planned.dtype).removeprefix("torch.")
    return f"{name}: the result overflows {dtype}; try another --dtype, or smaller weights"


def available_processors() -> int:
    """Return how many processors this process may use, by affinity and control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # no such control group, or no limit
        quota, period = _limit("cpu.max").split()
        count = min(count or 1, max(1, round(int(quota) / int(period))))
    return count or 1


def available_memory() -> float:
    """Return how many bytes this process may use, by the machine and its control group."""
    size = math.inf
    with suppress(AttributeError, OSError, ValueError):  # not known on this system
        size = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    with suppress(OSError, ValueError):
        size = min(size, int(_limit("memory.max")))
    return size


def _limit(name: str) -> str:
    return Path("/sys/fs/cgroup", name).read_text()


def choose_device(cuda: bool) -> torch.device:
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Problems(
            "--cuda: PyTorch finds no CUDA device; install a CUDA build of torch and a driver, "
            "or leave --cuda out to compute on the CPU"
        )
    return torch.device("cuda")


@contextmanager
def computed(
    plan: Mapping[str, PlannedTensor],
    names: Iterable[str],
    task: Callable[[str, PlannedTensor], Result],
    device: torch.device,
    threads: int,
) -> Iterator[Iterator[Result]]:
    """Give what a task makes of the tensors of a plan, in the order of the names.

    It is computed ahead by `threads`; it takes no more memory than the tensor.
    """
    count = min(threads, WORKERS if device.type == "cpu" else DEVICE_WORKERS)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))  # which torch uses for the work of each
    pool, reader = ThreadPoolExecutor(count), ThreadPoolExecutor(1)
    over = threading.Event()

    def load(part: LazyTensor) -> None:
        reader.submit(part.load, over.is_set)

    try:
        yield _in_order(plan, names, task, pool, load, max(AHEAD, AHEAD // 8 * count))
    finally:
        over.set()
        for each in (reader, pool):
            each.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _in_order(
    plan: Mapping[str, PlannedTensor],
    names: Iterable[str],
    task: Callable[[str, PlannedTensor], Result],
    pool: ThreadPoolExecutor,
    load: Callable[[LazyTensor], None],
    limit: int,
) -> Iterator[Result]:
    """Yield what is computed by a pool.

    No more than `limit` bytes of results, or one tensor, wait to be taken; the sources of those
    under way are read from the disk meanwhile. If memory cannot hold all that is read, the system
    need not keep what was used for the last time: new pages would cost more than the old.
    """
    used = uses(plan)
    is_too_large = sum(part.nbytes for part in used) > available_memory()
    waiting = deque(names)
    pending: deque[tuple[str, Future[Result]]] = deque()
    held = 0
    while waiting or pending:
        while waiting and (not pending or held + plan[waiting[0]].nbytes <= limit):
            name = waiting.popleft()
            planned = plan[name]
            held += planned.nbytes
            for part in _stored(planned):
                part.check()
                load(part)
            pending.append((name, pool.submit(task, name, planned)))
        name, future = pending.popleft()
        yield future.result()
        held -= plan[name].nbytes
        for part in _stored(plan[name]) if is_too_large else ():
            if used[part] == 1:
                part.drop()


def _stored(planned: PlannedTensor) -> Iterator[LazyTensor]:
    for source in planned.sources:
        yield from source.stored()
