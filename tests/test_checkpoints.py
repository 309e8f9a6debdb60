"""Opening and saving checkpoints: file formats, names, copied files, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Make, contents, loads_clean, stored
from safetensors.torch import save_file

import bakllama
import main
import saving
from direct import DirectFile


def rewrite(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(source, target)
    for file in target.glob("model*.safetensors*"):
        file.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    return target


def linear(output: Path, *models: Path, options: tuple[str, ...] = ()) -> int:
    merges = [text for model in models for text in ("--merge", str(model))]
    return main.main([str(output), "--method", "linear", "--weight", "1", *merges, *options])


def test_bin_checkpoints_merge_like_safetensors(make: Make, tmp_path: Path) -> None:
    a, b = make("llama", 1), make("llama", 2)
    tensors = stored(a)
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    for folder in (single, sharded):
        folder.mkdir()
        shutil.copyfile(a / "config.json", folder / "config.json")
    torch.save(tensors, single / "pytorch_model.bin")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f"pytorch_model-{i}.bin"
        torch.save({name: tensors[name] for name in part}, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (sharded / "pytorch_model.bin.index.json").write_text(index)

    assert linear(tmp_path / "expected", a, b) == 0
    expected = stored(tmp_path / "expected")
    for folder in (single, sharded):
        out = tmp_path / f"merged-{folder.name}"
        assert linear(out, folder, b) == 0
        assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(out).items())
        assert not list(out.glob("*.bin"))


def test_safetensors_win_over_bin(make: Make, tmp_path: Path, output: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(make("llama", 1), both)
    torch.save({"model.norm.weight": torch.zeros(3)}, both / "pytorch_model.bin")
    assert linear(output, both) == 0
    assert torch.equal(
        stored(output)["model.norm.weight"], stored(make("llama", 1))["model.norm.weight"]
    )


def test_a_bin_that_stores_the_tied_head_twice_is_tied(
    make: Make, tmp_path: Path, output: Path
) -> None:
    a, both = make("llama-tied", 1), tmp_path / "both"
    both.mkdir()
    shutil.copyfile(a / "config.json", both / "config.json")
    tensors = stored(a)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, both / "pytorch_model.bin")
    assert linear(output, both, a) == 0
    assert stored(output).keys() == stored(a).keys()
    assert loads_clean(output).config.tie_word_embeddings


def test_a_pickle_with_code_is_refused(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    shutil.copyfile(make("llama") / "config.json", evil / "config.json")
    torch.save({"model.norm.weight": Path("x")}, evil / "pytorch_model.bin")
    assert linear(output, evil) == 2
    text = capsys.readouterr().err
    assert "pytorch_model.bin" in text and "Convert it to safetensors" in text


def test_names_without_the_base_prefix_are_aligned(
    make: Make, tmp_path: Path, output: Path
) -> None:
    """Early GPT-2 checkpoints have `wte.weight`, later ones `transformer.wte.weight`."""
    with_prefix = make("gpt2", 1)
    bare = rewrite(
        make("gpt2", 2),
        tmp_path / "bare",
        {n.removeprefix("transformer."): t for n, t in stored(make("gpt2", 2)).items()},
    )
    assert linear(tmp_path / "expected", with_prefix, make("gpt2", 2)) == 0
    assert linear(output, with_prefix, bare) == 0
    expected = stored(tmp_path / "expected")
    assert all(torch.equal(t, expected[n]) for n, t in stored(output).items())
    assert linear(tmp_path / "reverse", bare, with_prefix) == 0
    reverse = stored(tmp_path / "reverse")
    assert all(torch.equal(t, reverse[n.removeprefix("transformer.")]) for n, t in expected.items())
    config = tmp_path / "stack.yml"
    config.write_text(
        f"layer_slices: [{{model: {bare}, start: 0, end: 1}}, "
        f"{{model: {with_prefix}, start: 1, end: 2}}]"
    )
    assert bakllama.main([str(config), str(tmp_path / "stack")]) == 0
    loads_clean(tmp_path / "stack")


def test_computed_buffers_are_ignored_and_said_so(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(6)}
    old = rewrite(make("llama", 1), tmp_path / "old", stored(make("llama", 1)) | buffers)
    for models in ((old, make("llama", 2)), (make("llama", 2), old)):
        assert linear(output, *models, options=("--overwrite",)) == 0
        assert "ignored: model.layers.0.self_attn.rotary_emb.inv_freq" in capsys.readouterr().err
        assert stored(output).keys() == stored(make("llama", 1)).keys()


def test_float8_in_a_bin_is_refused(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    shutil.copyfile(make("llama") / "config.json", folder / "config.json")
    tensors = stored(make("llama"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert linear(output, folder) == 2
    assert "model.norm.weight is torch.float8_e4m3fn" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["drop", "shape", "config"])
def test_an_output_that_differs_from_its_plan_is_not_kept(
    damage: str,
    make: Make,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verify = saving._verify

    def damaged(folder: Path, planned: saving.Planned) -> None:
        tensors = stored(folder)
        if damage == "drop":
            del tensors["model.norm.weight"]
        elif damage == "shape":
            tensors["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        verify(folder, planned)

    monkeypatch.setattr(saving, "_verify", damaged)
    assert linear(output, make("llama", 1)) == 2
    expected = {
        "drop": "the output differs from the plan in model.norm.weight",
        "shape": "the output differs from the plan in model.norm.weight",
        "config": "misses model.layers.6",
    }
    assert expected[damage] in capsys.readouterr().err
    assert not output.parent.exists()


def test_a_tied_checkpoint_may_store_the_head_alone(
    make: Make, tmp_path: Path, output: Path
) -> None:
    tensors = stored(make("llama-tied", 1))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    odd = rewrite(make("llama-tied", 1), tmp_path / "odd", tensors)
    assert linear(output, make("llama-tied", 2), odd) == 0
    assert linear(tmp_path / "expected", make("llama-tied", 2), make("llama-tied", 1)) == 0
    expected = stored(tmp_path / "expected")
    assert all(torch.equal(t, expected[n]) for n, t in stored(output).items())


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
        "LICENSE": b"licence",
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


def test_float32_tensors_in_a_bfloat16_model_stay_float32(
    make: Make, tmp_path: Path, output: Path
) -> None:
    router = "model.layers.0.mlp.gate.weight"
    models = []
    for seed in (1, 2):
        tensors = stored(make("qwen3-moe", seed))
        tensors[router] = tensors[router].float() + 1e-6
        models.append(rewrite(make("qwen3-moe", seed), tmp_path / str(seed), tensors))
    assert linear(output, *models) == 0
    result = stored(output)
    assert result[router].dtype == torch.float32
    assert result["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    loads_clean(output)


def test_written_files_have_the_usual_permissions(make: Make, output: Path) -> None:
    assert linear(output, make("llama", 1)) == 0
    probe = output.parent.parent / "probe"
    probe.touch()
    assert {f.stat().st_mode for f in output.iterdir()} == {probe.stat().st_mode}


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


def test_an_adapter_and_a_quantised_model_are_refused(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert linear(output, adapter) == 2
    assert "a LoRA adapter" in capsys.readouterr().err
    quantised = tmp_path / "quantised"
    shutil.copytree(make("llama"), quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    assert linear(output, quantised) == 2
    assert "quantised (gptq)" in capsys.readouterr().err


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


def test_peak_memory_does_not_grow_with_the_models(make: Make, tmp_path: Path) -> None:
    """Anonymous memory, measured in a process of its own, for 2 and for 8 models of 25 MB."""
    import subprocess
    import sys

    big = make("llama", 1, hidden_size=512, intermediate_size=1024, vocab_size=2048)
    copies = [str(shutil.copytree(big, tmp_path / f"copy-{i}")) for i in range(8)]
    size = (big / "model.safetensors").stat().st_size
    assert size > 20e6
    code = (
        "import sys, threading, time, main\n"
        "peak, done = 0, False\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done:\n"
        "        lines = open('/proc/self/status').read().splitlines()\n"
        "        anon = next(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))\n"
        "        peak = max(peak, anon); time.sleep(0.002)\n"
        "watcher = threading.Thread(target=watch); watcher.start()\n"
        "status = main.main(sys.argv[1:]); done = True; watcher.join()\n"
        "print(peak * 1024); sys.exit(status)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    peaks = []
    for count in (2, 8):
        merges = [text for copy in copies[:count] for text in ("--merge", copy)]
        command = [
            sys.executable,
            "-c",
            code,
            str(tmp_path / f"out-{count}"),
            "--base-model",
            str(big),
        ]
        done = subprocess.run(
            [*command, *merges, "--density", "0.5"],
            cwd=Path(main.__file__).parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < size


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
    from tqdm import tqdm

    tensors = {
        'é "quoted"': torch.ones(3, 0),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "a": torch.arange(7, dtype=torch.int64),
        "b": torch.tensor([True, False, True]),
        "c": torch.arange(5).to(torch.float16),
        "d": torch.arange(9, dtype=torch.uint8),
    }
    plan = {n: saving.Recipe("copied", (), tuple(t.shape), t.dtype) for n, t in tensors.items()}
    planned = saving.Planned("", plan, None, ())  # type: ignore[arg-type]
    order = saving._file_order(plan, plan)
    with tqdm(disable=True) as bar:
        values = iter([tensors[name] for name in order])
        saving._write_shard(tmp_path / "ours", order, planned, values, bar)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


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


def test_parameters_in_a_bin_are_tensors(make: Make, tmp_path: Path, output: Path) -> None:
    a = tmp_path / "a"
    a.mkdir()
    shutil.copyfile(make("llama", 1) / "config.json", a / "config.json")
    parameters = {n: torch.nn.Parameter(t) for n, t in stored(make("llama", 1)).items()}
    torch.save(parameters, a / "pytorch_model.bin")
    options = ("--method", "ties", "--base-model", str(make("llama", 0)), "--density", "0.4")
    assert linear(output, a, options=options) == 0
    loads_clean(output)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 22, (1 << 22) + 5, 9_999_999])
@pytest.mark.parametrize("support", ["full", "not opened", "not written"])
def test_direct_files_hold_what_was_written(
    support: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

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
