"""What a run tells the user, and its exit status."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Make, fails, linear, stack_file, stored

import main
import merge_methods
from merging.runs.console import run


def test_resolved_table_is_printed(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b = (str(make("llama", seed)) for seed in range(3))
    arguments = [str(output), "--base-model", base, "--merge", a, "--merge", b, "--weight", "0.7"]
    assert main.main(arguments) == 0
    text = capsys.readouterr().err
    assert re.search(rf"^{re.escape(base)} +base$", text, re.MULTILINE)
    assert re.search(rf"^{re.escape(b)} +0\.7 +0\.33$", text, re.MULTILINE)
    parameters = sum(t.numel() for t in stored(output).values())
    assert re.search(
        rf"{parameters:,} parameters in 1 shard, [\d.]+ s, peak memory [\d.]+ GB$", text.strip()
    )
    assert main.main([*arguments, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_output_path_alone_is_on_stdout(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(output), "--base-model", str(make("llama")), "--merge", str(make("llama", 1))]
    assert main.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
    for options in ([], ["--quiet", "--overwrite"], ["--verbose", "--overwrite"]):
        assert main.main([*arguments, *options]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{output}\n"
        assert (
            "model.norm.weight [32] bfloat16: ties(weights=[1], densities=[0.33], " in (printed.err)
        ) == ("--verbose" in options)
        assert bool(printed.err) == ("--quiet" not in options)
    assert main.main(arguments) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", ["0", "4097", "two", "1.5", "", "-1", "9" * 5000])
def test_a_bad_number_of_threads(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["out", "--threads=" + given])
    expected = f"--threads: expected a whole number from 1 to 4096, got {given!r}\n"
    assert capsys.readouterr().err.endswith(expected)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert "0.1.0 (torch 2.13.0" in capsys.readouterr().out


def test_a_model_whose_path_nobody_reads_is_a_success(make: Make, tmp_path: Path) -> None:
    command = [sys.executable, main.__file__, tmp_path / "out", "--base-model", make("llama")]
    command += ["--merge", make("llama", 1), "--quiet"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert stored(tmp_path / "out")


def test_who_watches_a_script_sees_its_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cProfile", "-o", tmp_path / "profile", main.__file__]
    command += [tmp_path / "out", "--merge", tmp_path / "none", "--weight", "1"]
    done = subprocess.run([*command, "--method", "linear"], stderr=subprocess.PIPE, text=True)
    assert "there is none" in done.stderr
    assert (tmp_path / "profile").stat().st_size > 1000


def raising(error: Exception) -> Callable[[object], None]:
    def work(argv: object) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4000000000000000 bytes. Error code 12"
        ),
        RuntimeError("unable to mmap 5000000 bytes from file </x>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("CUDA error: no room"),
    ],
    ids=str,
)
def test_too_little_memory_is_an_error_of_the_user(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), []) == 2
    assert capsys.readouterr().err == f"error: out of memory: {error}\n"


def test_the_allocators_of_this_torch_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda argv: torch.empty(10**15) and None, []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_no_cuda_is_a_clear_error(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    text = fails(capsys, output, "--cuda", "--base-model", make("llama"), "--merge", make("llama"))
    assert "no CUDA device" in text
    assert not output.exists()


# -------------------------------------------------------------------- defects and dependencies


def test_a_defect_shows_its_traceback(
    make: Make,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only what a user can mend is a message with exit status 2."""

    def defect(*tensors: object, **options: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(merge_methods, "linear", defect)
    with pytest.raises(ValueError, match="a defect"):
        linear(output, make("llama", 1))
    printed = capsys.readouterr()
    assert "error:" not in printed.err and printed.out == ""
    assert not output.parent.exists()


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'x' from 'merging.plans'", name="merging.plans"),
        ImportError("cannot import name 'x' from 'merge_methods'", name="merge_methods"),
        ImportError("cannot import name 'x' from 'json'", name="json"),
        RuntimeError("the schedule cannot allocate memory cells"),
        ValueError("a vocabulary out of memory"),
    ],
    ids=str,
)
def test_what_only_sounds_mendable_shows_its_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error), match=str(error)):
        run(raising(error), [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'x' from 'torch'", name="torch.nn"),
        ImportError("LlamaTokenizer requires the protobuf library"),
    ],
    ids=str,
)
def test_other_peoples_modules_can_be_installed(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), []) == 2
    assert capsys.readouterr().err.endswith("pip install -r requirements.txt\n")


@pytest.mark.parametrize("missing", ["torch", "transformers", "safetensors", "yaml"])
def test_a_missing_dependency_says_which_line_mends_it(
    missing: str, make: Make, output: Path, tmp_path: Path
) -> None:
    a = make("llama", 1)
    call = f"main.main([{str(output)!r}, '--base-model', {str(a)!r}, '--merge', {str(a)!r}])"
    if missing == "yaml":
        text = f"layer_slices: [{{model: {a}, start: 0, end: 1}}]"
        call = f"bakllama.main([{stack_file(tmp_path, text)!r}, {str(output)!r}])"
    code = f"import sys\nsys.modules[{missing!r}] = None\nimport bakllama, main\nsys.exit({call})"
    command = [sys.executable, "-c", code]
    root = Path(main.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("pip install -r requirements.txt")
    assert not output.parent.exists()
