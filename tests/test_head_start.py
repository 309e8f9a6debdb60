"""Head starts: nothing differs but the time that is taken, and nothing of them is left behind."""

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROCESSES, Make, contents, rewrite, stored, ties_command, visible

import main
from merging.models.opening import Found
from merging.models.weight_files import read_file
from merging.plans.plan import PlannedTensor
from merging.recipes.command_line import recipe_from
from merging.recipes.merge_options import build_parser
from merging.recipes.methods import LINEAR, TIES
from merging.runs import head_start
from merging.runs.head_start import HeadStart, _fingerprint, is_likely_to_help

if sys.platform != "linux":
    pytest.skip("only Linux has head starts", allow_module_level=True)


def never_done(*arguments: object) -> None:
    Path("pid").write_text(str(os.getpid()))
    time.sleep(100)


def broken(*arguments: object) -> None:
    raise ValueError


def limited(*arguments: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    WRITE(*arguments)  # type: ignore[arg-type]


def killed(*arguments: object) -> None:
    WRITE(*arguments)  # type: ignore[arg-type]
    os.kill(os.getpid(), signal.SIGKILL)


def changing(*arguments: object) -> None:
    """Compute, of inputs one of which has changed since it was opened: only its time tells."""
    os.utime(Path("inputs/a/model.safetensors"), ns=(1, 1))
    WRITE(*arguments)  # type: ignore[arg-type]


def many_files(*arguments: object) -> None:
    WRITE(*arguments)  # type: ignore[arg-type]


def signalled(*arguments: object) -> None:
    time.sleep(100)


def no_process(*arguments: object) -> None: ...


def ignored(*arguments: object) -> None:
    WRITE(*arguments)  # type: ignore[arg-type]


WRITE = head_start.write_shards
Write = Callable[..., None]


def script(folder: Path, arguments: list[str], write: Write) -> None:
    """Run main.py as a script, in a folder; what is told goes to its file `told`."""
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("told", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    head_start.SMALLEST = 0
    head_start.available_processors = lambda: 2  # type: ignore[assignment]
    head_start.write_shards = write  # type: ignore[assignment]
    has_written, begin = HeadStart.has_written, HeadStart.begin

    def begun(start: HeadStart, *given: object) -> None:
        begin(start, *given)  # type: ignore[arg-type]
        if write is changing:
            time.sleep(1)  # until then, the plan must not open the inputs

    def seen(start: HeadStart, *given: object) -> bool:
        Path("begun").write_text(str(start._process > 0))
        found = has_written(start, *given)  # type: ignore[arg-type]
        Path("used").write_text(str(found))
        return found

    HeadStart.has_written = seen  # type: ignore[method-assign,assignment]
    HeadStart.begin = begun  # type: ignore[method-assign,assignment]
    if write is no_process:
        os.fork = lambda: (_ for _ in ()).throw(OSError(11, "Resource temporarily unavailable"))
    if write is many_files:
        for _ in range(1100):
            os.dup(0)
    if write is signalled:
        os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
    if write is ignored:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.argv = ["main.py", *arguments]
    sys.exit(main.main())


def run(folder: Path, arguments: list[str], write: Write = WRITE) -> int | None:
    """Return the exit status of a script."""
    process = PROCESSES.Process(target=script, args=(folder, arguments, write))
    process.start()
    process.join()
    return process.exitcode


def used(folder: Path) -> tuple[str, str]:
    """Return whether there was a head start, and whether it was used."""
    return (folder / "begun").read_text(), (folder / "used").read_text()


BOTH = ["--weight", "0.3", "--weight", "0.6"]


@pytest.mark.parametrize(
    "options",
    [
        ["--density", "0.5", "--max-shard-size", "100KB"],
        ["--method", "linear", *BOTH],
        ["--method", "task_arithmetic", *BOTH, "--lambda", "0.7", "--dtype", "float32"],
        ["--method", "dare_ties", *BOTH, "--density", "0.4", "--seed", "7", "--threads", "3"],
        ["--method", "model_stock"],
        ["--method", "karcher"],
        ["--method", "sce", "--select-topk", "0.5"],
    ],
    ids=lambda options: " ".join(options[:2]),
)
def test_the_bytes_are_those_of_a_plain_run(
    options: list[str], inputs: list[str], tmp_path: Path, output: Path
) -> None:
    base, a, b = inputs
    command = ["--merge", a, "--merge", b, "--no-model-card", *options]
    if "linear" not in options:
        command += ["--base-model", base]
    assert main.main([str(tmp_path / "expected"), *command]) == 0
    assert run(tmp_path, [str(output), *command]) == 0
    assert used(tmp_path) == ("True", "True")
    assert contents(output) == contents(tmp_path / "expected")


def test_an_output_is_replaced(inputs: list[str], tmp_path: Path, output: Path) -> None:
    assert main.main(ties_command(tmp_path / "expected", inputs)) == 0
    assert main.main(ties_command(output, [inputs[1], inputs[0], inputs[2]])) == 0
    assert run(tmp_path, ties_command(output, inputs)) == 2
    assert "not empty" in (tmp_path / "told").read_text()
    assert run(tmp_path, ties_command(output, inputs, "--overwrite")) == 0
    assert used(tmp_path) == ("True", "True")
    assert contents(output) == contents(tmp_path / "expected")


@pytest.mark.parametrize(
    "options",
    [
        ["--density", "0.5,1"],
        ["--density", "self_attn:0.3", "--density", "0.9"],
        ["--density", "0.5", "--trim-scope", "model"],
        ["--density", "0.5", "--threads", "1"],
        ["--density", "0.5", "--report", "report.json"],
    ],
    ids=lambda options: " ".join(options[-2:]),
)
def test_what_is_not_likely_has_none(
    options: list[str], inputs: list[str], tmp_path: Path, output: Path
) -> None:
    base, a, b = inputs
    command = ["--base-model", base, "--merge", a, "--merge", b, "--no-model-card", *options]
    assert run(tmp_path, [str(output), *command]) == 0
    assert used(tmp_path) == ("False", "False")


def test_a_library_call_has_none(
    inputs: list[str], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may have threads, which no fork survives."""
    monkeypatch.setattr(head_start, "SMALLEST", 0)
    monkeypatch.setattr(HeadStart, "begin", broken)
    assert main.main(ties_command(output, inputs)) == 0


@pytest.mark.parametrize("enough", [True, False])
@pytest.mark.parametrize("other", [None, ".bin", "adapter", "not there"])
def test_models_that_are_small_or_odd_have_none(
    enough: bool, other: str | None, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make("llama", 1), make("llama", 2)
    nbytes = 2 * (a / "model.safetensors").stat().st_size
    found = {str(a): Found(a, None), str(b): Found(b, a if other == "adapter" else None)}
    if other in (".bin", "not there"):
        found[str(b)] = Found(tmp_path, None)
    if other == ".bin":
        torch.save(stored(b), tmp_path / "pytorch_model.bin")
        nbytes = 1
    words = [str(tmp_path / "out"), "--method", "linear", "--weight", "1"]
    words += ["--merge", str(a), "--merge", str(b), "--threads", "2"]
    arguments = build_parser(words).parse_args(words)
    recipe = recipe_from(arguments, [])
    monkeypatch.setattr(head_start, "SMALLEST", nbytes + (not enough))
    assert is_likely_to_help(recipe, found, arguments) == (enough and other is None)


@pytest.mark.parametrize("write", [broken, limited, killed, changing])
def test_what_goes_wrong_is_done_again(
    write: Write, make: Make, tmp_path: Path, output: Path
) -> None:
    inputs = []
    for seed, name in enumerate(("base", "a", "b")):
        inputs.append(f"inputs/{name}")
        rewrite(make("mixtral", seed), tmp_path / "inputs" / name, stored(make("mixtral", seed)))
    absolute = [str(tmp_path / name) for name in inputs]
    assert main.main(ties_command(tmp_path / "expected", absolute)) == 0
    assert run(tmp_path, ties_command(output, inputs), write) == 0
    assert used(tmp_path) == ("True", "False")
    assert contents(output) == contents(tmp_path / "expected")


def test_a_run_that_may_not_fork_does_without(
    inputs: list[str], tmp_path: Path, output: Path
) -> None:
    assert run(tmp_path, ties_command(output, inputs), no_process) == 0
    assert used(tmp_path) == ("False", "False")


def test_any_number_of_files_may_be_open(inputs: list[str], tmp_path: Path, output: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1300:
        pytest.skip("not here")
    assert run(tmp_path, ties_command(output, inputs), many_files) == 0
    assert used(tmp_path) == ("True", "True")


def test_children_may_be_ignored(inputs: list[str], tmp_path: Path, output: Path) -> None:
    """As some programs leave it to those that they start: then the system forgets what ended."""
    assert run(tmp_path, ties_command(output, inputs), ignored) == 0
    assert used(tmp_path) == ("True", "True")


def test_a_plan_that_is_another_is_done_again(make: Make, tmp_path: Path, output: Path) -> None:
    """A head that equals the embedding is tied, and so not stored."""
    models = []
    for seed in (1, 2):
        tensors = stored(make("llama-tied", seed))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        models.append(str(rewrite(make("llama-tied", seed), tmp_path / f"m{seed}", tensors)))
    command = ["--method", "linear", "--weight", "1", "--no-model-card"]
    command += [word for model in models for word in ("--merge", model)]
    assert main.main([str(tmp_path / "expected"), *command]) == 0
    assert run(tmp_path, [str(output), *command]) == 0
    assert used(tmp_path) == ("True", "False")
    assert contents(output) == contents(tmp_path / "expected")
    assert "lm_head.weight" not in stored(output)


def test_a_value_that_is_not_finite_is_told_of(make: Make, tmp_path: Path, output: Path) -> None:
    tensors = stored(make("llama", 1))
    tensors["model.norm.weight"][3] = torch.nan
    bad = rewrite(make("llama", 1), tmp_path / "bad", tensors)
    command = ["--method", "linear", "--weight", "1", "--merge", str(bad)]
    assert run(tmp_path, [str(output), *command, "--merge", str(make("llama", 2))]) == 2
    assert used(tmp_path)[0] == "True"
    assert "model.norm.weight contains NaN or infinity" in (tmp_path / "told").read_text()
    assert not output.parent.exists()


def test_a_refusal_ends_it(make: Make, tmp_path: Path, output: Path) -> None:
    tensors = stored(make("llama", 1))
    del tensors["model.norm.weight"]
    models = [rewrite(make("llama", 1), tmp_path / name, tensors) for name in ("a", "b")]
    command = ["--method", "linear", "--weight", "1"]
    command += [word for model in models for word in ("--merge", str(model))]
    assert run(tmp_path, [str(output), *command], never_done) == 2
    assert "misses model.norm.weight" in (tmp_path / "told").read_text()
    assert not output.parent.exists()
    assert _is_gone(tmp_path)


def _is_gone(folder: Path) -> bool:
    """Whether the process that computes is gone, perhaps after a moment."""
    number = int((folder / "pid").read_text())
    for _ in range(100):
        try:
            if "\nState:\tZ" in Path(f"/proc/{number}/status").read_text():
                return True  # and only its new parent has not noticed
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_signal_during_the_fork_is_heard(inputs: list[str], tmp_path: Path, output: Path) -> None:
    assert run(tmp_path, ties_command(output, inputs), signalled) == 128 + signal.SIGTERM
    assert "interrupted, nothing was left behind" in (tmp_path / "told").read_text()
    assert not output.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both_processes(
    number: signal.Signals, inputs: list[str], tmp_path: Path, output: Path
) -> None:
    command = ties_command(output, inputs)
    process = PROCESSES.Process(target=script, args=(tmp_path, command, never_done))
    process.start()
    while not ((tmp_path / "begun").exists() and (tmp_path / "pid").exists()):
        assert process.exitcode is None
        time.sleep(0.02)
    os.kill(process.pid or 0, number)
    process.join()
    killed = number == signal.SIGKILL
    assert process.exitcode == (-number if killed else 128 + number)
    assert _is_gone(tmp_path)
    assert visible(output.parent) == [".model.partial"] * killed
    assert run(tmp_path, command) == 0
    assert used(tmp_path) == (str(not killed), str(not killed))  # what is left is told of in turn


def test_plans_are_the_same_only_if_all_of_it_is(make: Make, tmp_path: Path) -> None:
    file = rewrite(make("llama", 1), tmp_path / "m", stored(make("llama", 1))) / "model.safetensors"

    def fingerprint(shard: str = "one", **changes: Any) -> bytes:
        norm, head = (read_file("", file)[name] for name in ("model.norm.weight", "lm_head.weight"))
        given: dict[str, Any] = {"sources": (norm, head), "shape": (32,), "dtype": torch.float16}
        given |= {"method": TIES, "arguments": {"weights": [0.1 + 0.2, 1]}}
        for name, change in changes.items():
            given[name] = change(given[name]) if callable(change) else change
        return _fingerprint({"a": PlannedTensor(**given)}, {shard: ["a"]})

    same = fingerprint()
    assert fingerprint() == same
    others = [
        fingerprint("two"),
        fingerprint(shape=(16, 2)),
        fingerprint(dtype=torch.bfloat16),
        fingerprint(method=None),
        fingerprint(method=LINEAR),
        fingerprint(has_base=True),
        fingerprint(arguments={"weights": [0.3, 1]}),
        fingerprint(sources=lambda sources: sources[::-1]),
        fingerprint(sources=lambda sources: sources[:1]),
        fingerprint(sources=lambda found: (found[0], replace(found[1], dtype=torch.uint8))),
    ]
    before = file.stat()
    file.rename(tmp_path / "old")
    shutil.copyfile(tmp_path / "old", file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    others.append(fingerprint())
    os.utime(file, ns=(1, 1))
    assert len({same, *others, fingerprint()}) == len(others) + 2
