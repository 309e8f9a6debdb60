"""What a run tells the user, and its exit status."""

import gc
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from merging.problems import Problems, explain, first_line, printable
from merging.runs.staging import STOP_SIGNALS

MOST_LINES, LONGEST = 30, 3000  # of a message; the latter in characters
OURS = {"merging", "merge_methods", "main", "bakllama"}  # modules that no installation mends
# What torch says in a RuntimeError when the host or a device has no memory.
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: |^unable to mmap .*Cannot allocate memory|CUDA error: out of memory"
    r"|_STATUS_ALLOC_FAILED"
)


class Talk:
    """Standard error, which may be full, closed or broken: that changes nothing of a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str, quiet: bool = False) -> None:
    """Print on standard error, if that is open."""
    if not quiet and sys.stderr is not None:
        lines = [printable(line, 100_000) for line in text.split("\n")]
        print("\n".join(lines), file=sys.stderr, flush=True)


def say_path(path: str) -> None:
    """Print a path on standard output. The model is there, whether or not anybody can read this."""
    try:
        print(path, flush=True)
    except UnicodeError:
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    except OSError:  # a closed pipe, a full disk; leave nothing that is tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def peak_memory() -> int:
    """Return the largest resident size so far of this process and its largest child, in bytes.

    What they share counts twice. 0 on Windows.
    """
    try:
        import resource
    except ImportError:
        return 0
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = sum(resource.getrusage(each).ru_maxrss for each in whose)
    return peak if sys.platform == "darwin" else peak * 1024


class Interrupted(BaseException):
    """A signal asked the run to stop."""


def run(work: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's work and return the exit status.

    0; 2 with one message for what a user can mend, and for failed system calls; 128 + its number
    for a signal (130 on Ctrl-C, 143 on SIGTERM), after the leftovers are removed. A defect raises.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        raise Interrupted

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [s for s in STOP_SIGNALS if in_main_thread and signal.getsignal(s) != signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in handled}
    collected = gc.isenabled()
    if argv is None and sys.stderr is not None:  # a script
        sys.stderr = Talk(sys.stderr)
    gc.disable()  # it slows importing torch and transformers by a third, and finds nothing
    try:
        with warnings.catch_warnings():
            work(argv)
    except BaseException as error:
        if received:  # the error may be what a library made of the interruption
            for each in handled:
                signal.signal(each, signal.SIG_IGN)
            say("interrupted, nothing was left behind")
            return 128 + received[0]
        if (message := mendable(error)) is None:
            raise
        say(f"error: {_shortened(message)}{_lost_directory()}")
        return 2
    finally:
        if collected and argv is not None:  # at the end of a script, there is nothing to collect
            gc.enable()
        if argv is not None or not received:  # at the end of a script, let no signal disturb it
            for each, handler in before.items():
                signal.signal(each, handler)
    return 0


def leave(status: int) -> NoReturn:
    """End a script with its exit status, at once: to take torch apart takes a while, in vain."""
    if sys.gettrace() or sys.getprofile():  # somebody watches, who has something to do at the end
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # as in `say_path`
                stream.flush()
    os._exit(status)


def _shortened(message: str) -> str:
    """Return the first lines of a message, and how many more there are."""
    lines = [printable(line, LONGEST // 4) for line in message.split("\n")]
    kept = lines[:MOST_LINES]
    while len("\n".join(kept)) > LONGEST:
        kept.pop()
    more = len(lines) - len(kept)
    return "\n".join([*kept, *[f"  and {more} more"] * (more > 0)])


def _lost_directory() -> str:
    """Say that the working directory is gone, if so: then no relative path is found."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return " (the working directory does not exist any more)"
    return ""


def mendable(error: BaseException) -> str | None:
    """Return the message of an error that a user can mend; None of a defect."""
    if isinstance(error, Problems | OSError):
        return explain(error)
    if _is_of_memory(error):
        return f"out of memory: {first_line(error)}"
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        if module not in OURS | sys.stdlib_module_names:
            return f"{error}; install what is needed with: pip install -r requirements.txt"
    return None


def _is_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, as Python or torch says."""
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, MemoryError | of_torch):
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))
