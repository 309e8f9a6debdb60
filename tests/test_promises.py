"""What is promised when things go wrong: kills, full disks, two runs at once, no network."""

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Make, contents, loads_clean, stored

import bakllama
import cli
import main
import saving
import staging

if sys.platform == "win32":
    pytest.skip("needs POSIX signals and limits", allow_module_level=True)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["main", "saving", "merge_methods", "transformers.models"])


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and modification times of all files below a folder."""
    return {
        name: (content, (folder / name).stat().st_mtime_ns)
        for name, content in contents(folder).items()
    }


@pytest.fixture
def inputs(make: Make, tmp_path: Path) -> Iterator[list[str]]:
    """Give copies of a base and two models, and check that nothing touches them."""
    names = ["base", "a", "b"]
    folder = tmp_path / "inputs"
    for seed, name in enumerate(names):
        shutil.copytree(make("mixtral", seed), folder / name)
    before = state(folder)
    yield [str(folder / name) for name in names]
    assert state(folder) == before


def ties(output: Path, inputs: list[str], *options: str) -> list[str]:
    base, a, b = inputs
    merges = ["--merge", a, "--merge", b, "--density", "0.5", "--max-shard-size", "100KB"]
    return [str(output), "--base-model", base, *merges, "--quiet", "--no-model-card", *options]


def call(arguments: list[str], limit: int | None = None) -> None:
    """Run main.py in a process of its own, perhaps with a limit on the size of files."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    sys.exit(main.main(arguments))


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -------------------------------------------------------------------- interruptions


MOMENTS = [  # where to stop: the function of a module, and after how many calls of it
    (saving, "_make", 0),
    (saving, "_make", 40),
    (saving, "_make", 80),
    (saving.DirectFile, "write", 0),
    (saving.DirectFile, "write", 99),
    (saving.DirectFile, "close", 1),
    (shutil, "copyfile", 0),
    (saving, "_verify", 0),
    (staging, "_sync", 0),
    (staging, "_sync_one", 3),
]


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
    """At ten moments: nothing or the old output, and a plain rerun gives the same bytes."""
    assert main.main(ties(tmp_path / "expected", inputs)) == 0
    output = tmp_path / "out" / "model"
    old: dict[str, bytes] = {}
    if overwrite:
        assert main.main([str(output), "--base-model", inputs[0], "--merge", inputs[1]]) == 0
        old = contents(output)
    arguments = ties(output, inputs, *["--overwrite"] * overwrite)
    for moment in range(len(MOMENTS)):
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

    monkeypatch.setattr(saving, "_verify", interrupt)
    handler = signal.getsignal(number)
    assert main.main(ties(output, inputs)) == 128 + number
    assert signal.getsignal(number) is handler
    assert capfd.readouterr().err == "interrupted, nothing was left behind\n"
    assert not output.parent.exists()


# -------------------------------------------------------------------- write errors


@pytest.mark.parametrize("limit", [2_000, 50_000, 120_000])
def test_a_limit_on_file_size(
    limit: int, inputs: list[str], output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = PROCESSES.Process(target=call, args=(ties(output, inputs), limit))
    process.start()
    process.join()
    if limit == 120_000:  # more than the largest file
        assert process.exitcode == 0
    else:
        assert process.exitcode == 2
        assert not output.parent.exists()
    assert main.main(ties(output, inputs, "--overwrite")) == 0
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
        assert main.main(ties(output, inputs)) == 2
    assert capsys.readouterr().err == "error: some/file: No space left on device\n"
    assert not output.parent.exists()


def test_too_little_disk_is_known_before_writing(
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(output.parent.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main.main(ties(output, inputs, "--dry-run")) == 2
    assert "GB of disk" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # root may write anywhere, but not to /proc
        closed = Path("/proc")
    assert main.main(ties(closed / "out", inputs)) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {closed}") and text.count("\n") == 1


def test_read_only_inputs(inputs: list[str], output: Path, tmp_path: Path) -> None:
    folders = [Path(name) for name in inputs]
    for folder in folders:
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
    assert main.main(ties(output, inputs)) == 0
    config = tmp_path / "stack.yml"
    config.write_text(f"layer_slices: [{{model: {inputs[0]}, start: 0, end: 2}}]")
    assert bakllama.main([str(config), str(output), "--overwrite"]) == 0
    for folder in folders:
        folder.chmod(0o755)


# -------------------------------------------------------------------- several runs


def test_leftovers_of_a_killed_run_are_removed(inputs: list[str], output: Path) -> None:
    left = output.parent / ".model.partial" / "deeper"
    left.mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (left.parent / "stale.json").write_bytes(b"{}")
    assert main.main(ties(output, inputs)) == 0
    assert "stale.json" not in contents(output)
    loads_clean(output)


def test_a_second_run_for_the_same_output_is_refused(
    inputs: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staging.staged(output) as folder:
        (folder / "precious").write_text("being written")
        assert main.main(ties(output, inputs)) == 2
        assert "another run is writing this output" in capsys.readouterr().err
        assert (folder / "precious").exists()
    assert contents(output) == {"precious": b"being written"}


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_swaps_whole_directories(
    exchange: bool, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    for content in ("one", "two"):
        with staging.staged(output, overwrite=True) as folder:
            (folder / content).write_text(content)
            assert not (output / content).exists()
        assert contents(output) == {content: content.encode()}


def test_an_old_output_is_restored_after_a_kill_between_two_renames(output: Path) -> None:
    replaced = output.parent / ".model.replaced"
    replaced.mkdir(parents=True)
    (replaced / "old").write_text("whole")
    with pytest.raises(KeyError), staging.staged(output, overwrite=True):
        raise KeyError
    assert contents(output) == {"old": b"whole"}


def test_an_output_may_be_a_link(inputs: list[str], output: Path, tmp_path: Path) -> None:
    output.parent.mkdir()
    link, target = tmp_path / "link", output
    target.mkdir()
    link.symlink_to(target)
    assert main.main(ties(link, inputs)) == 0
    assert link.is_symlink()
    loads_clean(target)


@pytest.mark.parametrize("step", ["_put", "rmtree"])
def test_a_signal_during_the_swap_does_not_stop_it(
    step: str, inputs: list[str], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.main(ties(output, inputs)) == 0
    where = staging if step == "_put" else shutil
    original = getattr(where, step)

    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        original(*arguments, **options)

    monkeypatch.setattr(where, step, interrupted)
    base, a, _ = inputs
    arguments = [str(output), "--base-model", base, "--merge", a, "--overwrite", "--quiet"]
    assert main.main(arguments) == 0
    monkeypatch.undo()
    assert visible(output.parent) == ["model"]
    assert len(list(output.glob("*.safetensors"))) == 1


def test_a_planted_link_is_not_followed(
    inputs: list[str], output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    (precious / "file").write_text("precious")
    output.parent.mkdir()
    link = output.parent / ".model.partial"
    link.symlink_to(precious)
    assert main.main(ties(output, inputs)) == 2
    assert ".model.partial" in capsys.readouterr().err
    assert contents(precious) == {"file": b"precious"}
    link.unlink()
    inner = output.parent / ".model.partial"
    inner.mkdir()
    (inner / "link").symlink_to(precious)
    assert main.main(ties(output, inputs)) == 0
    assert contents(precious) == {"file": b"precious"}


def test_outputs_that_inputs_need_are_refused(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b = inputs
    sibling = tmp_path / ".out.partial"
    shutil.copytree(a, sibling)
    assert main.main(ties(tmp_path / "out", [base, str(sibling), b])) == 2
    assert "the output is, contains or lies in the input" in capsys.readouterr().err
    assert contents(sibling) == contents(Path(a))

    shutil.copytree(a, tmp_path / "store")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "store").iterdir():
        (linked / file.name).symlink_to(file)
    arguments = ties(tmp_path / "store", [base, str(linked), b], "--overwrite")
    assert main.main(arguments) == 2
    assert "holds files that" in capsys.readouterr().err

    config = tmp_path / "store" / "stack.yml"
    config.write_text(f"layer_slices: [{{model: {base}, start: 0, end: 1}}]")
    assert bakllama.main([str(config), str(tmp_path / "store"), "--overwrite"]) == 2
    assert config.exists()


@pytest.mark.parametrize("name", [".git/HEAD", "thesis.txt"])
def test_folders_that_are_more_than_a_model_are_not_overwritten(
    name: str, inputs: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.startswith(".git"):
        shutil.copytree(inputs[0], output)
    else:
        output.mkdir(parents=True)
        (output / "config.json").write_text("{}")
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    assert main.main(ties(output, inputs, "--overwrite")) == 2
    assert "not a model" in capsys.readouterr().err
    assert (output / name).read_text() == "mine"


# -------------------------------------------------------------------- dry run


def test_a_dry_run_prints_the_plan(
    inputs: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(ties(output, inputs)) == 0
    tensors, shards = stored(output), len(list(output.glob("*.safetensors")))
    size = sum(tensor.nbytes for tensor in tensors.values())
    shutil.rmtree(output)
    capsys.readouterr()
    assert main.main(ties(output, inputs, "--dry-run")) == 0
    text = capsys.readouterr().err
    for part in (
        "method: ties, normalized",
        f"{inputs[1]}",
        f"donor: {inputs[0]}, MixtralForCausalLM",
        f"tensors: {len(tensors)} merged",
        f"dtype: bfloat16 ({len(tensors)})",
        "ignored: none",
        f"reads {3 * size / 1e6:.2f} MB, writes {size / 1e6:.2f} MB in {shards} shards",
        "of memory",
    ):
        assert part in text
    assert not output.exists()


# -------------------------------------------------------------------- warnings


def test_other_meanings_of_the_same_tensors_are_warned_about(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("llama", 0)
    other = make(
        "llama", 1, rms_norm_eps=1e-5, num_attention_heads=8, num_key_value_heads=4, head_dim=4
    )
    assert main.main([str(output), "--base-model", str(base), "--merge", str(other)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "; the output has" in line]
    assert len(lines) == 4
    assert f"{other}: rms_norm_eps is 1e-05, in {base} it is 1e-06" in lines[0] + lines[1]
    assert any("num_attention_heads is 8" in line for line in lines)


# -------------------------------------------------------------------- no network


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)


def test_local_inputs_open_no_socket(inputs: list[str], output: Path, no_sockets: None) -> None:
    assert main.main(ties(output, inputs)) == 0


def cached(cache: Path, repo: str, commit: str, source: Path, revision: str = "main") -> None:
    """Lay a model out as huggingface_hub caches it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    for file in source.iterdir():
        blob = folder / "blobs" / f"{commit[:8]}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def test_cached_hub_models_work_offline(
    make: Make,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_sockets: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    cached(cache, "org/model", "a" * 40, make("llama", 1))
    cached(cache, "org/model", "b" * 40, make("llama", 2), revision="v2")
    sharded = tmp_path / "sharded"
    arguments = ["--method", "linear", "--weight", "1", "--merge", str(make("llama", 3))]
    assert main.main([str(sharded), *arguments, "--max-shard-size", "20KB"]) == 0
    cached(cache, "org/sharded", "c" * 40, sharded)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    models = ["org/model", "org/model@v2", f"org/model@{'b' * 40}", "org/sharded"]
    arguments = ["--method", "linear", "--cache-dir", str(cache), "--overwrite", "--weight", "1"]
    for model, seed in zip(models, (1, 2, 2, 3), strict=True):
        assert main.main([str(output), *arguments, "--merge", model]) == 0
        expected = stored(make("llama", seed))
        assert all(torch.equal(t, expected[n]) for n, t in stored(output).items())
    capsys.readouterr()
    assert main.main([str(output), *arguments, "--merge", "org/model@v3"]) == 2
    assert "in the cache (HF_HUB_OFFLINE is set)" in capsys.readouterr().err
    assert main.main([str(output), *arguments, "--merge", "./model"]) == 2
    assert "looked for a local directory, there is none" in capsys.readouterr().err


def test_sizes_are_compared_before_weights_are_downloaded(
    make: Make, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the configs are in the cache: the weights cannot be what the message is about."""
    cache = tmp_path / "cache"
    for repo, source in (("org/a", make("llama")), ("org/b", make("llama", hidden_size=64))):
        bare = tmp_path / repo
        bare.mkdir(parents=True)
        shutil.copyfile(source / "config.json", bare / "config.json")
        cached(cache, repo, "d" * 40, bare)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [str(output), "--base-model", "org/a", "--cache-dir", str(cache)]
    with pytest.MonkeyPatch.context() as patch:
        messages: list[str] = []
        patch.setattr("builtins.print", lambda *text, **options: messages.append(str(text)))
        assert main.main([*arguments, "--merge", "org/b"]) == 2
        assert "hidden_size is 64" in messages[-1]
        assert main.main([*arguments, "--merge", "org/a"]) == 2
        assert "no weights" in messages[-1]


# -------------------------------------------------------------------- remote code


def test_remote_code_runs_only_when_trusted(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(make("llama", 1), own)
    config = json.loads((own / "config.json").read_text())
    config |= {
        "model_type": "own-llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    arguments = [str(output), "--method", "linear", "--weight", "1", "--merge", str(own)]
    assert main.main(arguments) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main.main([*arguments, "--trust-remote-code"]) == 0
    written = json.loads((output / "config.json").read_text())
    assert written["auto_map"] == config["auto_map"]
    assert written["architectures"] == ["OwnForCausalLM"]
    assert (output / "modeling_own.py").read_bytes() == (own / "modeling_own.py").read_bytes()
    expected = stored(own)
    assert all(torch.equal(t, expected[n]) for n, t in stored(output).items())


def test_what_does_not_fit_a_device_is_computed_there_in_chunks() -> None:
    """An accelerator's memory may hold less than the tensors of one merge."""
    tensors = [torch.ones(3), torch.full((3,), 2.0)]
    calls = []

    def combine(moved: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        calls.append(([t.device.type for t in moved], device.type))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return moved[0] + moved[1]

    recipe = saving.Recipe("merged", (), (3,), torch.float32, combine)
    # The meta device stands for one with too little memory: what went there has no values.
    result = saving._combine(recipe, tensors, torch.device("meta"))
    assert result.tolist() == [3.0, 3.0, 3.0]
    assert calls == [(["meta", "meta"], "meta"), (["cpu", "cpu"], "meta")]


def test_a_device_without_memory_is_an_error_of_the_user(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(argv: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert cli.run(work, []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: CUDA out of memory")
