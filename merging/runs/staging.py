"""Write a directory so that it appears under its name whole, or not at all.

Everything is written to a hidden sibling, `.NAME.partial`, flushed to the disk, and renamed. The
sibling is locked while its run lives: what a killed run left there is cleared by the next run for
the same output, and a second run at the same time is refused.
"""

import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from merging.models.folders import is_model
from merging.problems import Problems, explain

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # from file systems without locks
# From directories that may be written to, but not read, and file systems that flush files only.
NO_FLUSH = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP)
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextmanager
def staged(
    output: Path,
    *,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Give a directory to write in; when the `with` ends well, it becomes `output`.

    With `overwrite` an existing output is replaced, whole. On any error or interruption all that
    was written is removed, with the parent directories that were made for it. Raises Problems if
    another run is writing the same output.

    `check` is called when all is ready, and may raise. Once the directory has become `output`,
    nothing is an error: what else goes wrong is told.
    """
    output = output.resolve()
    staging, replaced = siblings(output)
    made: list[Path] = []
    try:
        for parent in reversed([parent for parent in output.parents if not parent.exists()]):
            parent.mkdir(exist_ok=True)
            made.append(parent)
        with _claimed(staging, output):
            done = False
            try:
                _recover(replaced, output)
                if not overwrite and output.is_dir() and any(output.iterdir()):
                    raise Problems(f"{output}: not empty; another run has written it meanwhile")
                yield staging
                _sync(staging)
                with uninterrupted():
                    check()
                    _put(staging, output, replaced, overwrite)
                    done = True
                    _finish(staging, output, replaced, tell)
            finally:
                if not done:
                    with uninterrupted():
                        shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        with suppress(OSError):  # of what is not empty
            for parent in reversed(made):
                parent.rmdir()
        raise


def siblings(output: Path) -> tuple[Path, Path]:
    """Return the hidden names beside an output: of what is being written, of what is replaced."""
    return output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.replaced")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore the signals that ask to stop: for steps that are short and must be done whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(signal.SIG_IGN):
        yield


@contextmanager
def postponed() -> Iterator[None]:
    """Heed the signals that ask to stop at the end of the `with`, in the main thread."""
    heard: list[int] = []
    try:
        with _handled(lambda number, _: heard.append(number)):
            yield
    finally:
        for number in heard[:1]:
            signal.raise_signal(number)


@contextmanager
def _handled(instead: Any) -> Iterator[None]:
    """Handle the signals that ask to stop otherwise, in the main thread."""
    before = {each: signal.signal(each, instead) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _claimed(staging: Path, output: Path) -> Iterator[None]:
    """Lock the staging directory, emptied, and the output, which will take its place."""
    message = f"{output}: another run is writing this output; wait for it, or name another"
    locks = [_lock(staging, message)]
    try:
        if output.is_dir():
            locks.append(_lock(output, message))
        try:
            for left in staging.iterdir():
                is_folder = left.is_dir() and not left.is_symlink()
                shutil.rmtree(left) if is_folder else left.unlink()
        except OSError as error:
            raise Problems(
                f"{staging}: left by an earlier run, cannot be removed: {explain(error)}"
            ) from error
        yield
    finally:
        for lock in locks:
            os.close(lock)


def _lock(directory: Path, message: str) -> int:
    """Open a directory, made if need be, and lock it until it is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: there, two runs at once are not told apart
        directory.mkdir(exist_ok=True)
        return os.open(os.devnull, os.O_RDONLY)
    while True:
        directory.mkdir(exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if directory.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise Problems(message) from None
        except FileNotFoundError:  # renamed by a run that ended just now
            pass
        os.close(descriptor)


def _recover(replaced: Path, output: Path) -> None:
    """Undo what a run left that was killed between the two renames of `_put`."""
    if is_model(replaced):  # any other folder of that name is not ours
        if output.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(output)


def _put(staging: Path, output: Path, replaced: Path, overwrite: bool) -> None:
    """Give the staging directory the output's name; the old output, if any, gets the other."""
    if overwrite and output.exists():
        if not _exchange(staging, output):
            output.rename(replaced)
            staging.rename(output)
            replaced.rename(staging)
    else:
        staging.rename(output)  # onto nothing, or an empty directory


def _finish(staging: Path, output: Path, replaced: Path, tell: Callable[[str], None]) -> None:
    """Flush the new name to the disk, and only then remove the old output, if any."""
    kept = staging
    try:
        _sync_one(output.parent)
        if staging.exists():
            shutil.rmtree(staging)
            kept = output
    except OSError as error:
        tell(f"warning: {output} is written, but then: {explain(error)}")
        with suppress(OSError):
            if staging.exists() and not replaced.exists():
                kept = staging.rename(replaced)
    if kept.exists() and kept != output:
        tell(f"warning: the old model, or a part of it, is left in {kept}")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, where the system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    if done != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(other))
    return bool(done == 0)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "posix":  # elsewhere, directories cannot be opened
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in NO_FLUSH or not path.is_dir():
                raise
