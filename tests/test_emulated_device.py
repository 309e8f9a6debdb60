"""The device path, run on an emulated accelerator: results, copies, waits and memory."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulated import Record, emulated
from helpers import Make, contents
from torch import Tensor

import main
import merge_methods as methods

if torch.cuda.is_available():
    pytest.skip("a real device is there, and is tested", allow_module_level=True)

DEVICE = torch.device("cuda")
# Combine the same-named tensor of three models: on the device given, in the dtype given.
Combine = Callable[[list[Tensor], torch.device | None, torch.dtype | None], Tensor]


def combine_linear(
    tensors: list[Tensor], device: torch.device | None, dtype: torch.dtype | None
) -> Tensor:
    return methods.linear(tensors, [0.2, 0.5, -0.4], device=device, dtype=dtype)


def combine_slerp(
    tensors: list[Tensor], device: torch.device | None, dtype: torch.dtype | None
) -> Tensor:
    return methods.slerp(tensors[:2], 0.3, device=device, dtype=dtype)


def combine_ties(
    tensors: list[Tensor], device: torch.device | None, dtype: torch.dtype | None
) -> Tensor:
    return methods.ties(tensors[0], tensors[1:], [1.0, 0.5], [0.3, 0.6], device=device, dtype=dtype)


METHODS: dict[str, Combine] = {
    "linear": combine_linear,
    "slerp": combine_slerp,
    "ties": combine_ties,
}
COMMANDS = {
    "linear": "--method linear --merge {0} --merge {1} --merge {2} --weight 0.3",
    "slerp": "--method slerp --merge {0} --merge {1} --weight 0.3",
    "ties": "--base-model {0} --merge {1} --merge {2} --density 0.4",
}


def three(elements: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(elements)
    return [torch.randn(elements, generator=generator).to(dtype) for _ in range(3)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let a device take so few entries at once that small tensors have many chunks."""
    size = 1 << 16
    holders = [
        m for m in list(sys.modules.values()) if isinstance(vars(m).get("DEVICE_CHUNK"), int)
    ]
    assert holders, "expected a module with the size of a device's chunks, DEVICE_CHUNK"
    for module in holders:
        monkeypatch.setattr(module, "DEVICE_CHUNK", size)
    yield size


# -------------------------------------------------------------------- the emulation itself


def test_what_an_emulated_device_is() -> None:
    """Results are the CPU's; copies, waits and memory are counted; devices do not mix."""
    values = torch.arange(6.0)
    with emulated() as device:
        assert torch.cuda.is_available()
        there = values.to("cuda")
        assert there.device == torch.device("cuda", 0)
        assert there.is_cuda
        assert [(copy.dtype, copy.elements) for copy in device.uploads] == [(torch.float32, 6)]
        assert device.held == 24
        half = there[1:3]
        half.mul_(10)
        assert device.held == 24  # a view
        assert device.synchronizations == 0
        assert there.cpu().tolist() == [0, 10, 20, 3, 4, 5]
        assert float(there.sum()) == 42
        assert there[there > 9].tolist() == [10, 20]
        assert [copy.elements for copy in device.downloads] == [6, 2]
        assert device.waits == ["_local_scalar_dense", "index"]
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            there.add(values)
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            there.numpy()
        del half, there
        assert device.held == 0
        assert device.peak >= 24
    assert not torch.cuda.is_available()
    assert values.tolist() == [0, 1, 2, 3, 4, 5]


def test_an_emulated_device_runs_out_of_memory() -> None:
    with emulated(memory=100) as device:
        kept = torch.zeros(20, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(20, device="cuda")
        del kept
        assert torch.zeros(20, device="cuda").sum().item() == 0
        assert device.refusals == 1
    with emulated(fail_at=1) as device:
        torch.ones(3).to("cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.ones(3).to("cuda")
        assert torch.ones(3).to("cuda").tolist() == [1, 1, 1]


# -------------------------------------------------------------------- the methods


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, 1000, 200_000])
@pytest.mark.parametrize("method", METHODS)
def test_a_device_gives_the_results_of_the_cpu(
    method: str, elements: int, dtype: torch.dtype, small_chunks: int
) -> None:
    tensors = three(elements, dtype)
    expected = METHODS[method](tensors, None, dtype)
    with emulated() as device:
        chunked = METHODS[method](tensors, DEVICE, dtype)
        whole = METHODS[method]([tensor.to(DEVICE) for tensor in tensors], DEVICE, dtype)
        assert chunked.device.type == "cpu"  # where the inputs are
        assert whole.device.type == "cuda"
        whole = whole.to("cpu")
    assert torch.equal(chunked, expected)
    assert torch.equal(whole, expected)
    assert device.held == 0


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_of_the_narrow_dtypes(method: str, small_chunks: int) -> None:
    """Sources go up as they are stored, the output comes down as it is written."""
    tensors = three(200_000, torch.bfloat16)
    with emulated() as device:
        METHODS[method](tensors, DEVICE, torch.float16)
    assert {copy.dtype for copy in device.uploads} == {torch.bfloat16}
    results = [copy for copy in device.downloads if copy.dtype == torch.float16]
    assert sum(copy.elements for copy in results) == 200_000
    others = sum(copy.elements for copy in device.downloads) - 200_000
    assert others <= 1000  # sums of blocks, not values


@pytest.mark.parametrize("method", METHODS)
def test_waits_do_not_grow_with_chunks(method: str, small_chunks: int) -> None:
    """A tensor on the device is combined without a wait for each of its chunks."""

    def waits(elements: int) -> int:
        with emulated() as device:
            tensors = [tensor.to(DEVICE) for tensor in three(elements, torch.bfloat16)]
            device.clear()
            METHODS[method](tensors, DEVICE, torch.bfloat16)
            return device.synchronizations

    few, many = waits(small_chunks), waits(12 * small_chunks)
    assert many == few
    assert many <= 12


@pytest.mark.parametrize("method", METHODS)
def test_memory_in_chunks_does_not_grow_with_the_tensor(method: str, small_chunks: int) -> None:
    def peak(elements: int) -> int:
        with emulated() as device:
            METHODS[method](three(elements, torch.bfloat16), DEVICE, torch.bfloat16)
            return device.peak

    assert peak(16 * small_chunks) <= 1.25 * peak(2 * small_chunks)


# -------------------------------------------------------------------- whole runs


@pytest.fixture
def models(make: Make) -> list[str]:
    return [str(make("llama", seed)) for seed in range(3)]


def merged(method: str, models: list[str], output: Path, *options: str) -> dict[str, bytes]:
    command = COMMANDS[method].format(*models).split()
    assert main.main([str(output), *command, "--no-model-card", *options]) == 0
    return contents(output)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_merge_on_a_device_is_the_same(
    method: str, dtype: str, models: list[str], output: Path, tmp_path: Path
) -> None:
    expected = merged(method, models, tmp_path / "cpu", "--dtype", dtype)
    with emulated() as device:
        assert merged(method, models, output, "--dtype", dtype, "--cuda") == expected
    assert {copy.dtype for copy in device.uploads} == {torch.bfloat16}
    written = torch.bfloat16 if dtype == "auto" else torch.float32
    assert written in {copy.dtype for copy in device.downloads}
    assert device.operations
    assert device.held == 0


def test_workers_share_a_device(models: list[str], output: Path) -> None:
    with emulated() as device:
        merged("linear", models, output, "--cuda", "--threads", "4")
    assert 1 < len(device.threads) <= 5


@pytest.mark.parametrize("moment", [0, 3, 40])
@pytest.mark.parametrize("method", METHODS)
def test_memory_that_runs_out_once(
    method: str, moment: int, models: list[str], output: Path, tmp_path: Path
) -> None:
    expected = merged(method, models, tmp_path / "cpu")
    with emulated(fail_at=moment) as device:
        assert merged(method, models, output, "--cuda", "--threads", "1") == expected
    assert device.refusals == 1
    assert device.held == 0


@pytest.mark.parametrize("moment", [None, 40])  # at which memory runs out
def test_a_report_on_a_device_is_the_same(
    moment: int | None, models: list[str], tmp_path: Path, small_chunks: int
) -> None:
    reports = []
    for name in ("cpu", "cuda"):
        file = tmp_path / f"{name}.json"
        options = [*COMMANDS["ties"].format(*models).split(), "--report", str(file), "--quiet"]
        if name == "cpu":
            assert main.main([str(tmp_path / name), *options]) == 0
        else:
            with emulated(fail_at=moment):
                assert main.main([str(tmp_path / name), *options, "--cuda"]) == 0
        reports.append(json.loads(file.read_text(encoding="utf-8")))
    ours, other = reports
    assert ours["sentences"] == other["sentences"]
    for key in ("change", "left", "kept", "distance"):
        assert ours["total"][key] == pytest.approx(other["total"][key], abs=1e-7)
    assert ours["total"]["opposed"] == other["total"]["opposed"]


def test_tensors_larger_than_a_device(
    make: Make, output: Path, tmp_path: Path, small_chunks: int
) -> None:
    """Those that fit go as a whole, the others in chunks: with the same result."""
    models = [str(make("llama", seed, vocab_size=1 << 15)) for seed in range(3)]
    expected = merged("linear", models, tmp_path / "cpu")
    with emulated(memory=3_000_000) as device:
        assert merged("linear", models, output, "--cuda") == expected
    assert device.refusals > 0
    assert device.peak <= 3_000_000


def test_a_device_with_no_memory_at_all(
    models: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS["ties"].format(*models).split()
    with emulated(memory=100):
        assert main.main([str(output), *command, "--cuda"]) == 2
    text = capsys.readouterr().err
    assert "out of memory" in text
    assert "Traceback" not in text
    assert not output.parent.exists()


def test_values_that_are_not_finite_are_found_on_a_device(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(make("llama", seed)) for seed in range(2)]
    arguments = [str(output), "--method", "linear", "--no-normalize", "--cuda"]
    arguments += ["--merge", models[0], "--merge", models[1], "--weight", "1e8"]
    with emulated():
        assert main.main([*arguments, "--dtype", "float16"]) == 2
    assert "overflows float16" in capsys.readouterr().err


def test_nothing_is_left_of_the_emulation() -> None:
    """The record holds no tensor, and the patches are gone."""
    with emulated() as device:
        assert isinstance(device, Record)
        tensor = torch.ones(4, device="cuda")
        result = tensor * 2
    del tensor, result
    assert device.held == 0
    assert torch.ones(2).add(1).tolist() == [2, 2]
    with pytest.raises((RuntimeError, AssertionError), match="CUDA|cuda"):
        torch.cuda.init()
