"""Recipes that are refused: each with its key's path and line, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from helpers import Make, contents, fails

TIES = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters: {weight: 1}
"""
STACK = "merge_method: passthrough\nslices:\n"
PAIR = """\
merge_method: slerp
base_model: base
parameters: {t: 0.5}
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
"""
# Of each recipe: the text, and what the message must have; of the latter, "N: " is line N.
BAD = {
    "no mapping": ("- merge_method: ties", ["expected a mapping"]),
    "a text": ("merge this", ["expected a mapping"]),
    "nothing": ("", ["expected a mapping", "found nothing"]),
    "no YAML": ("merge_method: [ties", ["1: not valid YAML: while parsing a flow"]),
    "a tab": ("merge_method: ties\nmodels:\n\t- model: a", ["3: not valid YAML", "'\\t'"]),
    "aliases": ("merge_method: ties\nmodels: [&a {model: a}, *a]", ["2: not valid YAML: aliases"]),
    "aliases that explode": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmerge_method: ties\n",
        ["aliases"],
    ),
    "two documents": (f"{TIES}---\n{TIES}", ["7: not valid YAML: several documents"]),
    "key twice": (TIES + "merge_method: linear", ["1: merge_method: given twice, again in line 7"]),
    "key twice within": (
        TIES + "parameters:\n  density: 0.5\n  density: 0.7",
        ["parameters.density: given twice, again in line 9"],
    ),
    "no method": ("models: [{model: a}]", ["merge_method: expected one of", "found nothing"]),
    "unknown method": ("merge_method: moe\nmodels: []", ["1: merge_method", "'moe'", "slerp"]),
    "method a list": ("merge_method: [ties]\nmodels: []", ["1: merge_method", "found ['ties']"]),
    "unknown key": (TIES + "modles: []", ["7: modles: unknown key; known are merge_method"]),
    "unknown key of a model": (
        "merge_method: linear\nmodels:\n  - model: a\n    wieght: 1",
        ["4: models[0].wieght: unknown key"],
    ),
    "unknown key of a slice": (
        f"{PAIR}      - {{model: a, layer_range: [0, 4]}}\n    source: []",
        ["8: slices[0].source: unknown key"],
    ),
    "unknown key of a source": (
        f"{STACK}  - sources:\n      - {{model: a, layer_range: [0, 4], layers: 4}}",
        ["4: slices[0].sources[0].layers: unknown key"],
    ),
    "unknown parameter": (
        TIES + "parameters:\n  int_space: cs",
        ["8: parameters.int_space: unknown parameter; ties takes weight, density"],
    ),
    "unknown key of a filter": (
        TIES + "parameters:\n  density:\n    - {filters: mlp, value: 1}",
        ["9: parameters.density[0].filters: unknown key; known are filter, value"],
    ),
    "parameter outside of parameters": (
        TIES + "density: 0.5",
        ["7: density: write it under `parameters`"],
    ),
    "parameter of a model outside": (
        "merge_method: linear\nmodels:\n  - model: a\n    weight: 1",
        ["4: models[0].weight: write it under `parameters`", "needs a weight of a"],
    ),
    "a revision of its own": (
        f"{STACK}  - sources:\n      - {{model: a, layer_range: [0, 4], revision: x}}",
        ["slices[0].sources[0].revision: write it behind", "NAME@REVISION"],
    ),
    "range of a whole model": (
        "merge_method: linear\nmodels:\n  - {model: a, layer_range: [0, 4]}",
        ["3: models[0].layer_range: whole models have none"],
    ),
    "modules": (
        "merge_method: karcher\nmodules:\n  default:\n    models: [{model: a}, {model: b}]",
        ["2: modules: no model is merged by modules"],
    ),
    "both": (PAIR + "models: [{model: a}]", ["either `models` or `slices`, found both"]),
    "neither": ("merge_method: linear", ["either `models` or `slices`, found neither"]),
    "models of nothing": ("merge_method: linear\nmodels:", ["found neither"]),
    "no models": ("merge_method: linear\nmodels: []", ["2: models: expected a list", "found []"]),
    "models a mapping": (
        "merge_method: linear\nmodels: {model: a}",
        ["2: models: expected a list of entries"],
    ),
    "a model a text": ("merge_method: linear\nmodels: [a]", ["2: models[0]: expected a mapping"]),
    "a model a number": (
        "merge_method: linear\nmodels:\n  - {model: 3, parameters: {weight: 1}}",
        ["3: models[0].model: expected the name of a model, found 3"],
    ),
    "a model without path": (
        "merge_method: linear\nmodels:\n  - model: {model: {pth: a}}",
        ["models[0].model.model.pth: unknown key", "models[0].model.model.path: expected the name"],
    ),
    "two adapters": (
        "merge_method: linear\nmodels: [{model: a+b+c, parameters: {weight: 1}}]",
        ["2: models[0].model: a+b+c: expected BASE+ADAPTER"],
    ),
    "another class": (
        "merge_method: linear\nmodels:\n  - model: {model: a, override_architecture: X}",
        ["3: models[0].model.override_architecture"],
    ),
    "no sources": ("merge_method: linear\nslices:\n  - {}", ["3: slices[0].sources: expected a"]),
    "base of a slice": (
        f"{PAIR}      - {{model: a, layer_range: [0, 4]}}\n    base_model: a",
        ["8: slices[0].base_model: one base is for all slices"],
    ),
    "no base of a slice": (
        f"{PAIR}      - {{model: a, layer_range: [0, 4]}}\n    base_model: 5",
        ["error: recipe.yml, ", "8: slices[0].base_model: expected the name of a model"],
    ),
    "weights that cancel in the last layer": (
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: [1, 2]}}\n"
        "  - {model: b, parameters: {weight: [1, -2]}}",
        ["2: models: at the last layer: weights [2.0, -2.0] sum to 0"],
    ),
    "no range": (
        f"{STACK}  - sources:\n      - model: a",
        ["4: slices[0].sources[0].layer_range: expected [first layer, layer after the last]"],
    ),
    "range of three": (
        f"{STACK}  - sources: [{{model: a, layer_range: [0, 1, 2]}}]",
        ["3: slices[0].sources[0].layer_range", "found [0, 1, 2]"],
    ),
    "range of texts": (
        f'{STACK}  - sources: [{{model: a, layer_range: "first, last"}}]',
        ["3: slices[0].sources[0].layer_range", "found 'first, last'"],
    ),
    "range of nothing": (
        f"{STACK}  - sources: [{{model: a, layer_range: [3, 3]}}]",
        ["3: slices[0].sources[0].layer_range", "above it, found [3, 3]"],
    ),
    "negative range": (
        f"{STACK}  - sources: [{{model: a, layer_range: [-2, 3]}}]",
        ["3: slices[0].sources[0].layer_range", "found [-2, 3]"],
    ),
    "range outside the model": (
        f"{STACK}  - sources:\n      - model: a\n        layer_range: [2, 9]",
        ["5: slices[0].sources[0].layer_range: expected layers within 0 to 6 of a"],
    ),
    "range outside the base": (
        PAIR.replace("[0, 4]", "[4, 8]") + "      - {model: a, layer_range: [0, 4]}",
        ["6: slices[0].sources[0].layer_range: expected layers within 0 to 6 of base"],
    ),
    "sources of different lengths": (
        PAIR + "      - {model: a, layer_range: [0, 3]}",
        ["5: slices[0].sources: expected as many layers of each source, found 4, 3"],
    ),
    "base not among the sources": (
        "merge_method: ties\nbase_model: base\nslices:\n  - sources:\n"
        "      - {model: a, layer_range: [0, 6], parameters: {weight: 1}}",
        ["4: slices[0].sources: base, the base, must be among them"],
    ),
    "no base": (
        "merge_method: ties\nmodels:\n  - {model: a, parameters: {weight: 1}}",
        ["base_model: ties needs it, the model that the others were fine-tuned from"],
    ),
    "no base of slerp": (
        "merge_method: slerp\nparameters: {t: 0.5}\nmodels: [{model: a}, {model: b}]",
        ["base_model: slerp needs it, the model at t = 0"],
    ),
    "base twice": (
        TIES + "  - model: base",
        ["7: models[2]: base is the base, and is listed already"],
    ),
    "base alone in one slice": (
        PAIR.replace("slerp", "ties").replace("t: 0.5", "weight: 1")
        + "      - {model: a, layer_range: [0, 4]}\n"
        + "  - sources: [{model: base, layer_range: [4, 6]}]",
        ["8: slices[1]: expected models besides base"],
    ),
    "a base that is no model": (TIES.replace("base_model: base", "base_model: 7"), ["2: base_mod"]),
    "too many for slerp": (
        "merge_method: slerp\nbase_model: base\nparameters: {t: 0}\n"
        "models: [{model: a}, {model: b}]",
        ["4: models: slerp merges 2 models, found 3"],
    ),
    "too few for model_stock": (
        "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]",
        ["3: models: model_stock merges at least 2 models besides the base, found 1"],
    ),
    "two for passthrough": (
        "merge_method: passthrough\nmodels: [{model: a}, {model: b}]",
        ["2: models: passthrough merges 1 models, found 2"],
    ),
    "a donor beside a base": (
        "merge_method: linear\nbase_model: base\ndonor: base\nparameters: {weight: 1}\n"
        "models: [{model: a}]",
        ["3: donor: give base_model instead"],
    ),
    "no weight": (
        "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n  - model: b",
        ["5: models[1]: linear needs a weight of b"],
    ),
    "no t": (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]",
        ["parameters: slerp needs t"],
    ),
    "no weight for some tensors": (
        TIES.replace("{weight: 1}", "{weight: [{filter: mlp, value: 1}]}"),
        ["no weight of a for", "model.embed_tokens.weight", "no filter matches"],
    ),
    "no t for some tensors": (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\n"
        "parameters: {t: {filter: self_attn, value: 0.5}}",
        ["no t for", "lm_head.weight"],
    ),
    "a weight in words": (
        TIES.replace("weight: 1", "weight: much"),
        ["6: models[1].parameters.weight: expected a number, a list", "found 'much'"],
    ),
    "a weight of nothing": (
        TIES.replace("weight: 1", "weight: "),
        ["models[1].parameters.weight", "found nothing"],
    ),
    "a weight of true": (TIES.replace("weight: 1", "weight: true"), ["weight", "found True"]),
    "a weight of nan": (TIES.replace("weight: 1", "weight: .nan"), ["weight", "found nan"]),
    "an empty gradient": (TIES.replace("weight: 1", "weight: []"), ["weight", "found []"]),
    "numbers among filters": (
        TIES + "parameters:\n  density:\n    - 0.5\n    - {filter: mlp, value: 1}",
        ["9: parameters.density[0]: expected a mapping with the keys filter, value, found 0.5"],
    ),
    "a filter without value": (
        TIES + "parameters:\n  density: [{filter: mlp}]",
        ["8: parameters.density[0].value: expected a number or a list, found nothing"],
    ),
    "a filter of a number": (
        TIES + "parameters:\n  density: [{filter: 3, value: 1}, {value: 1}]",
        ["8: parameters.density[0].filter: expected a part of the names"],
    ),
    "a density of 0": (
        TIES + "parameters: {density: 0}",
        ["3: models: expected density in (0, 1], found 0 for all of a"],
    ),
    "a density of 0 everywhere": (
        TIES + "parameters:\n  density: [{filter: mlp, value: 0}, {value: [0, 0]}]",
        ["3: models: expected density in (0, 1], found 0 for all of a"],
    ),
    "a density of percents": (
        TIES + "parameters:\n  density:\n    - filter: mlp\n      value: [0.5, 50]\n    - value: 1",
        ["10: parameters.density[0].value: expected density in (0, 1], found 50"],
    ),
    "t above 1": (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: [0, 2]}",
        ["4: parameters.t: expected t in [0, 1], found 2"],
    ),
    "normalize in half": (
        TIES + "parameters: {normalize: 0.5}",
        ["7: parameters.normalize: expected true or false, found 0.5"],
    ),
    "normalize by layer": (
        TIES + "parameters: {normalize: [true, false]}",
        ["7: parameters.normalize: expected true or false, found [True, False]"],
    ),
    "a seed of a text": (
        TIES.replace("ties", "dare_ties") + "parameters: {density: 0.5, seed: x}",
        ["7: parameters.seed: expected a whole number"],
    ),
    "an unknown trim scope": (
        TIES + "parameters: {trim_scope: layer}",
        ["7: parameters.trim_scope: expected tensor or model, found 'layer'"],
    ),
    "models trimmed by layer": (
        TIES + "parameters:\n  trim_scope: model\n  density: [0.1, 1]",
        ["8: parameters.trim_scope: model needs whole models, and one density"],
    ),
    "models trimmed in slices": (
        PAIR.replace("slerp", "ties").replace("t: 0.5", "weight: 1, trim_scope: model")
        + "      - {model: a, layer_range: [0, 4]}",
        ["3: parameters.trim_scope: model needs whole models"],
    ),
    "a merged base in slices": (
        PAIR + "      - {model: a, layer_range: [0, 4]}\nmerge_base: true",
        ["8: merge_base: is for whole `models`"],
    ),
    "parameters a list": (TIES + "parameters: [1]", ["7: parameters: expected a mapping of"]),
    "negative weights": (
        TIES.replace("weight: 1", "weight: -1"),
        ["models: negative weights [-1.0] cannot be normalised", "normalize: false"],
    ),
    "weights that cancel": (
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: [-1, 0]}}",
        ["2: models: ", "cannot be normalised"],
    ),
    "epsilon too large": (
        TIES.replace("ties", "della") + "parameters: {density: 0.9}",
        ["3: models: a density of 0.9 and an epsilon of 0.15"],
    ),
    "rows of nuslerp": (
        "merge_method: nuslerp\nparameters: {weight: 1, nuslerp_flatten: false}\n"
        "models: [{model: a}, {model: b}]",
        ["2: parameters.nuslerp_flatten: only true is done here"],
    ),
    "rows of model_stock": (
        "merge_method: model_stock\nbase_model: base\nparameters: {filter_wise: true}\n"
        "models: [{model: a}, {model: b}]",
        ["3: parameters.filter_wise: only false is done here"],
    ),
    "rescaled ties": (
        TIES + "parameters: {rescale: true}",
        ["7: parameters.rescale: only false is done here"],
    ),
    "an unknown dtype": (TIES + "dtype: int8", ["7: dtype: expected one of float16", "'int8'"]),
    "a dtype of a list": (TIES + "out_dtype: [float16]", ["7: out_dtype: expected one of"]),
    "tokenizer and tokenizer_source": (
        TIES + "tokenizer_source: base\ntokenizer: {source: base}",
        ["8: tokenizer: stands beside tokenizer_source"],
    ),
    "tokens of its own": (
        TIES + "tokenizer:\n  source: base\n  tokens: {<s>: {source: a}}",
        ["9: tokenizer.tokens: tokens with embeddings of their own are not made here"],
    ),
    "a tokenizer of a number": (TIES + "tokenizer_source: 3", ["7: tokenizer_source: expected"]),
    "a tokenizer of nobody": (
        TIES + "tokenizer:\n  source: d",
        ["8: tokenizer.source: expected base, union, or a model that is merged (base, a), found d"],
    ),
    "padding to a multiple too large": (
        TIES + "tokenizer: {source: base, pad_to_multiple_of: 100000000}",
        ["7: tokenizer.pad_to_multiple_of: expected a whole number from 1 to 65536"],
    ),
    "a model without a name": (
        "merge_method: linear\nmodels:\n  - {parameters: {density: 1}}",
        ["models[0].model: expected the name", "3: models[0]: linear needs a weight of it"],
    ),
    "a chat template of nobody": (
        TIES + "chat_template: chatlm",
        ["7: chat_template: expected auto, chatml, llama3", "found chatlm"],
    ),
    "a chat template of a number": (TIES + "chat_template: 3", ["7: chat_template: expected a"]),
}


@pytest.fixture
def recipe(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the path of a recipe that is to be written, beside models `base`, `a` and `b`."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).symlink_to(make("llama", seed))
    return tmp_path / "recipe.yml"


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_refused(
    name: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = BAD[name]
    recipe.write_text(text)
    before = set(recipe.parent.iterdir())
    message = fails(capsys, "out", "--recipe", recipe.name)
    for part in expected:
        line, _, rest = part.partition(": ")
        part = f"{recipe.name}, line {line}: {rest}" if line.isdigit() else part
        assert part in message, message
    assert "Traceback" not in message
    assert set(recipe.parent.iterdir()) == before


def test_there_are_many_bad_recipes() -> None:
    assert len(BAD) >= 80


def test_all_problems_are_reported_together(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodles: []\nmodels:\n"
        "  - {model: a, parameters: {weight: x, density: 2}}\n  - {modle: b}\ndtype: int4\n"
    )
    message = fails(capsys, "out", "--recipe", recipe.name)
    assert "7 problems:" in message
    for part in ("modles", "weight", "density", "modle:", "models[1].model", "models[1]:", "dtype"):
        assert part in message


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--method", "linear"], "--method beside --recipe"),
        (["--base-model", "base"], "--base-model beside --recipe"),
        (["--merge", "a"], "--merge beside --recipe"),
        (["--weight", "1"], "--weight beside --recipe"),
        (["--no-normalize"], "--normalize beside --recipe"),
        (["--seed", "3"], "--seed beside --recipe"),
        (["--trim-scope", "model"], "--trim-scope beside --recipe"),
        (["--density", "1", "--lambda", "2"], "--lambda beside --recipe"),
        (["--tokenizer", "union"], "--tokenizer beside --recipe"),
        (["--chat-template", "donor"], "--chat-template beside --recipe"),
        (["--pad-to-multiple-of", "8"], "--pad-to-multiple-of beside --recipe"),
    ],
)
def test_options_that_the_file_speaks_of_are_refused(
    options: list[str], expected: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(TIES)
    assert expected in fails(capsys, "out", "--recipe", recipe.name, *options)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("# A model\n\nNo recipe.\n", "no block of YAML with merge_method"),
        ("```python\nmerge_method: ties\n```\n", "no block of YAML with merge_method"),
        ("# A\n\n```yaml\nmerge_method: ties\nbase: x\n```\n", "README.md, line 5: base: unknown"),
        ("> x\n\n  ~~~~\n  merge_method: [\n  ~~~~\n", "README.md, line 5: not valid YAML"),
    ],
)
def test_bad_cards_are_refused(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(content)
    out = tmp_path / "out"
    assert expected in fails(capsys, out, "--recipe", tmp_path / "README.md")
    assert not out.exists()


def test_files_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "No such file" in fails(capsys, out, "--recipe", tmp_path / "recipe.yml")
    assert "Is a directory" in fails(capsys, out, "--recipe", tmp_path)
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00merge_method")
    assert "cannot be read" in fails(capsys, out, "--recipe", tmp_path / "binary.yml")


def test_an_output_over_the_recipe_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("a", "model")
    Path("model/README.md").write_text(f"# m\n\n```yaml\n{TIES}```\n")
    before = contents(Path("model"))
    fails(capsys, "model", "--recipe", "model/README.md", "--overwrite")
    assert contents(Path("model")) == before
