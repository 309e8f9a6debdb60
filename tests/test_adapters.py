"""LoRA adapters as inputs, against the models that peft makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from architectures import OTHER_CLASSES
from helpers import Make, fails, loads_clean, make_adapter, make_other, rewrite, stored, word_level
from safetensors.torch import load_file, save_file

import bakllama
import main

SAVED = "adapter_model.safetensors"
PREFIX = "base_model.model."
QV = ["q_proj", "v_proj"]


def as_written(model: str, output: Path) -> dict[str, torch.Tensor]:
    """Write a model through a merge that does not change it."""
    assert main.main([str(output), "--method", "linear", "--merge", model, "--weight", "1"]) == 0
    return stored(output)


def assert_like_peft(written: dict[str, torch.Tensor], base: Path, folder: Path) -> None:
    """Compare with peft's model, within one rounding of the terms (in float32, of their sums)."""
    before, expected = stored(base), stored(folder / "merged")
    saved = load_file(adapter) if (adapter := folder / "adapter" / SAVED).exists() else {}
    for key, tensor in saved.items():  # embeddings of another number of rows, perhaps
        name = key.removeprefix(PREFIX).replace(".base_layer", "")
        before |= {name: tensor} if name in before else {}
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


# -------------------------------------------------------------------- more tokens than the base


BOTH = ["embed_tokens", "lm_head"]
RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "not trained": ("llama", {}),
    "whole": ("llama", {"modules_to_save": BOTH}),
    "whole embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "whole head": ("llama", {"modules_to_save": ["lm_head"]}),
    "factors": ("llama", {"target_modules": [*QV, *BOTH]}),
    "not trained, tied": ("llama-tied", {}),
    "whole, tied": ("llama-tied", {"modules_to_save": BOTH}),
    "whole embedding, tied": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "whole head, tied": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "factors, tied": ("llama-tied", {"target_modules": [*QV, *BOTH]}),
    "factors of the embedding, tied": ("llama-tied", {"target_modules": [*QV, "embed_tokens"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "per-token bias": ("phi", {"modules_to_save": BOTH}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, rows", [(kind, 101) for kind in RESIZED] + [("whole", 90), ("factors, tied", 90)]
)
def test_resized_embeddings_give_what_peft_merges(
    kind: str,
    rows: int,
    make: Make,
    tmp_path: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, settings = RESIZED[kind]
    base = make(name, dtype=torch.float32)
    adapter = make_adapter(base, tmp_path, rows=rows, **settings)
    written = as_written(f"{base}+{adapter}", output)
    assert_like_peft(written, base, tmp_path)
    expected = tf.AutoConfig.from_pretrained(tmp_path / "merged")
    config = loads_clean(output).config
    assert (config.vocab_size, config.tie_word_embeddings) == (rows, expected.tie_word_embeddings)
    printed = capsys.readouterr().err
    assert (
        f"{base}+{adapter}: the adapter brings embeddings of {rows} rows; no tokenizer" in printed
    )


def with_words(folder: Path, words: list[str]) -> Path:
    word_level(words).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_resized_adapters_tokenizer_is_the_outputs(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokens name the rows: those of the model's own are known by them in another merge."""
    words = [f"w{i}" for i in range(96)]
    base = with_words(shutil.copytree(make("llama", dtype=torch.float32), tmp_path / "b"), words)
    adapter = make_adapter(base, tmp_path, rows=98, modules_to_save=BOTH)
    with_words(adapter, [*words[:96], "new", "newer"])
    model = f"{base}+{adapter}"
    assert_like_peft(as_written(model, output), base, tmp_path)
    tokenizer = "tokenizer.json"
    assert (output / tokenizer).read_bytes() == (adapter / tokenizer).read_bytes()
    assert "98 rows; the tokenizer is that in the adapter's folder" in capsys.readouterr().err

    # As a model to merge, with a base whose rows are in another order and that knows one new token.
    shuffled = torch.randperm(97, generator=torch.Generator().manual_seed(3)).tolist()
    tensors, known = stored(base), [*words, "new"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(1, 32)])[shuffled]
    other = with_words(rewrite(base, tmp_path / "o", tensors), [known[i] for i in shuffled])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    merge = ["--base-model", other, "--method", "linear", "--merge", model, "--weight", "1"]
    assert main.main([str(a) for a in [tmp_path / "second", *merge]]) == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = stored(tmp_path / "merged")[name][shuffled]
        torch.testing.assert_close(stored(tmp_path / "second")[name], expected, rtol=0, atol=0)
    assert f"1 tokens of {model} are dropped ('newer')" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_tokens_that_an_adapter_adds_in_spare_rows_are_named_by_its_tokenizer(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"w{i}" for i in range(90)]
    base = with_words(shutil.copytree(make("llama", dtype=torch.float32), tmp_path / "b"), words)
    adapter = make_adapter(base, tmp_path, modules_to_save=["embed_tokens"])
    for tokens, is_other in ((words, False), ([*words, "new"], True)):
        with_words(adapter, tokens)
        as_written(f"{base}+{adapter}", output)
        assert word_count(output) == len(tokens)
        printed = capsys.readouterr().err
        assert ("the tokenizer is that in the adapter's folder" in printed) == is_other
        shutil.rmtree(output)


def word_count(folder: Path) -> int:
    return len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])


@pytest.mark.filterwarnings("ignore")
def test_layers_under_resized_embeddings_can_be_stacked(
    make: Make, tmp_path: Path, output: Path
) -> None:
    base = make("llama", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path, rows=99, modules_to_save=BOTH)
    with_words(adapter, [f"w{i}" for i in range(99)])
    stack = tmp_path / "stack.yml"
    stack.write_text(
        f"layer_slices: [{{model: {base}, start: 0, end: 2}}]\n"
        f"embedding_source: {base}+{adapter}\nlm_head_source: {base}+{adapter}"
    )
    assert bakllama.main([str(stack), str(output)]) == 0
    assert loads_clean(output).config.vocab_size == 99
    head = "lm_head.weight"
    assert torch.equal(stored(output)[head], stored(tmp_path / "merged")[head])
    assert word_count(output) == 99


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_rows_that_nobody_brings_are_refused(
    name: str, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make(name, dtype=torch.float32)
    adapter = make_adapter(base, tmp_path, rows=100, modules_to_save=["embed_tokens"])
    change_tensors(adapter, lambda t: [t.pop(key) for key in list(t) if "lm_head" in key])
    merge = ["--method", "linear", "--merge", f"{base}+{adapter}", "--weight", "1"]
    text = fails(capsys, output, *merge)
    assert "lm_head.weight 96, model.embed_tokens.weight 100" in text
    wide = torch.ones(100, 31)
    change_tensors(adapter, lambda t: t.update({f"{PREFIX}model.embed_tokens.weight": wide}))
    text = fails(capsys, output, *merge)
    assert "model.embed_tokens.weight is (100, 31) in the adapter, the model has (96, 32)" in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, target, rows",
    [
        ("bart", "q_proj", 100),
        ("bart", "q_proj", 90),
        ("t5", "q", 100),
        ("bert masked", "query", 90),
    ],
)
def test_resized_embeddings_of_other_classes(
    name: str, target: str, rows: int, tmp_path: Path, output: Path
) -> None:
    """Encoders and decoders share one embedding, which the adapter names once; biases grow too."""
    base, cls = tmp_path / "base", OTHER_CLASSES[name][0]
    tensors = make_other(name, 0, base)
    tensors |= {n: torch.randn(t.shape) for n, t in tensors.items() if n == "final_logits_bias"}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    def resized() -> tf.PreTrainedModel:
        model = cls.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(rows)
        return model

    config = peft.LoraConfig(target_modules=[target], base_model_name_or_path=str(base))
    wrapped = peft.get_peft_model(resized(), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=True)
    written = as_written(f"{base}+{tmp_path / 'adapter'}", output)
    expected = stored(tmp_path / "merged")
    assert written.keys() == expected.keys()
    for tensor in expected:
        torch.testing.assert_close(written[tensor].float(), expected[tensor], rtol=2**-7, atol=0)
    loads_clean(output, cls)
