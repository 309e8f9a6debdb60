"""Bad inputs, one fault each: exit status 2, the culprit named, no traceback, nothing written."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Make, contents, stored
from safetensors.torch import save_file

import bakllama
import main

# A fault changes a folder that holds the models good, other (two Llamas) and broken (a copy of
# good, to be damaged), and may return the arguments of main.py; GOOD_COMMAND is the default.
Fault = Callable[[Path], list[str] | None]
GOOD_COMMAND = "out --base-model good --merge broken --merge other".split()


def command(text: str) -> Fault:
    return lambda root: text.split()


def config(**changes: object) -> Fault:
    def fault(root: Path) -> None:
        file = root / "broken" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return fault


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Fault:
    def fault(root: Path) -> None:
        values = stored(root / "broken")
        change(values)
        save_file(values, root / "broken" / "model.safetensors", metadata={"format": "pt"})

    return fault


def file(name: str, content: bytes | str | None) -> Fault:
    def fault(root: Path) -> None:
        path = root / "broken" / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return fault


def index(weight_map: object) -> Fault:
    """Replace the weights by an index, beside the shard a.safetensors that holds them all."""

    def fault(root: Path) -> None:
        broken = root / "broken"
        (broken / "model.safetensors").rename(broken / "a.safetensors")
        content = weight_map(stored(broken)) if callable(weight_map) else weight_map
        (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))

    return fault


def truncated(size: int) -> Fault:
    def fault(root: Path) -> None:
        path = root / "broken" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return fault


def make_output(*names: str) -> Fault:
    def fault(root: Path) -> None:
        for name in names:
            (root / "out" / name).parent.mkdir(exist_ok=True)
            (root / "out" / name).write_text("mine")

    return fault


def set_value(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda values: values.__setitem__(name, value)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda values: values.__delitem__(name)


def nan_in(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda values: values[name].view(-1).__setitem__(0, torch.nan)


def adapter(root: Path) -> None:
    (root / "broken" / "config.json").rename(root / "broken" / "adapter_config.json")


def fifo_output(root: Path) -> list[str]:
    (root / "plain").write_text("a file")
    return "plain/out --base-model good --merge other".split()


def gpt2(root: Path) -> list[str]:
    return "out --base-model good --merge gpt2".split()


LAYER = "model.layers.2.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Fault, str]] = {
    # options
    "no merge": (command("out --base-model good"), "--merge"),
    "no base": (command("out --merge good"), "--base-model"),
    "density 0": (command("out --base-model good --merge other --density 0"), "--density"),
    "density above 1": (command("out --base-model good --merge other --density 1.01"), "1.01"),
    "density negative": (command("out --base-model good --merge other --density -0.5"), "-0.5"),
    "density nan": (command("out --base-model good --merge other --density nan"), "--density"),
    "weight inf": (command("out --base-model good --merge other --weight inf"), "--weight"),
    "weight -inf": (command("out --base-model good --merge other --weight=-inf"), "--weight"),
    "weight word": (command("out --base-model good --merge other --weight much"), "'much'"),
    "weight negative": (command("out --base-model good --merge other --weight -1"), "--no-normal"),
    "weight beyond float32": (
        command("out --base-model good --merge other --weight 1e39 --no-normalize"),
        "1e+39",
    ),
    "weight missing": (command("out --method linear --merge good"), "--weight"),
    "weights overflow": (
        command("out --method linear --merge good --weight 1e308 --merge other --weight 1e308"),
        "cannot be normalised",
    ),
    "weights cancel": (
        command("out --method linear --merge good --weight 1 --merge other --weight -1"),
        "cannot be normalised",
    ),
    "weight ambiguous": (
        command("out --base-model good --merge good --weight 1 --merge other"),
        "stands between",
    ),
    "weights too many": (
        command("out --base-model good --merge other --weight 1 --weight 2"),
        "2 times for 1",
    ),
    "density unused": (
        command("out --method linear --merge good --weight 1 --density 1"),
        "--density is for ties",
    ),
    "naive count unused": (
        command("out --method slerp --merge good --merge other --weight 0.5 --naive-count"),
        "--naive-count is for ties",
    ),
    "normalize unused": (
        command("out --method slerp --merge good --merge other --weight 0.5 --no-normalize"),
        "--no-normalize",
    ),
    "t outside": (
        command("out --method slerp --merge good --merge other --weight 1.5"),
        "1.5",
    ),
    "t twice": (
        command("out --method slerp --merge good --weight 0.5 --merge other --weight 0.5"),
        "one --weight",
    ),
    "slerp of three": (
        command("out --method slerp --base-model good --merge good --merge other --weight 0.5"),
        "exactly two",
    ),
    "method unknown": (command("out --method dare --merge good"), "dare"),
    "option unknown": (command("out --merge good --wieght 1"), "--wieght"),
    "dtype unknown": (command("out --base-model good --merge other --dtype int8"), "int8"),
    "shard size": (
        command("out --base-model good --merge other --max-shard-size big"),
        "--max-shard-size",
    ),
    "shard size 0": (
        command("out --base-model good --merge other --max-shard-size 0MB"),
        "--max-shard-size",
    ),
    # paths
    "model missing": (command("out --base-model good --merge ./nowhere"), "./nowhere"),
    "base missing": (command("out --base-model ./nowhere --merge good"), "./nowhere"),
    "model is a file": (command("out --base-model good --merge good/config.json"), "found a file"),
    "model not in cache": (command("out --base-model good --merge org/nowhere"), "org/nowhere"),
    "revision not in cache": (
        command("out --base-model good --merge org/nowhere@v1"),
        "org/nowhere@v1",
    ),
    "output is an input": (command("good --base-model good --merge other --overwrite"), "input"),
    "output in an input": (command("good/out --base-model good --merge other"), "input good"),
    "output around an input": (command(". --base-model good --merge other --overwrite"), "input"),
    "output is a file": (
        lambda root: (root / "out").write_text("mine") and None,
        "the output is a file",
    ),
    "output below a file": (fifo_output, "plain is a file"),
    "output is the root": (command("/ --base-model good --merge other"), "root directory"),
    "output name too long": (
        command(f"{'x' * 250} --base-model good --merge other"),
        "name is too long",
    ),
    "output with a null": (command("out\0 --base-model good --merge other"), "null"),
    "empty name": (lambda root: ["out", "--base-model", "good", "--merge", ""], "--merge"),
    "no such user": (command("out --base-model good --merge ~nobody-here/m"), "~nobody-here/m"),
    "output not empty": (make_output("config.json"), "--overwrite"),
    "output not a model": (
        lambda root: make_output("thesis.txt")(root) or [*GOOD_COMMAND, "--overwrite"],
        "not a model",
    ),
    # configs
    "no config": (file("config.json", None), "no config.json"),
    "config not JSON": (file("config.json", "{"), "config.json"),
    "config not an object": (file("config.json", "[]"), "config.json"),
    "model type unknown": (config(model_type="quux"), "broken: transformers cannot read"),
    "class unknown": (
        lambda root: (
            config(architectures=["QuuxForCausalLM"])(root)
            or "out --base-model broken --merge good".split()
        ),
        "QuuxForCausalLM",
    ),
    "quantised": (config(quantization_config={"quant_method": "awq"}), "quantised (awq)"),
    "adapter": (adapter, "LoRA adapter"),
    "text config a number": (config(text_config=5), "broken"),
    "prediction layers a word": (
        lambda root: (
            config(num_nextn_predict_layers="x")(root)
            or "out --base-model broken --merge good".split()
        ),
        "broken",
    ),
    "other width": (config(hidden_size=64), "hidden_size is 64, expected the 32"),
    "other depth": (config(num_hidden_layers=5), "num_hidden_layers is 5, expected the 6"),
    "other architecture": (gpt2, "gpt2"),
    **{
        f"donor's {key} {value!r}": (
            lambda root, key=key, value=value: (
                config(**{key: value})(root) or "out --base-model broken --merge good".split()
            ),
            "broken",
        )
        for key, value in (
            ("hidden_act", "nope"),
            ("rope_parameters", {"rope_type": "bogus", "rope_theta": 1e4}),
            ("num_key_value_heads", 0),
            ("pad_token_id", 9_999_999),
            ("architectures", 5),
            ("architectures", [3]),
            ("hidden_size", "wide"),
        )
    },
    # tensors
    "tensor missing": (tensors(without(LAYER)), LAYER),
    "tensor extra": (tensors(set_value("model.extra.weight", torch.ones(3))), "model.extra.weight"),
    "tensor of another shape": (tensors(set_value(LAYER, torch.ones(3, 3))), "(3, 3)"),
    "tensor transposed": (tensors(set_value(LAYER, torch.ones(32, 48))), "(32, 48)"),
    "tensor of integers": (tensors(set_value(LAYER, torch.ones(48, 32).int())), "int32"),
    "tensor of float8": (
        tensors(set_value(LAYER, torch.ones(48, 32).to(torch.float8_e4m3fn))),
        "F8_E4M3",
    ),
    "tensor not finite": (tensors(nan_in(LAYER)), f"broken: {LAYER} contains NaN"),
    "other vocabulary": (
        tensors(set_value("model.embed_tokens.weight", torch.ones(97, 32))),
        "97 rows",
    ),
    "head missing": (tensors(without("lm_head.weight")), "lm_head.weight"),
    # files
    "no weights": (file("model.safetensors", None), "no weights"),
    "weights empty": (file("model.safetensors", ""), "model.safetensors"),
    "weights truncated": (truncated(60_000), "model.safetensors"),
    "header truncated": (truncated(100), "model.safetensors"),
    "weights are text": (file("model.safetensors", "version https://git-lfs"), "model.safetensors"),
    "header too long": (
        file("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
        "model.safetensors",
    ),
    "pickle with code": (
        lambda root: (
            file("model.safetensors", None)(root)
            or torch.save({"x": Path("y")}, root / "broken" / "pytorch_model.bin")
        ),
        "Convert it to safetensors",
    ),
    "pickle of a list": (
        lambda root: (
            file("model.safetensors", None)(root)
            or torch.save([torch.ones(2)], root / "broken" / "pytorch_model.bin")
        ),
        "dictionary of named, dense tensors",
    ),
    "pickle of the old format": (
        lambda root: (
            file("model.safetensors", None)(root)
            or torch.save(
                stored(root / "good"),
                root / "broken" / "pytorch_model.bin",
                _use_new_zipfile_serialization=False,
            )
        ),
        "Convert it to safetensors",
    ),
    "index not JSON": (
        lambda root: (
            index({})(root)
            or (root / "broken" / "model.safetensors.index.json").write_text("{")
            and None
        ),
        "weight_map",
    ),
    "index without a map": (index(None), "weight_map"),
    "index to nothing": (index({LAYER: "b.safetensors"}), "b.safetensors"),
    "index outside": (index({LAYER: "../good/model.safetensors"}), "beside the index"),
    "index absolute": (index({LAYER: "/etc/passwd"}), "beside the index"),
    "index to a missing tensor": (
        index(lambda values: dict.fromkeys([*values, "model.ghost"], "a.safetensors")),
        "model.ghost",
    ),
}


@pytest.fixture
def root(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in (
        ("good", make("llama", 0)),
        ("other", make("llama", 1)),
        ("broken", make("llama", 2)),
        ("gpt2", make("gpt2", 0)),
    ):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def run(script: Callable[[list[str]], int], arguments: list[str]) -> int:
    try:
        return script(arguments)
    except SystemExit as stop:  # argparse's
        return int(stop.code or 0)


@pytest.mark.parametrize("dry", [False, True], ids=["", "dry-run"])
@pytest.mark.parametrize("fault", FAULTS)
def test_main_refuses(
    fault: str, dry: bool, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, culprit = FAULTS[fault]
    arguments = damage(root) or GOOD_COMMAND
    if dry and fault == "tensor not finite":
        pytest.skip("a dry run reads no values")
    before = contents(root)
    assert run(main.main, [*arguments, *(["--dry-run"] if dry else [])]) == 2
    printed = capsys.readouterr()
    assert culprit in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert contents(root) == before
    assert not list(root.rglob("*.partial"))


STACKS = {
    "no file": (None, "stack.yml"),
    "not YAML": ("layer_slices: [", "YAML"),
    "a tag": ("!!python/object/apply:os.system [echo]", "YAML"),
    "a list": ("- 1", "layer_slices"),
    "empty": ("", "layer_slices"),
    "no slices": ("layer_slices: []", "layer_slices"),
    "slices a mapping": ("layer_slices: {model: good}", "layer_slices"),
    "slice a string": ("layer_slices: [good]", "layer_slices[0]"),
    "unknown key": ("layer_slice: [good]", "layer_slice: unknown key"),
    "unknown slice key": (
        "layer_slices: [{model: good, start: 0, end: 1, Scale: 2}]",
        "layer_slices[0].Scale",
    ),
    "model a number": ("layer_slices: [{model: 3, start: 0, end: 1}]", "layer_slices[0].model"),
    "no end": ("layer_slices: [{model: good, start: 0}]", "layer_slices[0].end"),
    "start a string": ('layer_slices: [{model: good, start: "0", end: 1}]', "[0].start"),
    "start a boolean": ("layer_slices: [{model: good, start: false, end: 1}]", "[0].start"),
    "end a float": ("layer_slices: [{model: good, start: 0, end: 1.0}]", "[0].end"),
    "start negative": ("layer_slices: [{model: good, start: -1, end: 1}]", "[0].start"),
    "empty range": ("layer_slices: [{model: good, start: 3, end: 3}]", "start < end"),
    "range reversed": ("layer_slices: [{model: good, start: 3, end: 1}]", "start < end"),
    "range too long": ("layer_slices: [{model: good, start: 0, end: 7}]", "0 to 6 of good"),
    "range beyond integers": (
        f"layer_slices: [{{model: good, start: 0, end: {10**20}}}]",
        "layer_slices[0]",
    ),
    "key twice": (
        "layer_slices: [{model: good, start: 0, end: 1, start: 2}]",
        "layer_slices[0].start: given twice",
    ),
    "a date": ("layer_slices: [{model: good, start: 2001-99-99, end: 1}]", "stack.yml"),
    "a bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "layer_slices: *d",
        "aliases",
    ),
    "scale nan": ("layer_slices: [{model: good, start: 0, end: 1, scale: .nan}]", "[0].scale"),
    "scale a list": ("layer_slices: [{model: good, start: 0, end: 1, scale: [1]}]", "[0].scale"),
    "scale of nothing": (
        "layer_slices: [{model: good, start: 0, end: 1, scale: {o: 1}}]",
        "[0].scale.o",
    ),
    "scale infinite": (
        "layer_slices: [{model: good, start: 0, end: 1, scale: {o_proj: .inf}}]",
        "[0].scale.o_proj",
    ),
    "embedding a list": (
        "{layer_slices: [{model: good, start: 0, end: 1}], embedding_source: [good]}",
        "embedding_source",
    ),
    "head missing": (
        "{layer_slices: [{model: good, start: 0, end: 1}], lm_head_source: ./nowhere}",
        "./nowhere",
    ),
    "model missing": ("layer_slices: [{model: ./nowhere, start: 0, end: 1}]", "./nowhere"),
    "other architecture": (
        "layer_slices: [{model: good, start: 0, end: 1}, {model: gpt2, start: 0, end: 1}]",
        "gpt2",
    ),
}


@pytest.mark.parametrize("fault", STACKS)
def test_bakllama_refuses(fault: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, culprit = STACKS[fault]
    if text is not None:
        (root / "stack.yml").write_text(text)
    before = contents(root)
    assert run(bakllama.main, ["stack.yml", "out"]) == 2
    printed = capsys.readouterr()
    assert culprit in printed.err
    assert "Traceback" not in printed.err
    assert contents(root) == before


def test_the_undamaged_commands_work(root: Path) -> None:
    """So that no case above fails for another reason than its fault."""
    assert main.main([*GOOD_COMMAND, "--dry-run"]) == 0
    assert not (root / "out").exists()
    assert main.main(GOOD_COMMAND) == 0
    (root / "stack.yml").write_text("layer_slices: [{model: good, start: 0, end: 1}]")
    assert bakllama.main(["stack.yml", "out", "--overwrite"]) == 0


def test_all_problems_are_reported_together(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_output("config.json")(root)
    tensors(without(LAYER))(root)
    other = stored(root / "other")
    other["model.norm.weight"] = torch.ones(31)
    save_file(other, root / "other" / "model.safetensors")
    assert main.main([*GOOD_COMMAND, "--max-shard-size", "5 potatoes"]) == 2
    lines = capsys.readouterr().err.split("problems:\n")[1].splitlines()
    culprits = ["--max-shard-size", f"broken: misses {LAYER}", "other: not of the donor's", "out: "]
    assert len(lines) == len(culprits)
    for line, culprit in zip(lines, culprits, strict=True):
        assert line.removeprefix("  - ").startswith(culprit)


def test_bad_options_and_paths_are_reported_together(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "good/out --base-model good --merge ./nowhere --density 2".split()
    assert main.main(arguments) == 2
    text = capsys.readouterr().err
    assert all(part in text for part in ("3 problems", "--density", "./nowhere", "lies in"))
