"""Read weight files from the disk before they are needed. Loads neither torch nor transformers."""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from merging.models.folders import weight_files
from merging.problems import Problems

AHEAD = 1 << 31  # bytes of all models together: what a disk reads while torch and transformers load
STEP = 1 << 20  # bytes that are read at once
CAN_LOAD = hasattr(os, "RWF_NOWAIT")  # whether it can be told what is in memory: on Linux


def load(descriptor: int, start: int, size: int, is_over: Callable[[], bool]) -> None:
    """Read what the system does not hold in memory of a part of a file, so that it does.

    Until it `is_over`. To ask the system to do so is not enough: it reads some megabytes of
    what it is asked for, and from then on keeps those waiting who need the next ones.
    """
    buffer = memoryview(b"")
    with suppress(OSError):  # which those meet who need it
        for at in range(start, start + size, STEP):
            if is_over():
                return
            if not _holds(descriptor, at):
                buffer = buffer or memoryview(bytearray(STEP))
                os.preadv(descriptor, [buffer[: start + size - at]], at)


def _holds(descriptor: int, at: int) -> bool:
    """Whether the system has a byte of a file in memory; if it cannot tell, it is asked to."""
    try:
        os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        os.posix_fadvise(descriptor, at, STEP, os.POSIX_FADV_WILLNEED)
    return True


@contextmanager
def loading_first(folders: Iterable[Path]) -> Iterator[None]:
    """Read the first parts of models' weights, as far as they are there, beside what is done."""
    over = threading.Event()
    if CAN_LOAD:
        listed = list(dict.fromkeys(folders))
        given = (listed, AHEAD // max(1, len(listed)), over.is_set)
        threading.Thread(target=_load_first, args=given, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _load_first(folders: list[Path], size: int, is_over: Callable[[], bool]) -> None:
    for folder in folders:
        rest = size
        with suppress(OSError, Problems):  # whatever is wrong is found when the files are opened
            for file in weight_files(folder)[0]:
                descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    length = min(rest, os.fstat(descriptor).st_size)
                    load(descriptor, 0, length, is_over)
                finally:
                    os.close(descriptor)
                rest -= length
                if rest <= 0:
                    break
