"""Both scripts end to end, on tiny checkpoints of many architectures."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import BERT, DECODERS, OTHER_CLASSES
from helpers import Make, linear, loads_clean, make_other, stored
from oracles import linear_oracle, ties_oracle, ulps
from safetensors.torch import save_file

import bakllama
import main

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers", "mlp_layer_types")


def generates(folder: Path) -> None:
    model = loads_clean(folder)
    tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 3
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("name", DECODERS)
def test_ties(name: str, make: Make, output: Path) -> None:
    base, a, b = (make(name, seed) for seed in range(3))
    arguments = [str(output), "--base-model", str(base), "--density", "0.4"]
    assert main.main([*arguments, "--merge", str(a), "--merge", str(b)]) == 0

    merged, of_base, of_a, of_b = (stored(folder) for folder in (output, base, a, b))
    assert merged.keys() == of_base.keys()
    for tensor in sorted(merged, key=lambda n: merged[n].numel())[::3]:
        oracle = ties_oracle(
            of_base[tensor], [of_a[tensor], of_b[tensor]], [1, 1], [0.4, 0.4], True, False
        )
        assert merged[tensor].dtype == torch.bfloat16
        torch.testing.assert_close(merged[tensor].double(), oracle, rtol=0.51 * 2**-7, atol=1e-7)
    generates(output)


@pytest.mark.parametrize("name", DECODERS)
def test_stack(name: str, make: Make, output: Path, tmp_path: Path) -> None:
    folders = {seed: make(name, seed) for seed in range(2)}
    chosen = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4), (1, 5)]
    config = tmp_path / "stack.yml"
    config.write_text(f"""
layer_slices:
  - {{model: {folders[0]}, start: 0, end: 4}}
  - {{model: {folders[1]}, start: 2, end: 6}}
""")
    assert bakllama.main([str(config), str(output)]) == 0

    stacked, sources = stored(output), {seed: stored(folders[seed]) for seed in folders}
    prefix = next(n for n in stacked if ".0." in n).split(".0.")[0]
    expected = {}
    for number, (seed, layer) in enumerate(chosen):
        for tensor, value in sources[seed].items():
            if tensor.startswith(f"{prefix}.{layer}."):
                expected[tensor.replace(f"{prefix}.{layer}.", f"{prefix}.{number}.", 1)] = value
    for seed, markers in ((0, ("emb", "wte", "wpe")), (1, ("norm", "ln_f", "head", "embed_out"))):
        for tensor, value in sources[seed].items():
            outside = not tensor.startswith(f"{prefix}.")
            is_head = any(marker in tensor for marker in ("norm", "ln_f", "head", "embed_out"))
            if outside and any(m in tensor for m in markers) and is_head == (seed == 1):
                expected[tensor] = value
    assert stacked.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(stacked[tensor], value), tensor

    model = loads_clean(output)
    donor = type(DECODERS[name]).from_pretrained(folders[0])
    assert model.config.num_hidden_layers == 8
    for key in PER_LAYER:
        entries = getattr(donor, key, None)
        if key == "mlp_only_layers" and entries is not None:
            wanted = [n for n, (_, layer) in enumerate(chosen) if layer in entries]
            assert getattr(model.config, key) == wanted
        elif isinstance(entries, list):
            assert getattr(model.config, key) == [entries[layer] for _, layer in chosen]
    generates(output)


# -------------------------------------------------------------------- other classes


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_other_classes_merge(
    name: str, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_donor = make_other(name, 1, tmp_path / "a")
    of_other = make_other(name, 2, tmp_path / "b")
    assert linear(output, tmp_path / "a", tmp_path / "b") == 0
    result = stored(output)
    assert result.keys() == of_donor.keys()
    for tensor, value in result.items():
        if value.is_floating_point():
            oracle = linear_oracle([of_donor[tensor], of_other[tensor]], [0.5, 0.5], True)
            assert ulps(value, oracle).max() <= 0.51
        else:
            assert torch.equal(value, of_donor[tensor])  # the donor's, not an average
            assert name != "resnet" or not torch.equal(value, of_other[tensor])
    loads_clean(output, OTHER_CLASSES[name][0])


@pytest.mark.parametrize("name", ["gemma3 vision", "qwen2-vl", "t5"])
def test_models_of_several_parts_are_not_stacked(
    name: str, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_other(name, 1, tmp_path / "a")
    config = tmp_path / "stack.yml"
    config.write_text(f"layer_slices: [{{model: {tmp_path / 'a'}, start: 0, end: 1}}]")
    assert bakllama.main([str(config), str(output)]) == 2
    text = capsys.readouterr().err
    assert "encoder-decoder" in text or "its text model alone" in text


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_nested_tie_flags(flags: tuple[bool, bool], tmp_path: Path, output: Path) -> None:
    """A head may be tied by the config as a whole or by its text part."""
    for seed, name in ((1, "a"), (2, "b")):
        folder = tmp_path / name
        make_other("qwen2-vl", seed, folder)
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = flags
        (folder / "config.json").write_text(json.dumps(config))
        tensors = stored(folder)
        tensors.pop("lm_head.weight", None)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert linear(output, tmp_path / "a", tmp_path / "b") == 0
    result = stored(output)
    assert result.keys() == stored(tmp_path / "a").keys()
    name = next(name for name in result if name.endswith("embed_tokens.weight"))
    pair = [stored(tmp_path / folder)[name] for folder in "ab"]
    assert ulps(result[name], linear_oracle(pair, [0.5, 0.5], True)).max() <= 0.51
    loads_clean(output, OTHER_CLASSES["qwen2-vl"][0])


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_masked_heads_tied_in_one_model_only(
    order: tuple[bool, bool], tmp_path: Path, output: Path
) -> None:
    folders = []
    for seed, tied in enumerate(order):
        torch.manual_seed(seed)
        config = tf.BertConfig(**BERT, tie_word_embeddings=tied)
        network = tf.BertForMaskedLM(config).to(torch.bfloat16)
        folders.append(tmp_path / str(seed))
        network.save_pretrained(folders[-1])
    assert linear(output, *folders) == 0
    embedding, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    values = [stored(folder) for folder in folders]
    oracle = linear_oracle([v.get(head, v[embedding]) for v in values], [0.5, 0.5], True)
    assert ulps(stored(output)[head], oracle).max() <= 0.51
    loads_clean(output, tf.BertForMaskedLM)
