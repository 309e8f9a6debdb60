"""Computing and writing: the bytes, the files beside them, what is refused on the way."""

import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Make, contents, linear, loads_clean, rewrite, stack_file, stored
from safetensors.torch import save_file
from tqdm import tqdm

import bakllama
import main
import merge_methods
from merging.arithmetic import memory
from merging.arithmetic.memory import empty_result, release
from merging.models.tensors import LazyTensor, WatchedFile
from merging.models.weight_files import read_file
from merging.plans.plan import Plan, PlannedTensor
from merging.recipes.declarations import Method
from merging.recipes.methods import LINEAR, TIES
from merging.runs import computing, shards, writing
from merging.runs.direct import BUFFER, DirectFile

# -------------------------------------------------------------------- bytes


def test_files_are_those_that_safetensors_writes(make: Make, tmp_path: Path, output: Path) -> None:
    """Byte for byte, with several dtypes, odd names, an empty tensor and a scalar."""
    router = "model.layers.0.mlp.gate.weight"
    tensors = stored(make("qwen3-moe", 1))
    tensors[router] = tensors[router].float()
    mixed = rewrite(make("qwen3-moe", 1), tmp_path / "mixed", tensors)
    assert linear(output, mixed) == 0
    expected = tmp_path / "expected.safetensors"
    save_file(tensors, expected, metadata={"format": "pt"})
    assert (output / "model.safetensors").read_bytes() == expected.read_bytes()


def test_the_writer_agrees_with_safetensors_on_odd_tensors(tmp_path: Path) -> None:
    tensors = {
        'é "quoted"': torch.ones(3, 0),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "a": torch.arange(7, dtype=torch.int64),
        "b": torch.tensor([True, False, True]),
        "c": torch.arange(5).to(torch.float16),
        "d": torch.arange(9, dtype=torch.uint8),
    }
    planned = {n: PlannedTensor((), tuple(t.shape), t.dtype) for n, t in tensors.items()}
    (order,) = shards.shards_of(planned, "5GB").values()
    with tqdm(disable=True) as bar:
        values = iter([tensors[name] for name in order])
        shards.write_shard(tmp_path / "ours", order, planned, values, bar)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    starts = {name: t.start for name, t in read_file("", tmp_path / "theirs.safetensors").items()}
    assert shards.places_in(order, planned) == starts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [LINEAR, TIES])
@pytest.mark.parametrize("place", [0, 1234, 4096 * 7 + 8, 99_999])
def test_results_lie_in_memory_as_in_the_file(
    place: int, method: Method, dtype: torch.dtype
) -> None:
    given = [torch.randn(301, 1000, dtype=dtype) for _ in range(3)]
    sources = tuple(LazyTensor("", (301, 1000), dtype, lambda t=t: t) for t in given)
    arguments = {"weights": [0.5, 0.5, 0.5]}
    if method is TIES:
        arguments = {"weights": [0.5, 0.5], "densities": [0.5, 0.5]}
    planned = PlannedTensor(sources, (301, 1000), dtype, method, arguments, method is TIES)
    anywhere = computing.compute("x", planned, torch.device("cpu"))
    placed = computing.compute("x", planned, torch.device("cpu"), places={"x": place})
    assert torch.equal(placed, anywhere)
    if place % dtype.itemsize == 0:
        assert (placed.data_ptr() - place) % mmap.PAGESIZE == 0
    release(placed)
    assert empty_result(301_000, dtype, torch.device("cpu")).storage_offset() == 0


def test_memory_of_the_largest_results_that_are_kept_is_used_again() -> None:
    with memory.placed(8):
        first = empty_result(1 << 26, torch.bfloat16, torch.device("cpu"))
        address = first.data_ptr()
        release(first)
        assert empty_result(1 << 26, torch.bfloat16, torch.device("cpu")).data_ptr() == address
    memory._unused.clear()


@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_threads_do_not_change_a_byte(
    threads: str, make: Make, tmp_path: Path, output: Path
) -> None:
    base = str(make("mixtral", 0))
    options = ("--method", "ties", "--base-model", base, "--density", "0.4", "--no-model-card")
    assert (
        linear(tmp_path / "default", make("mixtral", 1), make("mixtral", 2), options=options) == 0
    )
    options = (*options, "--threads", threads)
    assert linear(output, make("mixtral", 1), make("mixtral", 2), options=options) == 0
    assert contents(output) == contents(tmp_path / "default")


def test_same_inputs_same_bytes(make: Make, tmp_path: Path) -> None:
    base, a, b = (str(make("qwen3-moe", seed)) for seed in range(3))
    arguments = ["--base-model", base, "--merge", a, "--merge", b, "--max-shard-size", "40KB"]
    arguments += ["--no-model-card"]  # it names the output
    assert main.main([str(tmp_path / "one"), *arguments]) == 0
    assert main.main([str(tmp_path / "two"), *arguments]) == 0
    assert len(contents(tmp_path / "one")) > 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("fits", [True, False])
def test_inputs_larger_than_memory_are_not_kept_there(
    fits: bool, make: Make, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used once more is; and others may have use for what fits."""
    loaded: list[int] = []
    ends: list[Callable[[], bool]] = []
    dropped: list[int] = []
    model = make("llama", 1)
    tensors = read_file("", model / "model.safetensors")
    first, second, third = (
        [tensor for name, tensor in tensors.items() if f".layers.{number}." in name]
        for number in range(3)
    )
    around = [tensor for name, tensor in tensors.items() if ".layers." not in name]
    once = [*around, *first, *third]
    nbytes = sum(tensor.nbytes for tensor in [*once, *second])

    def load(file: WatchedFile, start: int, size: int, is_over: Callable[[], bool]) -> None:
        ends.append(is_over)
        loaded.append(start)

    def drop(file: WatchedFile, start: int, size: int) -> None:
        dropped.append(start)

    class Patient(ThreadPoolExecutor):
        """Does all that it was asked for, also what comes too late."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=True)

    monkeypatch.setattr(computing, "ThreadPoolExecutor", Patient)
    monkeypatch.setattr("merging.models.tensors.CAN_LOAD", True)
    monkeypatch.setattr(WatchedFile, "load", load)
    monkeypatch.setattr(WatchedFile, "drop", drop)
    monkeypatch.setattr(computing, "available_memory", lambda: nbytes - (not fits))
    text = "".join(
        f"  - model: {model}\n    start: {start}\n    end: {start + 2}\n" for start in (0, 1)
    )
    assert bakllama.main([stack_file(tmp_path, f"layer_slices:\n{text}"), str(output)]) == 0
    assert sorted(loaded) == sorted(_starts([*once, *second, *second]))
    assert all(is_over() for is_over in ends)
    once.remove(tensors["model.norm.weight"])  # the last one written, after which all ends
    assert sorted(dropped) == ([] if fits else sorted(_starts(once)))


def _starts(tensors: list[LazyTensor]) -> list[int]:
    return [tensor.start for tensor in tensors if tensor.start is not None]


def test_memory_is_that_of_the_machine_or_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, expected in {
        "max\n": whole,
        "5000000\n": 5_000_000,
        f"{whole * 2}\n": whole,
    }.items():
        monkeypatch.setattr(computing, "_limit", {"memory.max": limit}.get)
        assert computing.available_memory() == expected


def test_shards_hold_the_same_tensors(make: Make, tmp_path: Path) -> None:
    a, b = str(make("llama", 1)), str(make("llama", 2))
    arguments = ["--method", "linear", "--weight", "1", "--merge", a, "--merge", b]
    assert main.main([str(tmp_path / "one"), *arguments]) == 0
    assert main.main([str(tmp_path / "many"), *arguments, "--max-shard-size", "20KB"]) == 0
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    loads_clean(tmp_path / "many")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 22, (1 << 22) + 5, 9_999_999])
@pytest.mark.parametrize("support", ["full", "not opened", "not written"])
def test_direct_files_hold_what_was_written(
    support: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    content = (torch.arange(size) % 251).to(torch.uint8).numpy().tobytes()
    direct_flag = getattr(os, "O_DIRECT", 0)
    opened, written = os.open, os.write
    refusals = []

    def refuse_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & direct_flag:
            refusals.append("open")
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    def refuse_write(descriptor: int, data: memoryview) -> int:
        if not refusals and len(data) % 4096 == 0:
            refusals.append("write")
            raise OSError(22, "Invalid argument")
        return written(descriptor, data[: max(1, len(data) // 3)])  # and in pieces

    if support == "not opened":
        monkeypatch.setattr(os, "open", refuse_open)
    if support == "not written" and direct_flag:
        monkeypatch.setattr(os, "write", refuse_write)
    file = DirectFile(tmp_path / "file")
    for start in range(0, size, 1_000_003):
        file.write(content[start : start + 1_000_003])
    file.close()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("before", [0, 8, 4096, 5001, BUFFER - 8, BUFFER + 24])
@pytest.mark.parametrize("size", [BUFFER - 1, BUFFER, 9_999_999])
@pytest.mark.parametrize("off", [0, 1])
def test_what_lies_in_memory_as_in_the_file_is_written_from_there(
    before: int, size: int, off: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    append = DirectFile._append

    def copy(file: DirectFile, rest: Any) -> None:
        copied.append(len(rest))
        append(file, rest)

    memory = np.frombuffer(mmap.mmap(-1, size + 8192), np.uint8)
    place = before % 4096 + off
    memory[:] = np.arange(len(memory)) % 251
    content = memory[place : place + size]
    file = DirectFile(tmp_path / "file")
    is_direct = file._direct
    file.write(memory[:before] if before < size else np.resize(memory, before))
    monkeypatch.setattr(DirectFile, "_append", copy)
    file.write(content)
    assert file._direct == is_direct  # no unaligned write was tried
    file.write(b"end")
    file.close()
    written = (tmp_path / "file").read_bytes()
    assert written[before:] == content.tobytes() + b"end"
    assert written[:before] == np.resize(memory, before).tobytes()
    if is_direct:
        well = off == 0 and size >= BUFFER
        assert sum(copied) < 3 + 2 * 4096 if well else sum(copied) == size + 3


@pytest.mark.parametrize("written", [1 << 22, (1 << 22) + 1, 9_999_999])
def test_a_direct_file_that_cannot_be_written_is_named(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of bytes that are written while others are collected."""

    def fail(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    file = DirectFile(tmp_path / "file")
    with pytest.raises(OSError, match="No space left on device.*file"):
        with closing(file):
            file.write(bytes(written))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file._descriptor)


# -------------------------------------------------------------------- files


def test_other_files_are_copied_byte_for_byte(make: Make, tmp_path: Path, output: Path) -> None:
    donor = tmp_path / "donor"
    shutil.copytree(make("llama", 1), donor)
    kept = {
        "tokenizer.json": b'{"model": {"type": "WordLevel",  "vocab": {"<unk>":0}, "unk_token":'
        b' "<unk>"} }\r\n',
        "tokenizer.model": bytes(range(256)),
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        "preprocessor_config.json": b"{ }",
        "generation_config.json": b'{"temperature":0.123, "do_sample": true}',
        "modeling_own.py": b"# code\n",
        "configuration_own.py": b"# settings\n",
        "processor_config.json": b"{ }",
        "LICENSE": b"licence",
        "NOTICE.md": b"notice",
    }
    dropped = {
        "README.md": b"the donor's card",
        "optimizer.pt": b"x",
        "training_args.bin": b"x",
        "trainer_state.json": b"{}",
        "model.gguf": b"x",
        ".gitattributes": b"x",
        "checkpoint-500/config.json": b"{}",
        "original/params.json": b"{}",
        "pytorch_model.bin.index.json": b"{}",
        "all_results.json": b"{}",
        "trainer_log.jsonl": b"{}",
        "training_args.json": b"{}",
        "runs/events.out.tfevents": b"x",
        "runs/config.json": b"{}",
        "notes.txt": b"mine",
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"x",
    }
    for name, content in (kept | dropped).items():
        (donor / name).parent.mkdir(exist_ok=True)
        (donor / name).write_bytes(content)
    assert linear(output, donor, make("llama", 2)) == 0
    found = contents(output)
    for name, content in kept.items():
        assert found[name] == content
    written = {"config.json", "model.safetensors", "tokenizer_config.json", "README.md"}
    assert found.keys() == kept.keys() | written
    assert dropped["README.md"] not in found["README.md"]

    without = ("--no-copy-tokenizer", "--overwrite")
    assert linear(output, donor, make("llama", 2), options=without) == 0
    gone = {"tokenizer.json", "tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"}
    gone |= {"chat_template.jinja", "additional_chat_templates/tool.jinja"}
    assert contents(output).keys() == found.keys() - gone


def test_written_files_have_the_usual_permissions(make: Make, output: Path) -> None:
    assert linear(output, make("llama", 1)) == 0
    probe = output.parent.parent / "probe"
    probe.touch()
    assert {f.stat().st_mode for f in output.iterdir()} == {probe.stat().st_mode}


@pytest.mark.parametrize("damage", ["drop", "shape", "config"])
def test_an_output_that_differs_from_its_plan_is_not_kept(
    damage: str, make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = writing.verify

    def damaged(folder: Path, plan: Plan) -> None:
        tensors = stored(folder)
        if damage == "drop":
            del tensors["model.norm.weight"]
        elif damage == "shape":
            tensors["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        verify(folder, plan)

    monkeypatch.setattr(writing, "verify", damaged)
    expected = {
        "drop": "the output differs from the plan in model.norm.weight",
        "shape": "the output differs from the plan in model.norm.weight",
        "config": "misses model.layers.6",
    }
    with pytest.raises(AssertionError, match=expected[damage]):  # a defect: the plan was tried
        linear(output, make("llama", 1))
    assert not output.parent.exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_output_that_the_disk_has_not_kept_is_an_error_of_the_disk(
    damage: str,
    make: Make,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verify = writing.verify

    def damaged(folder: Path, plan: Plan) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.unlink()
        if damage == "cut":
            file.write_bytes(content[:1000])
        verify(folder, plan)

    monkeypatch.setattr(writing, "verify", damaged)
    assert linear(output, make("llama", 1)) == 2
    expected = {"cut": "not a whole safetensors file", "gone": "no weights"}
    assert expected[damage] in capsys.readouterr().err
    assert not output.parent.exists()


# -------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_input_is_refused_by_name(
    value: float, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = stored(make("llama", 1))
    tensors["model.layers.3.mlp.up_proj.weight"][2, 3] = value
    bad = rewrite(make("llama", 1), tmp_path / "bad", tensors)
    assert linear(output, make("llama", 2), bad) == 2
    text = capsys.readouterr().err
    assert f"{bad}: model.layers.3.mlp.up_proj.weight contains NaN or infinity" in text
    assert not output.parent.exists()


def test_an_overflow_is_refused(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--no-normalize", "--weight", "1e6", "--dtype", "float16")
    a = str(make("llama", 1))
    assert main.main([str(output), "--method", "linear", "--merge", a, *options]) == 2
    assert "overflows float16; try another --dtype" in capsys.readouterr().err
    assert not output.parent.exists()


def test_what_does_not_fit_a_device_is_computed_there_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An accelerator's memory may hold less than the tensors of one merge."""
    tensors = [torch.ones(3), torch.full((3,), 2.0)]
    calls = []

    def combine(
        tensors: list[torch.Tensor], device: torch.device, **options: object
    ) -> torch.Tensor:
        calls.append(([t.device.type for t in tensors], device.type))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return tensors[0] + tensors[1]

    monkeypatch.setattr(merge_methods, "linear", combine)
    sources = tuple(
        LazyTensor(f"model: {i}", (3,), torch.float32, lambda tensor=tensor: tensor)
        for i, tensor in enumerate(tensors)
    )
    planned = PlannedTensor(sources, (3,), torch.float32, LINEAR, {"weights": [1.0, 1.0]})
    # The meta device stands for one with too little memory: what went there has no values.
    result = computing.compute("tensor", planned, torch.device("meta"))
    assert result.tolist() == [3.0, 3.0, 3.0]
    assert calls == [(["meta", "meta"], "meta"), (["cpu", "cpu"], "meta")]


def test_peak_memory_does_not_grow_with_the_models(make: Make, tmp_path: Path) -> None:
    """Anonymous memory, measured in processes of their own, for 2 and for 8 models of 25 MB."""
    big = make("llama", 1, hidden_size=512, intermediate_size=1024, vocab_size=2048)
    copies = [str(shutil.copytree(big, tmp_path / f"copy-{i}")) for i in range(8)]
    size = (big / "model.safetensors").stat().st_size
    assert size > 20e6
    code = (
        "import os, sys, threading, time, main\n"
        "import merging.plans.planner, merging.runs.writing, merging.runs.cards\n"
        "import transformers.models.llama.modeling_llama\n"
        "base, out, *copies = sys.argv[1:]\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        lines = open('/proc/self/status').read().splitlines()\n"
        "        anon = next(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))\n"
        "        peak = max(peak, anon); time.sleep(0.002)\n"
        "for count in (2, 8):\n"  # each from the same start, which loading the libraries makes
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0\n"
        "        continue\n"
        "    peak = 0; threading.Thread(target=watch, daemon=True).start()\n"
        "    merges = [word for copy in copies[:count] for word in ('--merge', copy)]\n"
        "    status = main.main([f'{out}-{count}', '--base-model', base, *merges])\n"
        "    print(peak, flush=True); os._exit(status)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(big), str(tmp_path / "out"), *copies],
        cwd=Path(main.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    few, many = (1024 * int(line) for line in done.stdout.split() if line.isdigit())
    assert many - few < 2 * size  # of six models more; chunks of them take some
