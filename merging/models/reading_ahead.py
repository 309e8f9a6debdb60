"""Ask the system to read weight files while torch and transformers load. Loads neither."""

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from merging.models.folders import weight_files
from merging.problems import Problems

AHEAD = 1 << 31  # bytes of all models together: about what a disk reads in that time


def read_ahead(folders: Iterable[Path]) -> None:
    """Ask for the first pages of the models' weights, as far as they are there, in the background.

    Where files are in memory already, or the system has no such request, nothing happens.
    """
    if hasattr(os, "posix_fadvise"):
        listed = list(dict.fromkeys(folders))
        threading.Thread(
            target=_ask, args=(listed, AHEAD // max(1, len(listed))), daemon=True
        ).start()


def _ask(folders: list[Path], size: int) -> None:
    for folder in folders:
        rest = size
        with suppress(OSError, Problems):  # whatever is wrong is found when the files are opened
            for file in weight_files(folder)[0]:
                descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(descriptor, 0, rest, os.POSIX_FADV_WILLNEED)
                    rest -= os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
                if rest <= 0:
                    break
