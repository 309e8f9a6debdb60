"""Read what users give: ordinary files of a sensible size, and no pointers to files elsewhere."""

import os
import stat
from pathlib import Path

LARGEST = 100_000_000  # bytes of a file that is read as a whole
LFS_POINTER = b"version https://git-lfs"


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a file, read as a whole. ValueError if it is too large, or no file."""
    with open(path, "rb", opener=_at_once) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name}: expected an ordinary file")
        if found.st_size > largest:
            size = f"{found.st_size / 1e6:.0f} MB, expected at most {largest / 1e6:g} MB"
            raise ValueError(f"{path.name}: {size}")
        content = stream.read(largest)
    _check_no_pointer(path, content)
    return content.decode("utf-8")


def read_start(path: Path, size: int = 4096) -> bytes:
    """Return the first bytes of a file. ValueError if it is no ordinary file."""
    with open(path, "rb", opener=_at_once) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError(f"{path.name}: expected an ordinary file")
        return stream.read(size)


def check_readable(path: Path) -> None:
    """Raise OSError if a file may not be read, ValueError if Git has not fetched its content."""
    _check_no_pointer(path, read_start(path, len(LFS_POINTER)))


def _at_once(path: str, flags: int) -> int:
    """Open a file, and do not wait for what a FIFO may bring."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_no_pointer(path: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise ValueError(f"{path.name} is a Git LFS pointer, not the file; run `git lfs pull`")
