"""Layer gradients and name filters, against an oracle that knows each architecture's names."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Make, loads_clean, stored
from test_main import fails
from test_merge_methods import linear_oracle, slerp_oracle, ties_oracle, ulps

import architecture as arch
import main
from schedules import Schedule, interpolate, parse_values, places

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


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text, word, values",
    [
        ("0.5", None, (0.5,)),
        ("0,0.5,1", None, (0.0, 0.5, 1.0)),
        ("-0.5,1", None, (-0.5, 1.0)),
        ("self_attn:0,1", "self_attn", (0.0, 1.0)),
        ("mlp.down_proj:1e-1", "mlp.down_proj", (0.1,)),
    ],
)
def test_values_are_parsed(text: str, word: str | None, values: tuple[float, ...]) -> None:
    assert parse_values(text) == (word, values)


@pytest.mark.parametrize("text", ["", "a", "0,", ",1", "0;1", "nan", "0,inf", ":1", "mlp:", ".:1"])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_values(text)


@pytest.mark.parametrize(
    "values, place, expected",
    [
        ((3.0,), 0.4, 3.0),
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 0.5, 0.0), 0.5, 0.5),
        ((0.0, 0.5, 0.0), 0.75, 0.25),
        ((1.0, 0.0, 4.0), 1.0, 4.0),
        ((-1.0, 1.0), 0.5, 0.0),
    ],
)
def test_values_are_interpolated_linearly(
    values: tuple[float, ...], place: float, expected: float
) -> None:
    assert interpolate(values, place) == pytest.approx(expected, abs=1e-15)


def test_the_first_filter_that_matches_a_component_wins() -> None:
    schedule = Schedule((0.5,), (("self_attn", (0.0, 1.0)), ("mlp.down_proj", (0.9,))))
    assert schedule.at("model.layers.3.self_attn.q_proj.weight", 0.25) == 0.25
    assert schedule.at("model.layers.3.mlp.down_proj.weight", 0.25) == 0.9
    assert schedule.at("model.layers.3.mlp.up_proj.weight", 0.25) == 0.5
    assert schedule.at("model.layers.3.my_self_attn.weight", 0.25) == 0.5  # not a component
    assert str(schedule) == "self_attn:0,1 mlp.down_proj:0.9 0.5"


def test_places_of_odd_models() -> None:
    """Two stacks, layers that predict more tokens, a stack of one layer."""
    names = [f"vision.layers.{i}.m.w" for i in range(3)]
    names += [f"text.layers.{i}.m.w" for i in range(6)]
    names += ["text.embed.weight", "head.weight", "single.layers.0.m.w", "mtp.layers.0.m.w"]
    names += [f"merger.mlp.{i}.weight" for i in (0, 2)] + [f"embeds.{i}.weight" for i in range(4)]
    found = places(names, {"text.embed.weight", *names[-4:]}, depth=5, beyond=1)
    assert [found[f"vision.layers.{i}.m.w"] for i in range(3)] == [0, 0.5, 1]
    assert [found[f"text.layers.{i}.m.w"] for i in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert (found["text.embed.weight"], found["head.weight"]) == (0, 1)
    assert {found[f"merger.mlp.{i}.weight"] for i in (0, 2)} == {found["mtp.layers.0.m.w"]} == {1}
    assert {found[f"embeds.{i}.weight"] for i in range(4)} == {0}
    assert found["single.layers.0.m.w"] == 0
    experts = places([f"m.layers.{i}.experts.{e}.w" for i in range(3) for e in range(9)], (), 3)
    assert found and {experts[f"m.layers.1.experts.{e}.w"] for e in range(9)} == {0.5}


# -------------------------------------------------------------------- merges


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
    assert "weight, mlp (18): 1 0.8 0.6 0.4 0.2 0\n" in text
    assert "weight, the rest (39): 0 0.1 0.2 0.3 0.4 0.5\n" in text


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
    merges = ["--merge", a, "--weight", "-1,1", "--merge", b, "--weight", "1"]
    text = fails(capsys, output, "--method", "linear", *merges)
    assert "sum to 0 and cannot be normalised" in text and " of 57 tensors, weights" in text
    assert not output.exists()


@pytest.mark.parametrize(
    "name, is_before",
    [
        ("model.embed_tokens.weight", True),
        ("transformer.word_embeddings_layernorm.weight", True),
        ("model.decoder.project_in.weight", True),
        ("vision_model.class_embedding", True),
        ("vision_tower.pre_layrnorm.weight", True),
        ("vision_model.layernorm_pre.weight", True),
        ("model.encoder.conv1.weight", True),
        ("model.norm.weight", False),
        ("model.decoder.project_out.weight", False),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", False),
        ("model.altup_unembed_projections.0.weight", False),
        ("mtp.pre_fc_norm_embedding.weight", False),
        ("model.embedding_norm.weight", False),  # LFM2's final norm
    ],
)
def test_names_tell_what_stands_before_the_layers(name: str, is_before: bool) -> None:
    before = arch.BEFORE_LAYERS.search(name) and not arch.AFTER_LAYERS.search(name)
    assert bool(before) == is_before
