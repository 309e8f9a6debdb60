"""Opening checkpoints: file formats, names, ties, refusals."""

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers import Make, fails, linear, loads_clean, make_other, rewrite, stack_file, stored
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bakllama
from merging.models.weight_files import read_file
from merging.problems import Problems


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


@pytest.mark.parametrize("spaces", range(9))
def test_tensors_are_read_wherever_they_begin(spaces: int, tmp_path: Path) -> None:
    """Headers of any length put them at any address; some are larger than a page."""
    tensors = {
        "wide": torch.arange(9.0, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "a": torch.arange(3 * 4099).reshape(3, 4099).to(torch.float16),
        "mask": torch.tensor([True, False, True]),
        "é": torch.arange(70_000, dtype=torch.int32),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    longer = content[8 : 8 + size] + b" " * spaces
    file.write_bytes(struct.pack("<Q", len(longer)) + longer + content[8 + size :])
    found = {name: tensor.read() for name, tensor in read_file("a", file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    found["a"].zero_()
    assert torch.equal(read_file("a", file)["a"].read(), tensors["a"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is mapped")
def test_a_file_is_mapped_only_while_its_tensors_are_used(tmp_path: Path) -> None:
    """Else all inputs of a merge count as its memory."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5000.0), "b": torch.ones(5000)}, file)
    tensors = read_file("a", file)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(file))

    descriptors = os.listdir("/proc/self/fd")
    assert mapped() == 0
    a, part_of_b = tensors["a"].read(), tensors["b"].read()[10:20]
    assert mapped() == 2
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)  # of which there may be few
    del a
    assert mapped() == 1
    assert part_of_b.sum() == 10
    del part_of_b
    assert mapped() == 0


def test_a_header_of_another_form_is_refused(tmp_path: Path) -> None:
    """safetensors reads such entries, though nothing writes them."""
    header = json.dumps({"a": ["F32", [2], [0, 8]]}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(Problems, match="not a whole safetensors file"):
        read_file("a", file)


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


def stack_of(folder: Path, first: Path, second: Path) -> dict[str, torch.Tensor]:
    """Stack layers 0 to 2 of one model and 1 to 3 of another, and return the tensors."""
    text = f"layer_slices: [{{model: {first}, start: 0, end: 3}}, "
    text += f"{{model: {second}, start: 1, end: 4}}]"
    output = folder / "stack"
    assert bakllama.main([stack_file(folder, text), str(output), "--overwrite"]) == 0
    return stored(output)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_masks_of_old_checkpoints_do_not_hide_their_layers(make: Make, tmp_path: Path) -> None:
    """The first GPT-2 on the Hub stores a mask in each layer, which transformers now computes."""
    tensors = {n.removeprefix("transformer."): t for n, t in stored(make("gpt2", 2)).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(6)}
    bare = rewrite(make("gpt2", 2), tmp_path / "bare", tensors)
    old = rewrite(make("gpt2", 2), tmp_path / "old", masks | tensors)
    other = make("gpt2", 1)
    same(stack_of(tmp_path, old, old), stack_of(tmp_path, bare, bare))
    same(stack_of(tmp_path, old, other), stack_of(tmp_path, bare, other))
    same(stack_of(tmp_path, other, old), stack_of(tmp_path, other, bare))


def test_buffers_of_old_checkpoints_follow_their_layers_prefix(make: Make, tmp_path: Path) -> None:
    tensors = {n.removeprefix("model."): t for n, t in stored(make("llama", 2)).items()}
    buffers = {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(6)}
    old = rewrite(make("llama", 2), tmp_path / "old", tensors | buffers)
    other = make("llama", 1)
    same(stack_of(tmp_path, other, old), stack_of(tmp_path, other, make("llama", 2)))


def test_experts_in_two_forms_are_refused_with_what_to_do(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make("mixtral", 1), make("mixtral", 2)
    fused = {}
    for model in (one, other):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        fused[model] = tmp_path / f"fused-{model.name}"
        loaded.save_pretrained(fused[model], save_original_format=False)
    for models in ((one, fused[other]), (fused[other], one)):
        assert linear(output, *models) == 2
        text = capsys.readouterr().err
        assert f"{models[1]}: stores model.layers.0.mlp.experts.down_proj, " in text
        assert "save_original_format=False" in text and "experts.0" not in text
    assert linear(output, fused[one], fused[other]) == 0
    name = "model.layers.1.mlp.experts.gate_up_proj"
    a, b = (stored(fused[model])[name].double() for model in (one, other))
    assert torch.equal(stored(output)[name], ((a + b) / 2).bfloat16())


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


def test_parameters_in_a_bin_are_tensors(make: Make, tmp_path: Path, output: Path) -> None:
    a = tmp_path / "a"
    a.mkdir()
    shutil.copyfile(make("llama", 1) / "config.json", a / "config.json")
    parameters = {n: torch.nn.Parameter(t) for n, t in stored(make("llama", 1)).items()}
    torch.save(parameters, a / "pytorch_model.bin")
    options = ("--method", "ties", "--base-model", str(make("llama", 0)), "--density", "0.4")
    assert linear(output, a, options=options) == 0
    loads_clean(output)


@pytest.mark.parametrize(
    "name, part, key",
    [
        ("bert", None, "num_hidden_layers"),
        ("bart", None, "encoder_layers"),
        ("gemma3 vision", "text_config", "num_hidden_layers"),
        ("qwen2-vl", "vision_config", "depth"),
    ],
)
@pytest.mark.parametrize("depth", [90_000, 10**9])
def test_more_layers_than_are_stored_are_refused_before_they_are_made(
    name: str,
    part: str | None,
    key: str,
    depth: int,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_other(name, 0, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    changed = config if part is None else config[part]
    changed.pop("layer_types", None)
    changed[key] = depth
    file.write_text(json.dumps(config))
    merge = ["--method", "linear", "--weight", "1", "--merge", tmp_path / "model"]
    text = fails(capsys, output, *merge)
    says = f"{tmp_path / 'model'}: config.json says {key}"
    few = f"{says} {depth}, but the tensors are of 2 layers at most"
    assert (few if depth < 10**6 else f"{says} 1e+09, expected at most 100000") in text
