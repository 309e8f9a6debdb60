"""Recipes of mergekit's form: what they mean, and that they make what options make."""

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import jinja2
import pytest
import torch
import transformers as tf
from helpers import Make, contents, fails, loads_clean, make_adapter, stored, word_level
from oracles import linear_oracle, slerp_oracle, ties_oracle, ulps

import main
from merging.problems import Problems
from merging.recipes.chat_templates import BY_NAME
from merging.recipes.methods import METHODS
from merging.recipes.numbers import Schedule
from merging.recipes.recipe import Recipe, Slice, Source, table
from merging.recipes.recipe_files import fenced_blocks, read_recipe
from merging.recipes.recipe_text import as_yaml

NAMES = ("base", "a", "b", "c")


@pytest.fixture
def folder(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a working directory with models `base`, `a`, `b` and `c` in it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        (tmp_path / name).symlink_to(make("llama", seed))
    return tmp_path


def run(output: str, text: str, *options: str) -> Path:
    """Run a recipe, and return its output."""
    Path(f"{output}.yml").write_text(text)
    assert main.main([output, "--recipe", f"{output}.yml", *options]) == 0
    return Path(output)


def tensors_of(output: Path) -> Mapping[str, bytes]:
    return {name: data for name, data in contents(output).items() if name.endswith(".safetensors")}


def read(text: str, tmp_path: Path, name: str = "recipe.yml") -> Recipe:
    (tmp_path / name).write_text(text)
    return read_recipe(tmp_path / name)


# -------------------------------------------------------------------- the same as options

# Shapes of published recipes, and options that ask for the same.
SAME = {
    "gradient slerp in slices": (
        """
slices:
  - sources:
      - model: a
        layer_range: [0, 6]
      - model: b
        layer_range: [0, 6]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
        "--method slerp --base-model a --merge b --weight self_attn:0,0.5,0.3,0.7,1 "
        "--weight mlp:1,0.5,0.7,0.3,0 --weight 0.5 --dtype float32",
    ),
    "slerp with filters for all": (
        """
models: [{model: b}, {model: a}]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: lm_head
      value: [0.55]
    - filter: embed_tokens
      value: [0.7]
    - filter: self_attn
      value: [0.65, 0.35]
    - filter: layernorm
      value: [0.4, 0.6]
    - filter: modelnorm
      value: [0.6]
    - filter: "*"
      value: 0.5 # fallback for rest of tensors
    - filter: mlp
      value: 0.3
""",
        "--method slerp --base-model a --merge b --weight lm_head:0.55 --weight embed_tokens:0.7 "
        "--weight self_attn:0.65,0.35 --weight input_layernorm:0.4,0.6 "
        "--weight post_attention_layernorm:0.4,0.6 --weight 0.5",
    ),
    "slerp with weights": (
        "merge_method: slerp\nbase_model: base\nparameters: {t: 0.45}\n"
        "models: [{model: a, parameters: {weight: 0.7}}]",
        "--method slerp --base-model base --merge a --weight 0.45",
    ),
    "ties as mergekit dumps it": (
        """
base_model:
  model:
    path: base
dtype: bfloat16
merge_method: ties
parameters:
  int8_mask: 1.0
  normalize: 1.0
slices:
- sources:
  - layer_range: [0, 6]
    model: {model: {path: base}}
  - layer_range: [0, 6]
    model:
      model:
        path: a
    parameters: {density: 0.5, weight: 0.5}
  - layer_range: "[0, 6]"
    model:
      model:
        path: b
    parameters: {density: 0.5, weight: 0.3}
""",
        "--base-model base --density 0.5 --merge a --weight 0.5 --merge b --weight 0.3",
    ),
    "ties with gradients and filters": (
        """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
""",
        "--base-model base --merge a --density 1,0.7,0.1 --weight 1 --merge b --density 0.5 "
        "--weight 0,0.3,0.7,1 --merge c --density 0.33 --weight mlp:0.5 --weight 0",
    ),
    "ties keeps all by default": (
        "merge_method: ties\nbase_model: base\nparameters: {weight: 1, normalize: false}\n"
        "models: [{model: base}, {model: a}, {model: b}]",
        "--base-model base --merge a --merge b --weight 1 --density 1 --no-normalize",
    ),
    "dare_ties": (
        """
models:
  - model: base
    # No parameters necessary for base model
  - model: a
    parameters: {density: 0.53, weight: 0.4}
  - model: b
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: base
parameters:
  int8_mask: true
""",
        "--method dare_ties --base-model base --density 0.53 --merge a --weight 0.4 --merge b "
        "--weight 0.3",
    ),
    "dare_linear not rescaled": (
        "merge_method: dare_linear\nbase_model: base\nparameters: {rescale: false, lambda: 1.1}\n"
        'models: [{model: a, parameters: {weight: "1e-1", density: 0.3, seed: 4}}]',
        "--method dare_linear --base-model base --merge a --weight 0.1 --density 0.3 --lambda 1.1 "
        "--no-rescale",
    ),
    "della": (
        "merge_method: della\nbase_model: base\nparameters: {density: 0.5, epsilon: 0.4}\n"
        "models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]",
        "--method della --base-model base --merge a --merge b --weight 0.5 --density 0.5 "
        "--epsilon 0.4",
    ),
    "della_linear with filters": (
        """
models:
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: 0.3
        - filter: mlp
          value: 0.15
        - value: 0.2
      density: 0.6
  - model: b
    parameters:
      weight: {filter: mlp, value: 0.35}
      density: 0.7
base_model: a
merge_method: della_linear
parameters: {normalize: true, epsilon: 0.05, lambda: 1, weight: 0.25, seed: 5}
""",
        "--method della_linear --base-model a --merge b --weight mlp:0.35 --weight 0.25 "
        "--density 0.7 --epsilon 0.05 --normalize --seed 5",
    ),
    "breadcrumbs_ties with gradients": (
        """
models:
  - model: a
    parameters:
      gamma: 0.01
      density: 0.9
      weight: [0.0825, 0.0825, 0.33]
  - model: b
    parameters:
      gamma: 0.02
      density: 0.9
      weight: [0.33, 0.0825, 0.0825]
merge_method: breadcrumbs_ties
base_model: base
parameters: {normalize: false, rescale: 0, int8_mask: true}
""",
        "--method breadcrumbs_ties --base-model base --density 0.9 --merge a --gamma 0.01 --weight "
        "0.0825,0.0825,0.33 --merge b --gamma 0.02 --weight 0.33,0.0825,0.0825",
    ),
    "task_arithmetic with a negative weight": (
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {density: 0.2}\n"
        "models:\n  - model: base\n  - {model: a, parameters: {weight: 1.0}}\n"
        "  - {model: b, parameters: {weight: -0.5}}",
        "--method task_arithmetic --base-model base --merge a --weight 1 --merge b --weight -0.5",
    ),
    "linear of an unlisted base": (
        "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.5}",
        "--method linear --base-model base --merge a --merge b --merge base --weight 0.5",
    ),
    "linear of a listed base": (
        "merge_method: linear\nbase_model: b\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: 2, density: 0.5}}\nout_dtype: float32\n"
        "dtype: torch.float16",
        "--method linear --base-model b --merge a --weight 1 --merge b --weight 2 --dtype float32",
    ),
    "model_stock with weights": (
        "merge_method: model_stock\nbase_model: base\nname: stock\nmodels:\n"
        "  - {model: a, parameters: {weight: [2, 1]}}\n  - model: b\n  - model: c",
        "--method model_stock --base-model base --merge a --merge b --merge c",
    ),
    "sce": (
        "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\n"
        "parameters: {normalize: true, select_topk: [0.2, 0.8], lambda: 0.5}",
        "--method sce --base-model base --merge a --merge b --merge c --select-topk 0.2,0.8",
    ),
    "sce beyond mergekit": (
        "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {lambda: 0.5}\nbeyond_mergekit: true",
        "--method sce --base-model base --merge a --merge b --lambda 0.5",
    ),
    "karcher": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: a}]\n"
        "parameters: {max_iter: 10, tol: 1e-5, weight: [0, 1]}",
        "--method karcher --merge a --merge b --merge a",
    ),
    "nuslerp": (
        "merge_method: nuslerp\nmodels:\n  - {model: a, parameters: {weight: [0.1, 0.3, 0.1]}}\n"
        "  - {model: b, parameters: {weight: [0.9, 0.7, 0.9]}}\n"
        "parameters: {nuslerp_flatten: true, nuslerp_row_wise: false}",
        "--method nuslerp --merge a --weight 0.1,0.3,0.1 --merge b --weight 0.9,0.7,0.9",
    ),
    "nuslerp with a base": (
        "merge_method: nuslerp\nbase_model: base\nparameters: {weight: 0.5}\n"
        "models: [{model: a}, {model: base}, {model: b}]",
        "--method nuslerp --base-model base --merge a --merge b --weight 0.5",
    ),
    "multislerp": (
        "merge_method: multislerp\nparameters: {weight: 0.5, normalize_weights: true, eps: 1e-8}\n"
        "models: [{model: a}, {model: b}, {model: c}]",
        "--method multislerp --merge a --merge b --merge c --weight 0.5",
    ),
    "nearswap": (
        "merge_method: nearswap\nbase_model: base\nparameters: {t: [0.001, 0.05, 0.001]}\n"
        "models: [{model: base}, {model: a}]",
        "--method nearswap --base-model base --merge a --weight 0.001,0.05,0.001",
    ),
    "arcee_fusion": (
        "merge_method: arcee_fusion\nbase_model: base\nmodels:\n"
        "  - {model: a, parameters: {weight: [1, 0.5]}}\n  - {model: base}",
        "--method arcee_fusion --base-model base --merge a",
    ),
    "ramplus_tl": (
        "merge_method: ramplus_tl\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {epsilon: 0.05, r: 0.2, alpha: 0.3}",
        "--method ramplus_tl --base-model base --merge a --merge b --epsilon 0.05 --r 0.2 "
        "--alpha 0.3",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_recipe_makes_what_options_make(name: str, folder: Path) -> None:
    text, options = SAME[name]
    made = run("recipe", text.lstrip("\n"))
    assert main.main(["options", *shlex.split(options)]) == 0
    assert tensors_of(made) == tensors_of(Path("options")) != {}
    config = Path("options/config.json").read_bytes()
    assert Path("recipe/config.json").read_bytes() == config


@pytest.mark.parametrize("name", SAME)
def test_a_recipe_is_put_in_words_that_mean_the_same(name: str, tmp_path: Path) -> None:
    recipe = read(SAME[name][0], tmp_path)
    again = read(as_yaml(recipe), tmp_path, "again.yml")
    for part, other in zip(recipe.slices, again.slices, strict=True):
        assert [(s.model, s.values, s.layers) for s in part.sources] == [
            (s.model, s.values, s.layers) for s in other.sources
        ]
        assert part.values == other.values
    assert (recipe.method, recipe.base, recipe.values, recipe.dtype) == (
        again.method,
        again.base,
        again.values,
        again.dtype,
    )


def test_most_methods_are_among_them() -> None:
    used = {re.findall(r"merge_method: (\w+)", text)[0] for text, _ in SAME.values()}
    assert used <= METHODS.keys() and len(used) >= 16


# -------------------------------------------------------------------- slices

SLICES = """\
merge_method: {method}
base_model: {base}
slices:
  - sources:
      - {{model: a, layer_range: [0, 3]}}
      - {{model: b, layer_range: [0, 3]}}
    parameters: {{{first}}}
  - sources:
      - {{model: b, layer_range: [2, 4]}}
      - {{model: a, layer_range: [1, 3]}}
  - sources:
      - {{model: a, layer_range: [5, 6]}}
      - {{model: b, layer_range: [5, 6]}}
    parameters: {{{last}}}
parameters: {{{all}}}
dtype: float32
"""
# Of each output layer: the layers of a and b, the slice, and the place in it.
LAYERS = [(0, 0, 0, 0.0), (1, 1, 0, 0.5), (2, 2, 0, 1.0), (1, 2, 1, 0.0), (2, 3, 1, 1.0)]
LAYERS += [(5, 5, 2, 1.0)]


def sources_of(name: str) -> tuple[str, str, int, float]:
    """Return the names of a tensor in a and b, its slice, and its place in that."""
    match = re.match(r"model\.layers\.(\d+)\.(.+)", name)
    if match:
        of_a, of_b, part, place = LAYERS[int(match[1])]
        return f"model.layers.{of_a}.{match[2]}", f"model.layers.{of_b}.{match[2]}", part, place
    first = name == "model.embed_tokens.weight"
    return name, name, 0 if first else 2, 0.0 if first else 1.0


def test_slices_of_two_models_by_slerp(folder: Path) -> None:
    text = SLICES.format(
        method="slerp", base="a", first="t: [0.2, 0.6]", last="t: [0.1, 0.9]", all="t: 0.4"
    )
    result, of_a, of_b = stored(run("out", text)), stored(Path("a")), stored(Path("b"))
    loads_clean(Path("out"))
    assert len(result) == len(of_a)
    for name, tensor in result.items():
        in_a, in_b, part, place = sources_of(name)
        t = [0.2 + 0.4 * place, 0.4, 0.1 + 0.8 * place][part]
        oracle = slerp_oracle(of_a[in_a], of_b[in_b], t)
        torch.testing.assert_close(tensor.double(), oracle, rtol=1e-6, atol=1e-7)


def test_slices_of_two_models_by_ties(folder: Path) -> None:
    text = SLICES.format(
        method="ties", base="b", first="density: [0.2, 0.8]", last="", all="weight: 0.7, density: 1"
    )
    result, of_a, base = stored(run("out", text)), stored(Path("a")), stored(Path("b"))
    for name, tensor in result.items():
        in_a, in_base, part, place = sources_of(name)
        density = 0.2 + 0.6 * place if part == 0 else 1.0
        oracle = ties_oracle(base[in_base], [of_a[in_a]], [0.7], [density], True, False)
        torch.testing.assert_close(tensor.double(), oracle, rtol=1e-6, atol=1e-7)


def test_slices_by_linear_follow_the_donor_and_merge_each_source(folder: Path) -> None:
    text = SLICES.format(method="linear", base="c", first="", last="weight: 3", all="weight: 2")
    text = text.replace("[2, 4]}", "[2, 4], parameters: {weight: [1, 5]}}")
    result, of_a, of_b = stored(run("out", text)), stored(Path("a")), stored(Path("b"))
    for name, tensor in result.items():
        in_a, in_b, part, place = sources_of(name)
        weights = [2.0, 1 + 4 * place] if part == 1 else [1.0, 1.0]
        oracle = linear_oracle([of_a[in_a], of_b[in_b]], weights, True)
        torch.testing.assert_close(tensor.double(), oracle, rtol=1e-6, atol=1e-7)
    made = Path("out/tokenizer_config.json").read_bytes()
    assert made == Path("c/tokenizer_config.json").read_bytes()


def test_passthrough_stacks_and_scales(folder: Path) -> None:
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources:
      - model: b
        layer_range: [3, 5]
        parameters:
          scale:
            - {filter: o_proj, value: [0, 0.5]}
            - {filter: down_proj, value: 0.0}
            - {filter: layers.4.mlp.up, value: 0.25}
            - {value: 1.0}
"""
    result, of_a, of_b = stored(run("out", text)), stored(Path("a")), stored(Path("b"))
    assert loads_clean(Path("out")).config.num_hidden_layers == 6
    for name, tensor in result.items():
        match = re.match(r"model\.layers\.(\d+)\.(.+)", name)
        number = int(match[1]) if match else 0
        in_b = match is not None and number >= 4
        source = of_b[f"model.layers.{number - 1}.{match[2]}"] if match and in_b else of_a.get(name)
        source = of_b[name] if name in ("lm_head.weight", "model.norm.weight") else source
        assert source is not None
        scale = 1.0
        if in_b:
            scale = 0.0 if "down_proj" in name else scale
            scale = (number - 4) / 2 if "o_proj" in name else scale
            scale = 0.25 if name == "model.layers.5.mlp.up_proj.weight" else scale
        assert torch.equal(tensor, (source.double() * scale).to(source.dtype)), name


def test_slices_of_all_layers_are_whole_models(folder: Path) -> None:
    models = "merge_method: ties\nbase_model: base\nparameters: {weight: [0.1, 1]}\nmodels:\n"
    models += "  - {model: a, parameters: {density: [0.2, 0.9, 0.5]}}\n  - {model: b}\n"
    slices = models.replace("models:\n", "slices:\n- sources:\n").replace(
        "a,", "a, layer_range: R,"
    )
    slices = slices.replace("b}", "b, layer_range: R}\n  - {model: base, layer_range: R}")
    whole = contents(run("whole", models, "--no-model-card"))
    sliced = contents(run("sliced", slices.replace("R", "[0, 6]"), "--no-model-card"))
    assert whole == sliced


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mixtral", "opt", "qwen3-moe"])
def test_slices_of_all_layers_of_other_architectures(
    name: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").symlink_to(make(name, 1))
    Path("b").symlink_to(make(name.removesuffix("-tied"), 2))  # one of two is tied
    text = "merge_method: slerp\nbase_model: b\nparameters: {t: [0.2, 0.9]}\n"
    sources = "[{model: a, layer_range: [0, 6]}, {model: b, layer_range: [0, 6]}]"
    whole = contents(run("whole", f"{text}models: [{{model: a}}]", "--no-model-card"))
    sliced = contents(run("sliced", f"{text}slices: [{{sources: {sources}}}]", "--no-model-card"))
    assert whole == sliced
    loads_clean(Path("sliced"))


def test_layers_of_different_kinds_are_warned_about(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        Path(name).symlink_to(make("gemma3", seed))
    text = "merge_method: slerp\nbase_model: b\nparameters: {t: 0.5}\nslices:\n- sources:\n"
    text += "  - {model: a, layer_range: [2, 6]}\n  - {model: b, layer_range: [0, 4]}\n"
    config = loads_clean(run("out", text)).config
    of_b = loads_clean(Path("b")).config
    assert config.layer_types == of_b.layer_types[:4] != of_b.layer_types[2:6]
    said = [line for line in capsys.readouterr().err.splitlines() if "different kinds" in line]
    assert any("full_attention in layer 5 of a" in line for line in said)


# -------------------------------------------------------------------- what a recipe says besides


def test_a_base_alone_is_copied_with_its_adapter(
    folder: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(make("llama", 0), folder / "made")
    (folder / "lora").symlink_to(folder / "made" / "adapter")
    text = "merge_method: task_arithmetic\nbase_model: base+lora\nslices:\n- sources:\n"
    text += "  - {layer_range: [0, 6], model: base+lora, parameters: {weight: 1.0}}\n"
    result, expected = stored(run("out", text)), stored(folder / "made" / "merged")
    assert "nothing is merged by task_arithmetic: it is copied" in capsys.readouterr().err
    for name, tensor in expected.items():
        assert ulps(result[name], tensor.double()).max() <= 1, name


@pytest.mark.parametrize(
    "keys, options, dtype",
    [
        ("", [], torch.bfloat16),
        ("dtype: float16", [], torch.float16),
        ("dtype: float32\nout_dtype: bfloat16", [], torch.bfloat16),
        ("dtype: torch.float64", [], torch.float64),
        ("dtype: float16", ["--dtype", "float32"], torch.float32),
        ("dtype: float16", ["--dtype", "auto"], torch.bfloat16),
    ],
)
def test_dtypes(keys: str, options: list[str], dtype: torch.dtype, folder: Path) -> None:
    text = f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{weight: 1}}\n{keys}\n"
    tensors = stored(run("out", text, *options))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    again = Path("again")
    assert main.main([str(again), "--recipe", "out/README.md"]) == 0
    assert tensors_of(again) == tensors_of(Path("out"))


def test_what_has_no_effect_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """\
name: mine
lazy_unpickle: true
merge_method: slerp
base_model: a
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {t: 0.3, density: 0.5}
parameters:
  t: [{filter: nowhere, value: 0}, {value: 0.5}, {filter: mlp, value: 1}]
  int8_mask: true
  embed_slerp: true
"""
    run("out", text)
    said = capsys.readouterr().err
    for part in (
        "no effect here: name, lazy_unpickle, parameters.int8_mask, parameters.embed_slerp\n",
        "no effect here (of slerp): models[0].parameters.weight, models[1].parameters.density\n",
        "no effect here (one t is for all models, and stands beside them): models[1].parameters.t",
        "no effect here (one before it holds): parameters.t[2]\n",
        "filter of t nowhere: matches no tensor",
    ):
        assert said.count(part) == 1, part


def test_values_hold_from_inside_out(tmp_path: Path) -> None:
    recipe = read(
        """\
merge_method: dare_ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - model: a
        layer_range: [0, 2]
        parameters: {weight: {filter: mlp, value: 1}}
      - {model: b, layer_range: [0, 2], parameters: {density: 0.3}}
    parameters:
      weight: [{filter: mlp, value: 2}, {filter: norm, value: 3}]
      density: 0.4
      normalize: 1.0
parameters: {weight: [4, 5], lambda: 0.9, seed: 7}
""",
        tmp_path,
    )
    (part,) = recipe.slices
    a, b = part.sources
    rest = (("norm", (3.0,)),)
    assert a.values["weight"] == Schedule((4.0, 5.0), (("mlp", (1.0,)), *rest), anywhere=True)
    assert b.values["weight"] == Schedule((4.0, 5.0), (("mlp", (2.0,)), *rest), anywhere=True)
    assert [s.values["density"] for s in (a, b)] == [
        Schedule((0.4,), anywhere=True),
        Schedule((0.3,), anywhere=True),
    ]
    assert part.values["normalize"] is True and recipe.values["seed"] == 7
    arguments = recipe.arguments(part, "model.norm.weight", 1.0)
    assert (arguments["weights"], arguments["lambda_"]) == ([3.0, 3.0], 0.9)
    assert part.base is not None and part.base.layers == range(2)
    assert (
        "\nslice 0, seed = 7, normalized, lambda = 0.9\nbase   0 to 2, exclusive  base\n"
        in table(recipe)
    )


@pytest.mark.parametrize(
    "word, name, matched",
    [
        ("layernorm", "model.layers.0.input_layernorm.weight", True),
        ("layers.1", "model.layers.12.mlp.up_proj.weight", True),
        ("layers.1.", "model.layers.12.mlp.up_proj.weight", False),
        ("attn.q", "model.layers.1.self_attn.q_proj.weight", True),
        (".lm_head.", "lm_head.weight", True),
        ("modelnorm", "model.norm.weight", False),
    ],
)
def test_filters_match_anywhere_in_a_name(word: str, name: str, matched: bool) -> None:
    schedule = Schedule((0.0,), ((word, (1.0,)),), anywhere=True)
    assert schedule.at(name, 0.0) == float(matched)


@pytest.mark.parametrize(
    "model, name",
    [
        ("org/a", "org/a"),
        ('" org/a "', "org/a"),
        ("org/a@v1+org/lora", "org/a@v1+org/lora"),
        ("{model: org/a}", "org/a"),
        ("{model: {path: org/a}}", "org/a"),
        ("{model: {path: org/a, revision: v1}, lora: {path: org/l}}", "org/a@v1+org/l"),
        ("{model: org/a, lora: org/l}", "org/a+org/l"),
    ],
)
def test_names_of_models(model: str, name: str, tmp_path: Path) -> None:
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n  - model: {model}\n"
    assert read(text, tmp_path).models == (name,)


def test_tokenizers_and_chat_templates(tmp_path: Path) -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}]\n"
    for keys, expected in {
        "": (None, None, "auto"),
        "tokenizer_source: union": ("union", None, "auto"),
        "tokenizer_source: {model: {path: a}}\nchat_template: '{{ x }}'": ("a", None, "{{ x }}"),
        "chat_template: chatml": (None, None, BY_NAME["chatml"]),
        "tokenizer: {}": ("union", None, "auto"),
        "tokenizer: {source: base, tokens: {}}": ("base", None, "auto"),
        "tokenizer: {pad_to_multiple_of: 8}\nchat_template: auto": ("union", 8, "auto"),
    }.items():
        recipe = read(text + keys, tmp_path)
        assert (recipe.tokenizer, recipe.pad_to_multiple_of, recipe.chat_template) == expected
        again = read(as_yaml(recipe), tmp_path)
        assert (again.tokenizer, again.pad_to_multiple_of, again.chat_template) == expected


SAID = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant"
            "\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA"
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>"
            "assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]"),
        (
            "alpaca",
            "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n"
            "### Response:\n",
        ),
        (
            "exaone",
            "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n"
            "[|assistant|]",
        ),
    ],
)
def test_chat_templates_by_name(name: str, expected: str) -> None:
    messages = [{"role": role, "content": content} for role, content in SAID]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(BY_NAME[name])
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert template.render(messages=messages, **values) == expected


# -------------------------------------------------------------------- cards


def test_the_first_recipe_of_a_card_is_read(tmp_path: Path) -> None:
    card = """\
---
base_model: [x]
---
# A model

```python
merge_method: no
```
<details>

  ~~~~ yaml
  name: first
  merge_method: linear
  models:
    - model: a
      parameters: {weight: 1}
  ~~~~
</details>

```
merge_method: ties
models: [{model: c}]
```
"""
    recipe = read(card, tmp_path, "README.md")
    assert recipe.models == ("a",) and recipe.text.startswith("name: first\nmerge_method: linear\n")
    assert any("has 2 recipes; this is the first" in note for note in recipe.notes)
    assert recipe.slices[0].sources[0].where.endswith("README.md, line 15: models[0].layer_range")


@pytest.mark.parametrize("rest", ["", "parameters: {density: 0.5}\n"])
def test_a_density_of_0_for_some_tensors_alone(rest: str, tmp_path: Path) -> None:
    nothing = "density: {filter: mlp, value: 0}"
    text = f"models:\n  - {{model: a, parameters: {{weight: 1, {nothing}}}}}\nbase_model: base\n"
    recipe = read(f"merge_method: ties\n{text}{rest}", tmp_path)
    given = recipe.arguments(recipe.slices[0], "model.layers.1.mlp.up_proj.weight", 0.5)
    assert given["densities"] == [0.0]
    given = recipe.arguments(recipe.slices[0], "model.norm.weight", 1)
    assert given["densities"] == [0.5 if rest else 1.0]


def test_a_slice_of_one_layer_takes_the_last_of_its_numbers(tmp_path: Path) -> None:
    text = "merge_method: linear\nslices:\n"
    for i, (a, b) in enumerate((("1", "1"), ("[1, 1]", "[-1, 1]"), ("1", "1"))):
        text += "  - sources:\n" + "".join(
            f"      - {{model: {m}, layer_range: [{i}, {i + 1}], parameters: {{weight: {w}}}}}\n"
            for m, w in (("a", a), ("b", b))
        )
    recipe = read(text, tmp_path)
    assert recipe.refusals(recipe.slices[1]) == []
    first = text.replace("weight: 1}", "weight: [1, 1]}", 1).replace(
        "weight: 1}", "weight: [-1, 1]}", 1
    )
    with pytest.raises(Problems, match=r"slices\[0\]: at the first layer: weights \[1.0, -1.0\]"):
        read(first, tmp_path)  # whose first value the embedding takes


def test_a_slice_may_repeat_the_base(tmp_path: Path) -> None:
    layers = "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]"
    text = "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n"
    text += f"  - sources: {layers}\n"
    plain, repeated = read(text, tmp_path), read(text + "    base_model: a\n", tmp_path)
    assert repeated.models == plain.models == ("a", "b")
    assert repeated.schedules() == plain.schedules()


def test_blocks_of_a_card() -> None:
    text = "````md\n```yaml\na\n```\n````\n```yaml title\nb\n  c\n```\n~~~\nd\n~~~\n```yml\nopen\n"
    assert fenced_blocks(text) == [(7, "b\n  c\n"), (11, "d\n"), (14, "open\n")]


# Options of each method that say something that mergekit's YAML has other words for, or none.
OPTIONS = {
    "ties": "--base-model base --merge a --merge base --weight mlp:0,1 --weight 0.5 "
    "--density 0.5,0.9 --naive-count --lambda 0.9",
    "linear": "--base-model base --merge a --weight lm_head:3 --weight 1 --merge b --weight 2 "
    "--no-normalize --dtype float16",
    "slerp": "--merge a --merge b --weight self_attn:0,1 --weight 0.25",
    "task_arithmetic": "--base-model base --merge base --merge a --weight 1 --normalize",
    "nuslerp": "--base-model base --merge a --merge b --weight 1 --lambda 0.5",
    "multislerp": "--merge a --merge b --weight 1,2",
    "karcher": "--base-model base --merge a --weight 1 --merge b --weight 2",
    "model_stock": "--base-model base --merge a --merge b --lambda layers:0.5 --lambda 1",
    "dare_linear": "--base-model base --merge a --weight 1 --density 0.5 --seed 11",
    "dare_ties": "--base-model base --merge a --weight 1 --density 0.5 --no-rescale --normalize",
    "della_linear": "--base-model base --merge a --merge b --weight 1 --density 0.5 --seed 1",
    "della": "--base-model base --merge a --merge b --weight 1 --density 0.5 --epsilon 0.1,0.2",
    "breadcrumbs": "--base-model base --merge a --weight 1 --density 0.5 --gamma mlp:0.1 --gamma 0",
    "breadcrumbs_ties": "--base-model base --merge a --merge b --weight 1 --density 0.5",
    "sce": "--base-model base --merge a --merge b --select-topk 0.3 --lambda 2",
    "ram": "--base-model base --merge a --merge b --epsilon 1e-5 --lambda 0.5",
    "ramplus_tl": "--base-model base --merge a --merge b --r 0.3",
    "nearswap": "--base-model base --merge base --weight 0.01",
    "arcee_fusion": "--base-model base --merge a --lambda 0.5",
}


@pytest.mark.parametrize("name", METHODS)
def test_a_card_makes_the_model_again(name: str, folder: Path) -> None:
    arguments = ["--method", name, *shlex.split(OPTIONS[name])]
    assert main.main(["made", *arguments]) == 0
    assert main.main(["again", "--recipe", "made/README.md"]) == 0
    assert tensors_of(Path("again")) == tensors_of(Path("made")) != {}
    card = Path("again/README.md").read_text()
    assert Path("made/README.md").read_text().split("```yaml")[1].split("```")[0] in card
    assert "no effect" not in card
    loads_clean(Path("again"))


def test_a_recipe_and_a_card_say_whose_words_an_output_has(make: Make, folder: Path) -> None:
    tokens = ["<unk>", *(f"w{i}" for i in range(91)), "w100"]
    for seed, name in enumerate(("plain", "chat"), 4):
        words = [*tokens, "<|im_start|>", "<|im_end|>"] if name == "chat" else tokens
        shutil.copytree(make("llama", seed, vocab_size=len(words)), name)
        tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=word_level(words))
        tokenizer.save_pretrained(name)
    Path("chat.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    options = ["--method", "linear", "--weight", "1", "--merge", "plain", "--merge", "chat"]
    options += ["--pad-to-multiple-of", "8", "--tokenizer"]
    assert main.main(["made", *options, "union", "--chat-template", "chat.jinja"]) == 0
    assert main.main(["again", "--recipe", "made/README.md"]) == 0
    text = (
        "merge_method: linear\nmodels: [{model: plain}, {model: chat}]\nparameters: {weight: 1}\n"
    )
    text += "tokenizer: {pad_to_multiple_of: 8}\nchat_template: chat.jinja\n"
    run("recipe", text)
    made, again, read_from = (contents(Path(name)) for name in ("made", "again", "recipe"))
    for files in (made, again, read_from):
        del files["README.md"]
    assert made == again == read_from
    assert stored(Path("made"))["lm_head.weight"].shape[0] == 96
    run("of_chat", text.replace("tokenizer:", "tokenizer: {source: chat}\nname:"))
    assert main.main(["asked", *options, "chat", "--chat-template", "chat.jinja"]) == 0
    assert stored(Path("of_chat"))["lm_head.weight"].shape[0] == 95


def test_no_copy_tokenizer_beside_a_recipe(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
    run("out", text, "--no-copy-tokenizer")
    assert not Path("out/tokenizer_config.json").exists()
    Path("recipe.yml").write_text(text + "tokenizer_source: union\n")
    message = fails(capsys, "more", "--recipe", "recipe.yml", "--no-copy-tokenizer")
    assert "--no-copy-tokenizer leaves out the tokenizer that the recipe asks for" in message


def test_a_card_of_trimmed_models_makes_them_again(folder: Path) -> None:
    options = "--base-model base --merge a --merge b --density 0.3 --trim-scope model"
    assert main.main(["made", *options.split()]) == 0
    assert main.main(["again", "--recipe", "made/README.md"]) == 0
    assert tensors_of(Path("again")) == tensors_of(Path("made"))


def test_a_card_of_a_recipe_holds_its_text(folder: Path) -> None:
    text = "# mine\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}] # one\n"
    run("out", text)
    assert f"```yaml\n{text}```" in Path("out/README.md").read_text()


PLAIN_TEXT = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1}
"""


@pytest.mark.parametrize(
    "text",
    [
        PLAIN_TEXT.replace("\n", "\r\n"),
        "\ufeff" + PLAIN_TEXT,
        "\n" + "".join(f"  {line}\n" for line in PLAIN_TEXT.splitlines()),
        "%YAML 1.2\n---\n" + PLAIN_TEXT.replace("merge_method", '"merge_method"') + "...\n",
        PLAIN_TEXT + "chat_template: |+\n  {{ messages }}\n\n\n",
    ],
    ids=["Windows", "byte order mark", "indented", "directive", "blank lines that count"],
)
def test_a_card_of_a_recipe_written_in_another_way(text: str, folder: Path) -> None:
    Path("out.yml").write_bytes(text.encode())
    assert main.main(["out", "--recipe", "out.yml"]) == 0
    run("plain", PLAIN_TEXT)
    assert main.main(["again", "--recipe", "out/README.md"]) == 0
    assert tensors_of(Path("out")) == tensors_of(Path("plain")) != {}
    made, again = contents(Path("out")), contents(Path("again"))
    assert {**again, "README.md": b""} == {**made, "README.md": b""}


@pytest.mark.parametrize(
    "layers", ["[1, 4]", '"1, 4"', "1, 4", '["1", "4"]', '"[1,4]"', "\n    - 1\n    - 4"]
)
def test_ranges_of_layers(layers: str, tmp_path: Path) -> None:
    text = "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n"
    (part,) = read(f"{text}    layer_range: {layers}\n", tmp_path).slices
    assert part.sources[0].layers == range(1, 4)


def test_schedules_of_many_slices_are_not_compared_each_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "merge_method: passthrough\nslices:\n"
    for i in range(1000):
        text += (
            f"- sources: [{{model: a, layer_range: [{i}, {i + 1}], parameters: {{scale: {i}}}}}]\n"
        )
    recipe = read(text, tmp_path)
    compared = []
    equal = Schedule.__eq__
    monkeypatch.setattr(
        Schedule, "__eq__", lambda one, other: compared.append(one) or equal(one, other)
    )
    assert len(recipe.schedules()) == 1000
    assert len(compared) < 10_000


@pytest.mark.parametrize(
    "text, value", [("yes", True), ("Off", False), ("1.0", True), ("0", False), ("'true'", True)]
)
def test_switches(text: str, value: bool, tmp_path: Path) -> None:
    recipe = read(PLAIN_TEXT + f"parameters: {{normalize: {text}}}\n", tmp_path)
    assert recipe.values["normalize"] is value


@pytest.mark.parametrize("name", ["1e3", "true", "a: b", "- x", "null", "é", "x#y", "'q'", "[z"])
def test_names_that_look_like_yaml_are_quoted(name: str, folder: Path) -> None:
    Path(name).symlink_to(folder / "a")
    arguments = ["--method", "linear", "--weight", "1", "--merge", f"./{name}", "--merge", "b"]
    assert main.main(["made", *arguments]) == 0
    assert read_recipe(Path("made/README.md")).models == (f"./{name}", "b")
    recipe = Recipe(METHODS["sce"], (Slice((Source("a"), Source("b"))),), name)
    assert read(as_yaml(recipe), folder).base == name
