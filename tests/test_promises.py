"""What is promised when things go wrong: kills at any moment, full disks, limits."""

import ctypes
import itertools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROCESSES, contents, loads_clean, ties_command, visible

import main
from merging.runs import shards, writing
from merging.runs.direct import DirectFile

if sys.platform == "win32":
    pytest.skip("needs POSIX signals and limits", allow_module_level=True)


def call(arguments: list[str], limit: int | None = None) -> None:
    """Run main.py in a process of its own, perhaps with a limit on the size of files."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of no size, unlike the file of another test
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    sys.exit(main.main(arguments))


MOMENTS = [  # where to stop: the function of a module, and after how many calls of it
    (shards, "compute", 0),
    (shards, "compute", 40),
    (shards, "compute", 80),
    (DirectFile, "write", 0),
    (DirectFile, "write", 99),
    (DirectFile, "close", 1),
    (shutil, "copyfile", 0),
    (writing, "verify", 0),
    (os, "fsync", 0),
    (os, "fsync", 3),
]


# Which of them are tried by default, in each kind of run; all with ALL_TESTS=1. The two signals
# that can be caught differ by their number alone.
SAMPLES = {
    (signal.SIGKILL, True): slice(None),
    (signal.SIGKILL, False): slice(0, None, 3),
    (signal.SIGINT, True): slice(1, None, 3),
    (signal.SIGINT, False): slice(None),
    (signal.SIGTERM, True): slice(2, None, 4),
    (signal.SIGTERM, False): slice(3, None, 4),
}


@pytest.fixture(autouse=True)
def heed_interruptions() -> None:
    """Handle Ctrl-C although a shell that runs the tests in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped(arguments: list[str], number: int, moment: int) -> None:
    """Run main.py in a process of its own, which gets a signal at a moment."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    owner, name, skip = MOMENTS[moment]
    function, calls = getattr(owner, name), itertools.count()

    def interrupted(*given: object, **options: object) -> object:
        if next(calls) == skip:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # for the main thread to notice
        return function(*given, **options)

    setattr(owner, name, interrupted)
    call(arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_runs(
    number: signal.Signals, overwrite: bool, inputs: list[str], tmp_path: Path
) -> None:
    """At up to ten moments: nothing or the old output, and a plain rerun gives the same bytes."""
    assert main.main(ties_command(tmp_path / "expected", inputs)) == 0
    output = tmp_path / "out" / "model"
    old: dict[str, bytes] = {}
    if overwrite:
        assert main.main([str(output), "--base-model", inputs[0], "--merge", inputs[1]]) == 0
        old = contents(output)
    arguments = ties_command(output, inputs, *["--overwrite"] * overwrite)
    every = bool(os.environ.get("ALL_TESTS"))
    for moment in range(len(MOMENTS))[slice(None) if every else SAMPLES[number, overwrite]]:
        process = PROCESSES.Process(target=stopped, args=(arguments, number, moment))
        process.start()
        process.join()
        killed = number == signal.SIGKILL
        assert process.exitcode == (-number if killed else 128 + number), MOMENTS[moment]
        assert (contents(output) if output.exists() else {}) == old
        if not killed:
            assert visible(output.parent) == ["model"] * overwrite
    assert main.main(arguments) == 0
    assert contents(output) == contents(tmp_path / "expected")
    assert visible(output.parent) == ["model"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing(
    number: signal.Signals,
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(writing, "verify", interrupt)
    handler = signal.getsignal(number)
    assert main.main(ties_command(output, inputs)) == 128 + number
    assert signal.getsignal(number) is handler
    assert capfd.readouterr().err == "interrupted, nothing was left behind\n"
    assert not output.parent.exists()


@pytest.mark.parametrize("limit", [2_000, 50_000, 120_000])
def test_a_limit_on_file_size(limit: int, inputs: list[str], output: Path) -> None:
    process = PROCESSES.Process(target=call, args=(ties_command(output, inputs), limit))
    process.start()
    process.join()
    if limit == 120_000:  # more than the largest file
        assert process.exitcode == 0
    else:
        assert process.exitcode == 2
        assert not output.parent.exists()
    assert main.main(ties_command(output, inputs, "--overwrite")) == 0
    loads_clean(output)


@pytest.mark.parametrize("name", ["write", "copyfile", "fsync"])
def test_a_full_disk(
    name: str,
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "some/file")

    where = os if name in ("write", "fsync") else shutil
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        assert main.main(ties_command(output, inputs)) == 2
    assert capsys.readouterr().err == "error: some/file: No space left on device\n"
    assert not output.parent.exists()


class Library:
    """The C library, where a call of renameat2 is announced, or is not to be had."""

    def __init__(self, announce: Callable[[], None] | None) -> None:
        self.announce, self.real = announce, ctypes.CDLL(None, use_errno=True)

    def __call__(self, *name: object, **options: object) -> "Library":
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "renameat2":
            if self.announce is None:
                raise AttributeError(name)
            self.announce()
        return getattr(self.real, name)


@pytest.mark.parametrize("step", ["exchange", "rename", "rmtree"])
def test_a_signal_during_the_swap_does_not_stop_it(
    step: str, inputs: list[str], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step == "exchange" and not sys.platform.startswith("linux"):
        pytest.skip("needs renameat2")
    assert main.main(ties_command(output, inputs)) == 0
    signals = []

    def interrupt() -> None:
        signals.append(step)
        os.kill(os.getpid(), signal.SIGINT)

    def announced(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            interrupt()
            function(*arguments, **options)

        return call

    if step == "rmtree":
        monkeypatch.setattr(shutil, "rmtree", announced(shutil.rmtree))
    elif step == "rename":
        monkeypatch.setattr(os, "rename", announced(os.rename))
    library = Library(None if step == "rename" else interrupt if step == "exchange" else int)
    monkeypatch.setattr(ctypes, "CDLL", library)
    base, a, _ = inputs
    arguments = [str(output), "--base-model", base, "--merge", a, "--overwrite", "--quiet"]
    assert main.main(arguments) == 0
    monkeypatch.undo()
    assert len(signals) == {"exchange": 1, "rename": 3, "rmtree": 1}[step]
    assert visible(output.parent) == ["model"]
    assert len(list(output.glob("*.safetensors"))) == 1
