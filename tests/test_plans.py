"""What each tensor is made of: gradients, filters, and what a plan says of itself."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Make, fails, loads_clean, stack_file, stored, ties_command
from oracles import linear_oracle, slerp_oracle, ties_oracle, ulps

import bakllama
import main

# Of each architecture: how a layer's names start, what comes before the layers, and the words that
# a recipe may filter by.
SHAPES = {
    "llama": (r"model\.layers\.(\d+)\.", {"model.embed_tokens.weight"}, ("self_attn", "mlp")),
    "gemma3": (r"model\.layers\.(\d+)\.", {"model.embed_tokens.weight"}, ("self_attn", "mlp")),
    "gpt2": (r"transformer\.h\.(\d+)\.", {"transformer.wte.weight", "transformer.wpe.weight"})
    + (("attn", "mlp"),),
    "mixtral": (r"model\.layers\.(\d+)\.", {"model.embed_tokens.weight"})
    + (("self_attn", "block_sparse_moe"),),
}


LAYERS = 6


def expected_place(name: str, pattern: str, before: set[str]) -> float:
    match = re.match(pattern, name)
    if match:
        return int(match[1]) / (LAYERS - 1)
    return 0.0 if name in before else 1.0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("filtered", [False, True])
def test_slerp_by_layer_and_name(name: str, filtered: bool, make: Make, output: Path) -> None:
    pattern, before, words = SHAPES[name]
    a, b = make(name, 1), make(name, 2)
    arguments = [str(output), "--method", "slerp", "--base-model", str(a), "--merge", str(b)]
    if filtered:
        arguments += ["--weight", f"{words[0]}:0,0.5,1", "--weight", f"{words[1]}:1,0.5,0"]
        arguments += ["--weight", "0.25"]
    else:
        arguments += ["--weight", "0,0.5,1"]
    assert main.main(arguments) == 0
    of_a, of_b, result = stored(a), stored(b), stored(output)
    seen = set()
    for tensor, merged in result.items():
        place = expected_place(tensor, pattern, before)
        t = place
        if filtered:
            parts = tensor.split(".")
            t = place if words[0] in parts else 1 - place if words[1] in parts else 0.25
        seen.add(round(t, 6))
        assert ulps(merged, slerp_oracle(of_a[tensor], of_b[tensor], t)).max() <= 0.51, tensor
    assert {0.0, 0.2, 0.4, 0.6, 0.8, 1.0} <= seen
    loads_clean(output)


@pytest.mark.parametrize("name", SHAPES)
def test_linear_and_ties_by_layer(name: str, make: Make, tmp_path: Path) -> None:
    pattern, before, _ = SHAPES[name]
    base, a, b = (make(name, seed, dtype=torch.float32) for seed in range(3))
    merges = ["--merge", str(a), "--weight", "1,0.5", "--merge", str(b), "--weight", "0,1,0.25"]
    options = ["--method", "linear", *merges]
    assert main.main([str(tmp_path / "linear"), *options]) == 0
    merges[4:4] = ["--density", "0.2,0.8"]
    merges += ["--density", "0.6"]
    assert main.main([str(tmp_path / "ties"), "--base-model", str(base), *merges]) == 0
    models = [stored(folder) for folder in (base, a, b)]
    linear, ties = stored(tmp_path / "linear"), stored(tmp_path / "ties")
    for tensor in linear:
        place = expected_place(tensor, pattern, before)
        rising = 2 * place if place <= 0.5 else 1 - 1.5 * (place - 0.5)
        weights, densities = [1 - 0.5 * place, rising], [0.2 + 0.6 * place, 0.6]
        origin, *others = (model[tensor] for model in models)
        oracle = linear_oracle(others, weights, True)
        torch.testing.assert_close(linear[tensor].double(), oracle, rtol=1e-6, atol=1e-7)
        oracle = ties_oracle(origin, others, weights, densities, True, False)
        torch.testing.assert_close(ties[tensor].double(), oracle, rtol=1e-6, atol=1e-7)


def test_what_each_layer_gets_is_shown(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(make("llama", 1)), str(make("llama", 2))
    arguments = [str(output), "--method", "slerp", "--base-model", a, "--merge", b, "--dry-run"]
    assert main.main([*arguments, "--weight", "mlp:1,0", "--weight", "0,0.5"]) == 0
    text = capsys.readouterr().err
    assert "t = mlp:1,0 0,0.5" in text
    assert "t, mlp (18): 1 0.8 0.6 0.4 0.2 0\n" in text
    assert "t, the rest (39): 0 0.1 0.2 0.3 0.4 0.5\n" in text


def test_filters_that_match_nothing_are_refused(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make("llama", 1), make("llama", 2)
    arguments = [output, "--method", "slerp", "--base-model", a, "--merge", b, "--weight", "0.5"]
    text = fails(capsys, *arguments, "--weight", "attention:0,1")
    assert "--weight attention: matches no tensor" in text and "self_attn" in text
    hidden = ["--weight", "mlp:1", "--weight", "down_proj:0"]
    assert "--weight down_proj: matches no tensor that is left" in fails(
        capsys, *arguments, *hidden
    )


def test_weights_that_cancel_in_one_layer_are_refused_before_writing(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make("llama", 1), make("llama", 2)
    merges = ["--merge", a, "--weight", "1,1,-1,1,1,1", "--merge", b, "--weight", "1"]
    text = fails(capsys, output, "--method", "linear", *merges)
    assert "sum to 0 and cannot be normalised" in text and " of 57 tensors, weights" in text
    assert not output.exists()


# -------------------------------------------------------------------- a plan shown


def test_a_dry_run_prints_the_plan(
    inputs: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(ties_command(output, inputs)) == 0
    tensors, shards = stored(output), len(list(output.glob("*.safetensors")))
    size = sum(tensor.nbytes for tensor in tensors.values())
    shutil.rmtree(output)
    capsys.readouterr()
    assert main.main(ties_command(output, inputs, "--dry-run")) == 0
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


def test_verbose_prints_each_tensors_method_and_numbers(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(make("llama", 1)), str(make("llama", 2))
    arguments = [str(output), "--method", "slerp", "--base-model", a, "--merge", b]
    options = ["--weight", "0,1", "--dry-run", "--verbose"]
    assert main.main([*arguments, *options]) == 0
    name = "model.layers.4.mlp.up_proj.weight"
    line = f"{name} [48, 32] bfloat16: slerp(t=0.8), {a}: {name}, {b}: {name}\n"
    assert line in capsys.readouterr().err
    slices = f"{{model: {a}, start: 0, end: 1, scale: 0.3}}, {{model: {b}, start: 4, end: 5}}"
    config = stack_file(tmp_path, f"layer_slices: [{slices}]")
    assert bakllama.main([config, str(output), "--dry-run", "--verbose"]) == 0
    text, part = capsys.readouterr().err, "mlp.up_proj.weight [48, 32] bfloat16:"
    assert f"layers.0.{part} passthrough(scale=0.3), {a}: model.layers.0.mlp.up_proj" in text
    assert f"layers.1.{part} copied, {b}: {name}\n" in text


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
    assert any(f"{other}: rms_norm_eps is 1e-05, in {base} it is 1e-06" in line for line in lines)
    assert any("num_attention_heads is 8" in line for line in lines)
