"""main.py end to end: the methods, donors, dtypes and heads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Make, fails, loads_clean, stored
from oracles import linear_oracle, slerp_oracle, ties_oracle, ulps
from safetensors.torch import save_file

import main

ROOT = Path(main.__file__).parent


def test_the_commands_of_the_design_work(make: Make, tmp_path: Path) -> None:
    base, a, b = (str(make("llama", seed)) for seed in range(3))
    of_base, of_a, of_b = stored(Path(base)), stored(Path(a)), stored(Path(b))
    name = "model.layers.2.mlp.down_proj.weight"

    out = tmp_path / "ties"
    options = ["--merge", a, "--weight", "0.3", "--density", "0.5"]
    options += ["--merge", b, "--weight", "0.5", "--density", "0.5"]
    assert main.main([str(out), "--base-model", base, *options]) == 0
    oracle = ties_oracle(
        of_base[name], [of_a[name], of_b[name]], [0.3, 0.5], [0.5, 0.5], True, False
    )
    torch.testing.assert_close(stored(out)[name].double(), oracle, rtol=0.51 * 2**-7, atol=1e-7)

    out = tmp_path / "linear"
    options = ["--merge", a, "--weight", "0.6", "--merge", b, "--weight", "0.2"]
    assert main.main([str(out), "--method", "linear", *options]) == 0
    oracle = linear_oracle([of_a[name], of_b[name]], [0.6, 0.2], True)
    assert ulps(stored(out)[name], oracle).max() <= 0.51

    out = tmp_path / "slerp"
    options = ["--base-model", a, "--merge", b, "--weight", "0.5"]
    assert main.main([str(out), "--method", "slerp", *options]) == 0
    for name in ("model.norm.weight", "lm_head.weight"):
        oracle = slerp_oracle(of_a[name], of_b[name], 0.5)
        assert ulps(stored(out)[name], oracle).max() <= 0.51


def test_slerp_of_two_merges_starts_at_the_first(make: Make, output: Path) -> None:
    a, b = str(make("llama", 1)), str(make("llama", 2))
    arguments = ["--method", "slerp", "--merge", a, "--merge", b, "--weight", "0"]
    assert main.main([str(output), *arguments]) == 0
    of_a = stored(Path(a))
    assert all(torch.equal(tensor, of_a[name]) for name, tensor in stored(output).items())


def test_a_base_of_linear_is_the_donor_but_is_not_averaged(make: Make, output: Path) -> None:
    base, a, b = (make("llama", seed) for seed in range(3))
    arguments = ["--method", "linear", "--base-model", str(base), "--weight", "1"]
    assert main.main([str(output), *arguments, "--merge", str(a), "--merge", str(b)]) == 0
    name = "model.norm.weight"
    oracle = linear_oracle([stored(a)[name], stored(b)[name]], [1, 1], True)
    assert ulps(stored(output)[name], oracle).max() <= 0.51
    tokenizer = "tokenizer_config.json"
    assert (output / tokenizer).read_bytes() == (base / tokenizer).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_of_file_and_config_agree(dtype: str, make: Make, output: Path) -> None:
    a, b = str(make("llama", 1)), str(make("llama", 2, dtype=torch.float32))
    arguments = ["--method", "linear", "--weight", "1", "--merge", a, "--merge", b]
    assert main.main([str(output), *arguments, "--dtype", dtype]) == 0
    assert {t.dtype for t in stored(output).values()} == {getattr(torch, dtype)}
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype


def test_dtype_is_the_donors_by_default(make: Make, output: Path) -> None:
    base, a = str(make("llama", 0, dtype=torch.float16)), str(make("llama", 1, dtype=torch.float32))
    assert main.main([str(output), "--base-model", base, "--merge", a]) == 0
    assert {t.dtype for t in stored(output).values()} == {torch.float16}


def test_a_tied_and_an_untied_head_give_an_untied_one(make: Make, output: Path) -> None:
    tied, untied = make("llama-tied", 1), make("llama", 2)
    arguments = ["--method", "linear", "--weight", "1"]
    assert main.main([str(output), *arguments, "--merge", str(tied), "--merge", str(untied)]) == 0
    result = stored(output)
    heads = [stored(tied)["model.embed_tokens.weight"], stored(untied)["lm_head.weight"]]
    assert ulps(result["lm_head.weight"], linear_oracle(heads, [1, 1], True)).max() <= 0.51
    model = loads_clean(output)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight.bfloat16(), result["lm_head.weight"])


def test_a_config_that_says_untied_needs_a_head(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = stored(make("llama", 1))
    del tensors["lm_head.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_bytes((make("llama", 1) / "config.json").read_bytes())
    text = fails(
        capsys, output, "--base-model", make("llama"), "--merge", broken, "--density", "0.5"
    )
    assert "lm_head.weight" in text and str(broken) in text


def test_the_script_runs_as_a_command(make: Make, output: Path) -> None:
    command = [sys.executable, ROOT / "main.py", output, "--base-model", make("llama")]
    command += ["--merge", make("llama", 1)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent.parent)
    assert done.returncode == 0, done.stderr
    loads_clean(output)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not empty" in done.stderr and "Traceback" not in done.stderr
