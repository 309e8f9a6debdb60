"""Tensors that are read when they are needed: as files store them, or made of some that they do."""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.models.reading_ahead import CAN_LOAD, load
from merging.problems import Problems

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MISSING = -1


def _map(file: int, start: int, size: int) -> Any:
    """Return the bytes of an open file from a page on, mapped until nobody holds them any more.

    Python's own mmap keeps a copy of the file's descriptor for each of them, up to version 3.13,
    and of those there may be few.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
        return mmap.mmap(file, size, offset=start, access=mmap.ACCESS_COPY)
    library = ctypes.CDLL(None, use_errno=True)
    number, address = ctypes.c_int, ctypes.c_void_p
    library.mmap.restype = address
    library.mmap.argtypes = (address, ctypes.c_size_t, number, number, number, ctypes.c_int64)
    library.munmap.argtypes = (address, ctypes.c_size_t)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    found = library.mmap(None, size, access, mmap.MAP_PRIVATE, file, start)
    if found == address(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    content = (ctypes.c_char * size).from_address(found)
    weakref.finalize(content, library.munmap, found, size).atexit = False
    return content


class WatchedFile:
    """A file that is mapped while a run lives: nobody may change it meanwhile."""

    state: tuple[str, int, int, int, int]  # its path, device, number, size, and last change

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = open(path, "rb")  # the file itself, whatever gets its name later
        self.state = (str(path), *self._look())

    def check(self) -> None:
        """Raise Problems if it has changed since it was opened: its pages may be gone."""
        if self._look() != self.state[1:]:
            raise Problems(f"{self.path}: changed while it was merged; merge it again")

    def read(self, size: int) -> bytes:
        """Return the next bytes of the file, as many as there are."""
        return self._stream.read(size)

    def mapped(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return `count` entries from a byte on, mapped for as long as somebody holds the tensor.

        Its memory may be written to; nothing of that reaches the file.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size = start - page + count * dtype.itemsize
        content = _map(self._stream.fileno(), page, size)
        return torch.frombuffer(content, dtype=dtype, count=count, offset=start - page)

    def load(self, start: int, size: int, is_over: Callable[[], bool]) -> None:
        load(self._stream.fileno(), start, size, is_over)

    def drop(self, start: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._stream.fileno(), start, size, os.POSIX_FADV_DONTNEED)

    def _look(self) -> tuple[int, int, int, int]:
        found = os.fstat(self._stream.fileno())
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is known by its label, shape and dtype, and can be read."""

    label: str  # what messages call it: the model, and its name there
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    parts: tuple["LazyTensor", ...] = field(default=(), repr=False)  # what it is made of
    file: WatchedFile | None = field(default=None, repr=False)  # that stores it, if one does
    start: int | None = field(default=None, repr=False)  # of its bytes there, if that is known

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOAT_DTYPES

    def stored(self) -> Iterator["LazyTensor"]:
        """Yield the tensors of files that are read for it: itself, or what its parts are made of.

        Reading one of these maps it into memory, without a copy.
        """
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.stored()

    def load(self, is_over: Callable[[], bool]) -> None:
        """Have a stored tensor in memory before it is needed, unless the run `is_over`.

        Where the system cannot tell what is there already, it is only asked to.
        """
        if CAN_LOAD and self.file is not None and self.start is not None:
            self.file.load(self.start, self.nbytes, is_over)
            return
        tensor = self.read()
        if hasattr(mmap, "MADV_WILLNEED") and tensor.nbytes > mmap.PAGESIZE:
            start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, mmap.MADV_WILLNEED)

    def drop(self) -> None:
        """Tell the system that a stored tensor need not be kept in memory, if its place is known.

        It may do as it likes.
        """
        if self.file is not None and self.start is not None:
            self.file.drop(self.start, self.nbytes)

    def check(self) -> None:
        """Raise Problems if a file that it is read from has changed."""
        for part in self.stored():
            if part.file is not None:
                part.file.check()


def with_rows(
    tensor: LazyTensor,
    dim: int,
    rows: Sequence[int],
    other: LazyTensor | None = None,
    other_rows: Sequence[int] | None = None,
) -> LazyTensor:
    """Return the tensor whose entries along `dim` are those `rows` of a tensor.

    Where a row is MISSING, or beyond the tensor, an entry of the other takes it: that of its place,
    or of its place in `other_rows`. Where that is MISSING too, it is zero.
    """
    chosen = _within(tensor, dim, rows)
    missing = (chosen < 0).nonzero().flatten()
    instead = torch.full_like(missing, MISSING)
    if other is not None and other_rows is None:
        instead = missing
    elif other is not None and other_rows is not None:
        instead = _within(other, dim, other_rows)[missing]

    def read() -> Tensor:
        gathered = _gathered(tensor.read(), dim, chosen)
        if len(missing):
            source = gathered if other is None else other.read()
            others = _gathered(source, dim, instead)
            gathered = gathered.to(torch.promote_types(gathered.dtype, others.dtype))
            gathered.index_copy_(dim, missing, others.to(gathered.dtype))
        return gathered

    shape = (*tensor.shape[:dim], len(rows), *tensor.shape[dim + 1 :])
    if other is None or other is tensor or not bool((instead >= 0).any()):
        return LazyTensor(tensor.label, shape, tensor.dtype, read, (tensor,))
    label = f"{tensor.label} (with rows of {other.label})"
    return LazyTensor(label, shape, tensor.dtype, read, (tensor, other))


def _within(tensor: LazyTensor, dim: int, rows: Sequence[int]) -> Tensor:
    """Return rows as numbers, MISSING where the tensor has none."""
    chosen = torch.tensor(rows, dtype=torch.int64)
    chosen[chosen >= tensor.shape[dim]] = MISSING
    return chosen


def _gathered(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Return entries of a tensor along a dimension, zeros where they are MISSING."""
    found = tensor.index_select(dim, rows.clamp(0))
    return found.index_fill_(dim, (rows < 0).nonzero().flatten(), 0)


@dataclass(frozen=True, eq=False)
class OwnRows:
    """Entries along a dimension of a merged tensor that its base lacks: a mean of others'."""

    dim: int
    places: tuple[int, ...]  # of the entries
    sources: tuple[LazyTensor, ...]  # of these entries alone; none: the merged tensor's others
    weights: tuple[float, ...]
