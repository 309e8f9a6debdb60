"""main.py end to end: methods, options, pairing, and what it writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Make, contents, loads_clean, stored
from test_merge_methods import linear_oracle, slerp_oracle, ties_oracle, ulps

import main
import problems
import settings
from schedules import Schedule

ROOT = Path(main.__file__).parent


def resolved(*arguments: str) -> settings.Settings:
    """Parse and check arguments; raise for what is wrong."""
    found: list[str] = []
    parser = settings.build_parser(main.METHODS)
    result = settings.settings_from(parser.parse_args(["out", *arguments]), found)
    problems.refuse(found)
    return result


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run main.py, expect exit status 2, and return its message."""
    assert main.main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


# -------------------------------------------------------------------- pairing


@pytest.mark.parametrize(
    "arguments, weights",
    [
        ("--merge a --weight 1 --merge b --weight 2", (1, 2)),
        ("--weight 1 --merge a --weight 2 --merge b", (1, 2)),
        ("--merge a --merge b --weight 1 --weight 2", (1, 2)),
        ("--merge a --merge b --weight 3", (3, 3)),
        ("--weight 3 --merge a --merge b", (3, 3)),
        ("--merge a --weight 3", (3,)),
        ("--merge a --merge b", (1, 1)),
        ("--merge a --weight 1 --merge a --weight 2", (1, 2)),
        ("--merge a --merge b --weight -0.5 --no-normalize", (-0.5, -0.5)),
    ],
)
def test_weights_are_paired(arguments: str, weights: tuple[float, ...]) -> None:
    found = resolved("--base-model", "base", *arguments.split()).weights
    assert found == tuple(Schedule((weight,)) for weight in weights)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--merge a --weight 1 --merge b", "stands between"),
        ("--merge a --merge b --weight 1 --merge c", "stands between"),
        ("--merge a --merge b --merge c --weight 1 --weight 2", "2 times for 3 --merge"),
        ("--merge a --weight 1 --weight 2", "2 times for 1 --merge"),
        ("--merge a --density 0.2 --merge b", "--density 0.2 stands between"),
        ("--weight 1", "at least one with --merge"),
        ("--merge a --weight -1", "--no-normalize"),
        ("--merge a --density 0", r"\(0, 1\], got 0"),
        ("--merge a --density 1.5", r"\(0, 1\], got 1.5"),
        ("--method linear --merge a", "linear needs --weight"),
        ("--method linear --merge a --weight 1 --density 0.5", "--density is for ties"),
        ("--method linear --merge a --weight 1 --naive-count", "--naive-count is for ties"),
        ("--method linear --merge a --weight 1 --merge b --weight -1", "cannot be normalised"),
        ("--method slerp --merge a", "slerp needs --weight"),
        ("--method slerp --merge a --merge b --weight 0.5", "exactly two models.*got 3"),
        ("--method slerp --merge a --weight 1.5", r"t in \[0, 1\], got 1.5"),
        ("--method slerp --merge a --weight 0.5 --normalize", "not for slerp"),
        ("--method slerp --merge a --weight 0.5 --no-normalize", "not for slerp"),
        ("--method slerp --merge a --weight 0,1,1.5", r"t in \[0, 1\], got 1.5"),
        ("--method slerp --merge a --weight mlp:0,2 --weight 0.5", r"t in \[0, 1\], got 2"),
        ("--method slerp --merge a --weight mlp:0.5", "one --weight.*got 0"),
        ("--method slerp --merge a --weight 1 --weight mlp:1 --weight mlp:0", "mlp: given twice"),
        ("--merge a --weight mlp:0.5", "filters by name are for slerp"),
        ("--merge a --density mlp:0.5", "filters by name are for slerp"),
        ("--merge a --density 0.5,0", r"\(0, 1\], got 0"),
        ("--merge a --weight 1,-1", "--no-normalize"),
        ("--merge a --merge b --weight 0,1 --merge c", "--weight 0,1 stands between"),
    ],
)
def test_bad_settings_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved("--base-model", "base", *arguments.split())


def test_ties_needs_a_base_and_slerp_two_models() -> None:
    with pytest.raises(ValueError, match="ties needs --base-model"):
        resolved("--merge", "a")
    with pytest.raises(ValueError, match="exactly two models"):
        resolved("--method", "slerp", "--merge", "a", "--weight", "0.5")
    with pytest.raises(ValueError, match="one --weight"):
        resolved(*"--method slerp --merge a --weight 0.5 --merge b --weight 0.5".split())


def test_all_bad_settings_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"(?s)3 problems:.*--density: .*--method ties.*--weight"):
        resolved(*"--merge a --merge b --merge c --weight 1 --weight 1 --density 2".split())


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


# -------------------------------------------------------------------- methods


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


def test_same_inputs_same_bytes(make: Make, tmp_path: Path) -> None:
    base, a, b = (str(make("qwen3-moe", seed)) for seed in range(3))
    arguments = ["--base-model", base, "--merge", a, "--merge", b, "--max-shard-size", "40KB"]
    arguments += ["--no-model-card"]  # it names the output
    assert main.main([str(tmp_path / "one"), *arguments]) == 0
    assert main.main([str(tmp_path / "two"), *arguments]) == 0
    assert len(contents(tmp_path / "one")) > 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


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


# -------------------------------------------------------------------- dtypes and heads


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
    from safetensors.torch import save_file

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


# -------------------------------------------------------------------- the command line


def test_no_cuda_is_a_clear_error(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    text = fails(capsys, output, "--cuda", "--base-model", make("llama"), "--merge", make("llama"))
    assert "no CUDA device" in text
    assert not output.exists()


def test_the_script_runs_as_a_command(make: Make, output: Path) -> None:
    command = [sys.executable, ROOT / "main.py", output, "--base-model", make("llama")]
    command += ["--merge", make("llama", 1)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent.parent)
    assert done.returncode == 0, done.stderr
    loads_clean(output)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not empty" in done.stderr and "Traceback" not in done.stderr


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys, main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--naive-count" in done.stdout
