"""bakllama.py: scale, sources, heads, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from helpers import Make, contents, loads_clean, make_other, rewrite, stack_file, stored

import bakllama
from merging.arithmetic import memory

LONGEST = "max_position_embeddings"


def layer(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_scale_multiplies_all_weights_of_a_slice(make: Make, output: Path, tmp_path: Path) -> None:
    a, b = make("llama-bias", 0), make("llama-bias", 1)
    config = stack_file(
        tmp_path,
        f"""
layer_slices:
  - {{model: {a}, start: 0, end: 2}}
  - {{model: {b}, start: 3, end: 4, scale: 0.9}}
""",
    )
    assert bakllama.main([config, str(output)]) == 0
    stacked = stored(output)
    for part, tensor in layer(stored(a), 1).items():
        assert torch.equal(layer(stacked, 1)[part], tensor)
    scaled = layer(stored(b), 3)
    assert len(scaled) == 16
    for part, tensor in scaled.items():
        assert torch.equal(layer(stacked, 2)[part], (tensor.double() * 0.9).bfloat16()), part


def test_scale_by_module_multiplies_those_alone(make: Make, output: Path, tmp_path: Path) -> None:
    a = make("llama-bias", 0)
    config = stack_file(
        tmp_path,
        f"""
layer_slices:
  - {{model: {a}, start: 2, end: 3, scale: {{o_proj: 0.7, down_proj: 0.5}}}}
""",
    )
    assert bakllama.main([config, str(output)]) == 0
    factors = {"self_attn.o_proj": 0.7, "mlp.down_proj": 0.5}
    for part, tensor in layer(stored(a), 2).items():
        factor = factors.get(part.rpartition(".")[0], 1.0)
        assert torch.equal(layer(stored(output), 0)[part], (tensor.double() * factor).bfloat16())


def test_results_do_not_take_the_memory_of_copied_tensors(
    make: Make, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is a mapped file, which is read again for a layer that is used twice."""
    monkeypatch.setattr(memory, "SMALLEST", 1)
    a = make("llama", 0)
    before = contents(a)
    slices = (f"{{model: {a}, start: 0, end: 4, scale: {s}}}" for s in ("1.0", "{mlp: 0.5}", "1.0"))
    config = stack_file(tmp_path, f"layer_slices: [{', '.join(slices)}]")
    assert bakllama.main([config, str(output), "--threads", "1"]) == 0
    made, source = stored(output), stored(a)
    for number in range(12):
        for part, tensor in layer(source, number % 4).items():
            factor = 0.5 if 4 <= number < 8 and part.startswith("mlp.") else 1.0
            assert torch.equal(layer(made, number)[part], tensor * factor)
    assert contents(a) == before
    memory._unused.clear()


def test_factors_of_nested_modules_multiply(make: Make, output: Path, tmp_path: Path) -> None:
    a = make("llama", 0)
    slices = f"[{{model: {a}, start: 2, end: 3, scale: {{mlp: 0.5, down_proj: 0.7}}}}]"
    assert bakllama.main([stack_file(tmp_path, f"layer_slices: {slices}"), str(output)]) == 0
    for part, tensor in layer(stored(a), 2).items():
        factor = 0.5 * 0.7 if "down_proj" in part else 0.5 if part.startswith("mlp.") else 1.0
        expected = (tensor.double() * factor).bfloat16()
        assert torch.equal(layer(stored(output), 0)[part], expected), part


def test_a_layer_may_be_used_many_times(make: Make, output: Path, tmp_path: Path) -> None:
    a = make("llama", 0)
    one = f"{{model: {a}, start: 1, end: 2}}"
    config = stack_file(tmp_path, "layer_slices: [" + ", ".join([one] * 5) + "]")
    assert bakllama.main([config, str(output)]) == 0
    stacked, source = stored(output), layer(stored(a), 1)
    for number in range(5):
        assert all(torch.equal(layer(stacked, number)[p], t) for p, t in source.items())
    assert loads_clean(output).config.num_hidden_layers == 5


def test_embedding_and_head_come_from_their_sources(
    make: Make, output: Path, tmp_path: Path
) -> None:
    a, b, c, d = (make("llama", seed) for seed in range(4))
    config = stack_file(
        tmp_path,
        f"""
layer_slices:
  - {{model: {a}, start: 0, end: 1}}
  - {{model: {b}, start: 1, end: 2}}
embedding_source: {c}
lm_head_source: {d}
""",
    )
    assert bakllama.main([config, str(output)]) == 0
    stacked = stored(output)
    embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    assert torch.equal(stacked[embedding], stored(c)[embedding])
    assert torch.equal(stacked[norm], stored(d)[norm])
    assert torch.equal(stacked[head], stored(d)[head])
    tokenizer = "tokenizer_config.json"
    assert (output / tokenizer).read_bytes() == (c / tokenizer).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_what_has_no_head_keeps_what_its_config_says_of_ties(
    tied: bool, output: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "classifier"
    make_other("llama classifier", 1, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    text = f"layer_slices: [{{model: {folder}, start: 0, end: 2}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    assert tf.AutoConfig.from_pretrained(output).tie_word_embeddings is tied


@pytest.mark.parametrize("ask", [False, True])
def test_tied_heads(ask: bool, make: Make, output: Path, tmp_path: Path) -> None:
    """Tied sources stay tied, but a head that is asked for by name is kept."""
    a, b = make("llama-tied", 0), make("llama-tied", 1)
    text = (
        f"layer_slices: [{{model: {a}, start: 0, end: 1}}, {{model: {b}, start: 1, end: 2}}]\n"
        + f"lm_head_source: {b}\n" * ask
    )
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    stacked, embedding = stored(output), "model.embed_tokens.weight"
    assert torch.equal(stacked[embedding], stored(a)[embedding])
    assert torch.equal(stacked["model.norm.weight"], stored(b)["model.norm.weight"])
    assert ("lm_head.weight" in stacked) == ask
    model = loads_clean(output)
    assert model.config.tie_word_embeddings == (not ask)
    head = stored(b if ask else a)[embedding]
    assert torch.equal(model.lm_head.weight.bfloat16(), head)


def test_the_head_of_a_tied_source_is_its_embedding(
    make: Make, output: Path, tmp_path: Path
) -> None:
    a, b = make("llama", 0), make("llama-tied", 1)
    text = f"layer_slices: [{{model: {a}, start: 0, end: 1}}, {{model: {b}, start: 1, end: 2}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    assert torch.equal(stored(output)["lm_head.weight"], stored(b)["model.embed_tokens.weight"])
    assert not loads_clean(output).config.tie_word_embeddings


def test_dtype_and_shards(make: Make, tmp_path: Path) -> None:
    a, b = make("mixtral", 0), make("mixtral", 1)
    text = f"layer_slices: [{{model: {a}, start: 0, end: 2}}, {{model: {b}, start: 1, end: 3}}]"
    config = stack_file(tmp_path, text)
    assert bakllama.main([config, str(tmp_path / "one"), "--dtype", "float32"]) == 0
    options = ["--dtype", "float32", "--max-shard-size", "60KB"]
    assert bakllama.main([config, str(tmp_path / "many"), *options]) == 0
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert {t.dtype for t in one.values()} == {torch.float32}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert len(contents(tmp_path / "many")) > len(contents(tmp_path / "one"))


def test_models_that_do_not_fit_are_refused(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make("llama")
    for other, message in (
        (make("gpt2"), "a gpt2 model, whose layers have attn.c_attn"),
        (make("llama", hidden_size=64), "hidden_size is 64, expected the 32"),
        (make("llama", intermediate_size=40), "mlp.down_proj.weight has shape (32, 40)"),
    ):
        slices = f"{{model: {a}, start: 0, end: 1}}, {{model: {other}, start: 0, end: 2}}"
        text = f"layer_slices: [{slices}]"
        assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 2
        assert message in capsys.readouterr().err
        assert not output.parent.exists()


def test_layers_beyond_the_depth_are_left_out(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some checkpoints number modules that predict further tokens like layers after the last."""
    tensors = stored(make("llama", 0))
    extra = {f"model.layers.6.{p}": t + 1 for p, t in layer(tensors, 5).items()}
    a = rewrite(make("llama", 0), tmp_path / "a", tensors | extra)
    text = f"layer_slices: [{{model: {make('llama', 1)}, start: 0, end: 5}}, "
    text += f"{{model: {a}, start: 1, end: 4}}]\nembedding_source: {a}\nlm_head_source: {a}"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    assert "ignored: model.layers.6." in capsys.readouterr().err
    for part, tensor in layer(stored(a), 2).items():
        assert torch.equal(layer(stored(output), 6)[part], tensor)
    assert loads_clean(output).config.num_hidden_layers == 8


def test_a_final_norm_named_after_the_embedding_is_the_heads(output: Path, tmp_path: Path) -> None:
    config = tf.Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        torch.nn.init.normal_(model.model.embedding_norm.weight)
        model.save_pretrained(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    text = f"layer_slices: [{{model: {a}, start: 0, end: 1}}, {{model: {b}, start: 1, end: 2}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    norm = "model.embedding_norm.weight"
    assert torch.equal(stored(output)[norm], stored(b)[norm])
    assert loads_clean(output).config.layer_types == ["conv", "full_attention"]


def test_a_bin_with_one_storage_for_embedding_and_head(
    make: Make, output: Path, tmp_path: Path
) -> None:
    tensors = stored(make("llama", 1))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "config.json").write_bytes((make("llama", 1) / "config.json").read_bytes())
    torch.save(tensors, shared / "pytorch_model.bin")
    text = f"layer_slices: [{{model: {shared}, start: 0, end: 2}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    stacked = stored(output)
    assert torch.equal(stacked["lm_head.weight"], stacked["model.embed_tokens.weight"])


def test_a_head_source_without_a_head_is_refused(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = stored(make("llama", 1))
    del tensors["lm_head.weight"]
    b = rewrite(make("llama", 1), tmp_path / "b", tensors)
    text = f"layer_slices: [{{model: {make('llama', 0)}, start: 0, end: 2}}]\nlm_head_source: {b}"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 2
    assert f"{b}: misses lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_what_stands_after_the_layers_must_fit(
    name: str, make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = stored(make("llama", 1)) | {name: torch.ones(31, dtype=torch.bfloat16)}
    b = rewrite(make("llama", 1), tmp_path / "b", tensors)
    text = f"layer_slices: [{{model: {make('llama', 0)}, start: 0, end: 2}}]\nlm_head_source: {b}"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 2
    printed = capsys.readouterr().err
    assert name in printed and "(31,)" in printed
    assert not output.parent.exists()


def test_token_ids_follow_the_embedding_source(make: Make, output: Path, tmp_path: Path) -> None:
    a, b = make("llama", 0), make("llama", 1, eos_token_id=7, vocab_size=90)
    text = f"layer_slices: [{{model: {a}, start: 0, end: 2}}]\n"
    text += f"embedding_source: {b}\nlm_head_source: {b}"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    model = loads_clean(output)
    assert (model.config.eos_token_id, model.config.vocab_size) == (7, 90)
    assert model.generation_config.eos_token_id == 7


def test_a_layer_that_lacks_a_tensor_names_its_model(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, tensors = make("llama", 0), stored(make("llama", 1))
    del tensors["model.layers.3.mlp.up_proj.weight"]
    b = rewrite(make("llama", 1), tmp_path / "b", tensors)
    text = f"layer_slices: [{{model: {a}, start: 0, end: 1}}, {{model: {b}, start: 2, end: 4}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 2
    expected = f"{b}: LlamaForCausalLM builds a model.layers.2.mlp.up_proj.weight into layers"
    assert expected in capsys.readouterr().err


def test_what_follows_the_layers_is_not_warned_about(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the depth nor a list with an entry a layer is the donor's in the output."""
    a = make("gemma3", 0)
    kinds = ["full_attention", "sliding_attention"] * 2
    b = make("gemma3", 1, num_hidden_layers=4, layer_types=kinds, rms_norm_eps=1e-4)
    text = f"layer_slices: [{{model: {a}, start: 0, end: 2}}, {{model: {b}, start: 1, end: 4}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    printed = capsys.readouterr().err
    warned = [line.split(" is ")[0] for line in printed.splitlines() if "the output has" in line]
    assert warned == [f"warning: {b}: rms_norm_eps"]
    assert loads_clean(output).config.layer_types[2:] == kinds[1:]


def test_positions_follow_a_table_of_them(make: Make, output: Path, tmp_path: Path) -> None:
    """Only where the embedding's source brings a table: without, they are the first slice's."""
    for name, key, expected in (("gpt2", "n_positions", 32), ("llama", LONGEST, 64)):
        a = make(name, 0, **{key: 64})
        b = make(name, 1, **{key: 32}, vocab_size=104)
        text = f"layer_slices: [{{model: {a}, start: 0, end: 2}}]\nembedding_source: {b}\n"
        config = stack_file(tmp_path, f"{text}lm_head_source: {b}")
        assert bakllama.main([config, str(output), "--overwrite"]) == 0
        assert getattr(loads_clean(output).config, key) == expected
