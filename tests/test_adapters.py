"""LoRA adapters as inputs, against the models that peft makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import Make, fails, loads_clean, make_adapter, stored
from safetensors.torch import load_file, save_file

import bakllama
import main

QV = ["q_proj", "v_proj"]


def as_written(model: str, output: Path) -> dict[str, torch.Tensor]:
    """Write a model through a merge that does not change it."""
    assert main.main([str(output), "--method", "linear", "--merge", model, "--weight", "1"]) == 0
    return stored(output)


def assert_like_peft(written: dict[str, torch.Tensor], base: Path, folder: Path) -> None:
    """Compare with peft's model, within one rounding of the terms (in float32, of their sums)."""
    before, expected = stored(base), stored(folder / "merged")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        terms = expected[name].double().abs()
        if "embed_tokens" in name:  # where peft rounds the change to bfloat16 before it adds it
            terms += before[name].double().abs()
        unit = 2**-7 if tensor.dtype == torch.bfloat16 else 2**-20
        assert ((tensor.double() - expected[name].double()).abs() <= unit * terms + 1e-7).all(), (
            name
        )


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "all linear layers": ("qwen3", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
            "alpha_pattern": {"q_proj": 12, r"^model\.layers\.2\.self_attn\.v_proj": 1},
        },
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("llama-bias", {"bias": "all"}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embedding, tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head, tied": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "whole modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "whole embedding, tied": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "whole head, tied": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "whole embedding, kept tied": (
        "llama-tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "attention of a mixture": ("mixtral", {"target_modules": QV}),
    "gemma": ("gemma3", {"target_modules": ["q_proj", "down_proj"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_gives_what_peft_merges(
    kind: str, dtype: torch.dtype, make: Make, tmp_path: Path, output: Path
) -> None:
    name, settings = ADAPTERS[kind]
    base = make(name, dtype=dtype)
    adapter = make_adapter(base, tmp_path, **settings)
    written = as_written(f"{base}+{adapter}", output)
    assert_like_peft(written, base, tmp_path)
    assert any(not torch.equal(t, written[n]) for n, t in stored(base).items())
    expected = tf.AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings
    assert loads_clean(output).config.tie_word_embeddings == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_of_two_adapters_is_ties_of_the_merged_models(
    dtype: torch.dtype, make: Make, tmp_path: Path
) -> None:
    base = make("llama", dtype=dtype)
    a = make_adapter(base, tmp_path / "a", seed=1, target_modules="all-linear")
    b = make_adapter(base, tmp_path / "b", seed=2, use_rslora=True)
    options = ["--base-model", str(base), "--density", "0.5", "--weight", "1"]
    whole = [str(tmp_path / name / "merged") for name in "ab"]
    arguments = ["--merge", f"{base}+{a}", "--merge", f"{base}+{b}"]
    assert main.main([str(tmp_path / "ours"), *options, *arguments]) == 0
    arguments = ["--merge", whole[0], "--merge", whole[1]]
    assert main.main([str(tmp_path / "theirs"), *options, *arguments]) == 0
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    for name in theirs:
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_an_adapted_model_can_be_stacked(
    make: Make, tmp_path: Path, output: Path
) -> None:
    base = make("llama")
    adapter = make_adapter(base, tmp_path)
    stack = tmp_path / "stack.yml"
    stack.write_text(
        f"layer_slices: [{{model: {base}, start: 0, end: 2}}, "
        f"{{model: {base}+{adapter}, start: 2, end: 4}}]"
    )
    assert bakllama.main([str(stack), str(output)]) == 0
    merged, plain = stored(tmp_path / "merged"), stored(base)
    for layer, source in ((1, plain), (2, merged)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(stored(output)[name], source[name])


def change_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(adapter: Path, edit: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


FAULTS: dict[str, tuple[Any, str]] = {
    "dora": (lambda a: change_config(a, use_dora=True), "has use_dora"),
    "other kind": (lambda a: change_config(a, peft_type="IA3"), "of type IA3, expected LORA"),
    "changed base": (lambda a: change_config(a, init_lora_weights="pissa"), "initialised by pissa"),
    "stranger": (
        lambda a: change_tensors(
            a, lambda t: t.update({"base_model.model.x.weight": torch.ones(2)})
        ),
        "base_model.model.x.weight matches no tensor",
    ),
    "factors of a stranger": (
        lambda a: change_tensors(
            a,
            lambda t: t.update(
                {f"base_model.model.x.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
            ),
        ),
        "x.lora_A.weight matches no tensor",
    ),
    "half": (
        lambda a: change_tensors(a, lambda t: t.pop(f"{LAYER}.lora_B.weight")),
        "expected two factors of model.layers.0.self_attn.q_proj",
    ),
    "shape": (
        lambda a: change_tensors(
            a, lambda t: t.update({f"{LAYER}.lora_B.weight": torch.ones(7, 4)})
        ),
        r"do not make a change of model.layers.0.self_attn.q_proj.weight",
    ),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "no adapter_model"),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "so it is no adapter"),
    "alpha of no number": (lambda a: change_config(a, lora_alpha=[16]), "lora_alpha: expected a"),
    "no alpha": (lambda a: change_config(a, lora_alpha=None), "lora_alpha: expected a finite"),
    "patterns": (lambda a: change_config(a, alpha_pattern=["x"]), "expected a mapping"),
    "pattern": (lambda a: change_config(a, alpha_pattern={"(": 3}), "not a regular expression"),
    "integers": (
        lambda a: change_tensors(
            a, lambda t: t.update({f"{LAYER}.lora_B.weight": torch.ones(32, 4, dtype=torch.int8)})
        ),
        "is torch.int8, expected a floating dtype",
    ),
    "rank zero": (
        lambda a: change_tensors(
            a,
            lambda t: t.update(
                {
                    f"{LAYER}.lora_A.weight": torch.ones(0, 32),
                    f"{LAYER}.lora_B.weight": torch.ones(32, 0),
                }
            ),
        ),
        "do not make a change",
    ),
    "magnitudes": (
        lambda a: change_tensors(
            a, lambda t: t.update({f"{LAYER}.lora_magnitude_vector": torch.ones(32)})
        ),
        "lora_magnitude_vector matches no tensor",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_cannot_be_applied_are_refused(
    fault: str, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = FAULTS[fault]
    base = make("llama")
    adapter = make_adapter(base, tmp_path)
    spoil(adapter)
    model = f"{base}+{adapter}"
    text = fails(capsys, output, "--method", "linear", "--merge", model, "--weight", "1")
    assert message in text and "Traceback" not in text
    assert not output.exists()


def test_the_output_may_not_be_in_an_adapter(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("llama")
    adapter = make_adapter(base, tmp_path)
    model = f"{base}+{adapter}"
    arguments = ["--method", "linear", "--merge", model, "--weight", "1"]
    assert "lies in the input" in fails(capsys, adapter / "out", *arguments)


MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha of zero": ("llama", {"lora_alpha": 0}),
    "whole embedding, factors of the head, tied": (
        "llama-tied",
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ),
    "weight tying asked for in vain": (
        "gpt2",
        {
            "target_modules": ["c_attn"],
            "modules_to_save": ["wte"],
            "fan_in_fan_out": True,
            "ensure_weight_tying": True,
        },
    ),
    "biases of whole modules": (
        "llama-bias",
        {"bias": "all", "modules_to_save": ["up_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", MORE)
def test_odd_adapters_give_what_peft_merges(
    kind: str, pickled: bool, make: Make, tmp_path: Path, output: Path
) -> None:
    name, settings = MORE[kind]
    base = make(name, dtype=torch.float32)
    adapter = make_adapter(base, tmp_path, **settings)
    if pickled:  # in the order in which peft writes a .bin: heads after embeddings
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors = dict(sorted(tensors.items(), key=lambda item: "lm_head" in item[0]))
        torch.save(tensors, adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    assert_like_peft(as_written(f"{base}+{adapter}", output), base, tmp_path)
    if kind == "alpha of zero":
        assert all(torch.equal(t, stored(base)[n]) for n, t in stored(output).items())


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_stores_only_the_head_of_a_tie(
    make: Make, tmp_path: Path, output: Path
) -> None:
    base = make("llama-tied", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path, modules_to_save=["lm_head"])
    headed = tmp_path / "headed"
    shutil.copytree(base, headed)
    tensors = stored(base)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, headed / "model.safetensors", metadata={"format": "pt"})
    assert_like_peft(as_written(f"{headed}+{adapter}", output), base, tmp_path)
