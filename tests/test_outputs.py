"""Where an output may be written, and what is replaced there."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest
from helpers import Make, contents, linear, loads_clean, ties_command

import bakllama
import main
from merging.runs.staging import staged


def test_overwrite_replaces_the_whole_model_and_nothing_else(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linear(output, make("llama", 1), options=("--max-shard-size", "20KB")) == 0
    before = contents(output)
    assert linear(output, make("llama", 2)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(output) == before
    assert linear(output, make("llama", 2), options=("--overwrite",)) == 0
    assert len(list(output.glob("*.safetensors*"))) == 1
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert linear(other, make("llama", 2), options=("--overwrite",)) == 2
    assert "not a model" in capsys.readouterr().err
    assert contents(other) == {"thesis.txt": b"years of work"}


def test_outputs_that_touch_an_input_are_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "parent" / "model"
    shutil.copytree(make("llama", 1), model)
    before = contents(tmp_path)
    for output in (model, model / "sub", model.parent, tmp_path / "parent" / "." / "model"):
        assert linear(output, model, options=("--overwrite",)) == 2
        assert "is, contains or lies in the input" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_leftovers_of_a_killed_run_are_removed(inputs: list[str], output: Path) -> None:
    left = output.parent / ".model.partial" / "deeper"
    left.mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (left.parent / "stale.json").write_bytes(b"{}")
    assert main.main(ties_command(output, inputs)) == 0
    assert "stale.json" not in contents(output)
    loads_clean(output)


def test_a_second_run_for_the_same_output_is_refused(
    inputs: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staged(output) as folder:
        (folder / "precious").write_text("being written")
        assert main.main(ties_command(output, inputs)) == 2
        assert "another run is writing this output" in capsys.readouterr().err
        assert (folder / "precious").exists()
    assert contents(output) == {"precious": b"being written"}


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_swaps_whole_directories(
    exchange: bool, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # as where the C library has no renameat2
        monkeypatch.setattr(ctypes, "CDLL", lambda *name, **options: object())
    for content in ("one", "two"):
        with staged(output, overwrite=True) as folder:
            (folder / content).write_text(content)
            assert not (output / content).exists()
        assert contents(output) == {content: content.encode()}


def test_an_old_output_is_restored_after_a_kill_between_two_renames(output: Path) -> None:
    replaced = output.parent / ".model.replaced"
    replaced.mkdir(parents=True)
    (replaced / "config.json").write_text("{}")
    (replaced / "model.safetensors").write_text("whole")
    with pytest.raises(KeyError), staged(output, overwrite=True):
        raise KeyError
    assert contents(output) == {"config.json": b"{}", "model.safetensors": b"whole"}


def test_an_output_may_be_a_link(inputs: list[str], output: Path, tmp_path: Path) -> None:
    output.parent.mkdir()
    link, target = tmp_path / "link", output
    target.mkdir()
    link.symlink_to(target)
    assert main.main(ties_command(link, inputs)) == 0
    assert link.is_symlink()
    loads_clean(target)


def test_a_planted_link_is_not_followed(
    inputs: list[str], output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    (precious / "file").write_text("precious")
    output.parent.mkdir()
    link = output.parent / ".model.partial"
    link.symlink_to(precious)
    assert main.main(ties_command(output, inputs)) == 2
    assert ".model.partial" in capsys.readouterr().err
    assert contents(precious) == {"file": b"precious"}
    link.unlink()
    inner = output.parent / ".model.partial"
    inner.mkdir()
    (inner / "link").symlink_to(precious)
    assert main.main(ties_command(output, inputs)) == 0
    assert contents(precious) == {"file": b"precious"}


def test_outputs_that_inputs_need_are_refused(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b = inputs
    sibling = tmp_path / ".out.partial"
    shutil.copytree(a, sibling)
    assert main.main(ties_command(tmp_path / "out", [base, str(sibling), b])) == 2
    assert "the output is, contains or lies in the input" in capsys.readouterr().err
    assert contents(sibling) == contents(Path(a))

    shutil.copytree(a, tmp_path / "store")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "store").iterdir():
        (linked / file.name).symlink_to(file)
    arguments = ties_command(tmp_path / "store", [base, str(linked), b], "--overwrite")
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
    assert main.main(ties_command(output, inputs, "--overwrite")) == 2
    assert "not a model" in (said := capsys.readouterr().err) or "but there is .git" in said
    assert (output / name).read_text() == "mine"


def test_too_little_disk_is_known_before_writing(
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(output.parent.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main.main(ties_command(output, inputs, "--dry-run")) == 2
    assert "GB of disk" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # root may write anywhere, but not to /proc
        closed = Path("/proc")
    assert main.main(ties_command(closed / "out", inputs)) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {closed}") and text.count("\n") == 1


def test_read_only_inputs(inputs: list[str], output: Path, tmp_path: Path) -> None:
    folders = [Path(name) for name in inputs]
    for folder in folders:
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
    assert main.main(ties_command(output, inputs)) == 0
    config = tmp_path / "stack.yml"
    config.write_text(f"layer_slices: [{{model: {inputs[0]}, start: 0, end: 2}}]")
    assert bakllama.main([str(config), str(output), "--overwrite"]) == 0
    for folder in folders:
        folder.chmod(0o755)
