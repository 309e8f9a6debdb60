"""Run the commands in processes of their own, with limits on time, memory and file sizes.

    with Contained() as contained:
        outcome = contained.run("main", ["out", "--merge", "a"], folder)
    assert outcome.status == 2

Loading the libraries takes seconds, so a server process loads them once and forks for every run: a
crash, a hang or a run without end is an outcome like others.
"""

import importlib
import json
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS, MEMORY, FILE_SIZE = 30.0, 3 << 30, 1 << 30  # limits: wall clock, bytes beyond the start's
LIBRARIES = (
    "torch safetensors.torch tokenizers yaml huggingface_hub transformers.models.auto "
    "transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2 "
    "transformers.conversion_mapping transformers.initialization"
).split()


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int | None  # None where a signal or the time limit ended it
    signal: int | None
    timed_out: bool
    seconds: float
    peak: int  # bytes, the largest resident size
    out: str
    err: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err

    def __str__(self) -> str:
        ended = f"exit {self.status}" if self.signal is None else f"signal {self.signal}"
        ended = "hang" if self.timed_out else ended
        return f"{ended}, {self.seconds:.1f} s, {self.peak / 1e6:.0f} MB\n{self.err[-3000:]}"


class Contained:
    """A server that forks for each run. `environment` is added to this process's own."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        paths = [str(ROOT), str(ROOT / "tests")]
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                **(environment or {}),
            },
        )

    def __enter__(self) -> "Contained":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(
        self,
        script: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        seconds: float = SECONDS,
        memory: int = MEMORY,
        file_size: int = FILE_SIZE,
        environment: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        prelude: str = "",
        user: int | None = None,
    ) -> Outcome:
        """Call `main` of a script's module in a folder. `settings` sets module.attribute to values.

        `prelude` is Python that the process runs before; `user` the one that it becomes, from root.
        The words of `arguments` may be bytes in surrogate escapes, as the system gives them.
        """
        logs = folder.parent / f".{folder.name}.logs"
        logs.mkdir(exist_ok=True)
        job = {
            "script": script,
            "arguments": list(arguments),
            "folder": str(folder),
            "logs": str(logs),
            "seconds": seconds,
            "memory": memory,
            "file_size": file_size,
            "environment": dict(environment or {}),
            "settings": dict(settings or {}),
            "prelude": prelude,
            "user": user,
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        out, err = ((logs / name).read_text(errors="replace") for name in ("out", "err"))
        return Outcome(**answer, out=out, err=err)


def at_staging(action: str) -> str:
    """Return a prelude that does something once the run makes its hidden directory.

    By then all inputs are open and checked, and no value has been read.
    """
    return f"""
import os
mkdir = os.mkdir

def mkdir_and_act(path, *arguments, **options):
    mkdir(path, *arguments, **options)
    if os.fspath(path).endswith(".partial"):
        os.mkdir = mkdir
{textwrap.indent(textwrap.dedent(action).strip(), " " * 8)}

os.mkdir = mkdir_and_act
"""


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return kind, size and time of all that is below a folder, reading nothing."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            info = path.lstat()
            is_folder = stat.S_ISDIR(info.st_mode)
            facts = (
                (info.st_mode, 0, 0)
                if is_folder
                else (info.st_mode, info.st_size, info.st_mtime_ns)
            )
            found[path.relative_to(folder).as_posix()] = facts
    return found


# -------------------------------------------------------------------- in the server


def _load() -> None:
    """Import the libraries, and all modules of the product that can be imported."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("merging/**/*.py")]
    own = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(sources)]
    for name in [*LIBRARIES, *own]:
        try:
            importlib.import_module(name)
        except ImportError:
            pass


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _child(job: Mapping[str, Any]) -> None:
    """Be the run: set limits, call main, and leave with its status. Does not return."""
    status = 1
    try:
        os.setsid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(job["logs"]) / name, flags, 0o644), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        for path, value in job["settings"].items():
            module, _, attribute = path.rpartition(".")
            setattr(importlib.import_module(module), attribute, value)
        limit = _mapped() + job["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if job["user"] is not None:
            os.setgroups([])
            os.setgid(job["user"])
            os.setuid(job["user"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        exec(job["prelude"], {})
        script = importlib.import_module(job["script"])
        status = int(script.main(job["arguments"]) or 0)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = status or 120
        os._exit(status)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _load()
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        process = os.fork()
        if not process:
            _child(job)
        watched = os.pidfd_open(process)
        ended = bool(select.select([watched], [], [], job["seconds"])[0])
        if not ended:
            os.kill(process, signal.SIGKILL)
        os.close(watched)
        _, status, usage = os.wait4(process, 0)
        code = os.waitstatus_to_exitcode(status)
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        answer = {
            "status": code if ended and code >= 0 else None,
            "signal": -code if code < 0 else None,
            "timed_out": not ended,
            "seconds": time.monotonic() - started,
            "peak": usage.ru_maxrss * 1024,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
