"""What is asked: numbers, pairing, the command line, stack files, names of models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Make, stack_file

import bakllama
import main
from merging.problems import Problems, refuse
from merging.recipes.command_line import recipe_from
from merging.recipes.merge_options import build_parser
from merging.recipes.methods import METHODS, PASSTHROUGH
from merging.recipes.model_names import split_adapter
from merging.recipes.numbers import Factors, Schedule, interpolate, parse_values
from merging.recipes.recipe import Recipe, described, table
from merging.recipes.stack_files import read_stack

ROOT = Path(main.__file__).parent

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


# -------------------------------------------------------------------- the command line


def resolved(*arguments: str) -> Recipe:
    """Parse and check arguments; raise for what is wrong."""
    found: list[str] = []
    recipe = recipe_from(build_parser().parse_args(["out", *arguments]), found)
    refuse(found)
    return recipe


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
    (part,) = resolved("--base-model", "base", *arguments.split()).slices
    found = [source.values["weight"] for source in part.sources]
    assert found == [Schedule((weight,)) for weight in weights]


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
        ("--merge a --weight mlp:0.5", "--weight mlp: a filter stands before the number"),
        ("--merge a --density mlp:0.5", "--density mlp: a filter stands before the number"),
        (
            "--merge a --merge b --weight 1 --weight 2 --weight mlp:1",
            "--weight mlp: a filter stands before the number",
        ),
        ("--merge a --merge b --merge c --weight mlp:0 --weight 1 --weight 2", "2 times for 3"),
        ("--merge a --weight mlp:0 --merge b --weight 1", "--weight mlp stands between"),
        ("--merge a --weight mlp:-1 --weight 1", "--no-normalize"),
        ("--merge a --trim-scope model --density 0.1,0.2", "needs one density for the whole"),
        ("--method nuslerp --merge a --merge b --weight 1 --weight -1", "cannot be normalised"),
        ("--method della --merge a --weight 1 --density 0.1", r"expected density - epsilon and"),
        ("--method nearswap --merge a --merge b --weight 1", "one model besides the base; got 2"),
        ("--method model_stock --merge a", "at least 2 models besides the base; got 1"),
        ("--method dare_ties --merge a --weight 1 --density 1 --seed 1 --gamma 0.1", "--gamma is"),
        ("--merge a --density 0,0", r"\(0, 1\], got 0"),
        ("--merge a --weight 1,-1", "--no-normalize"),
        ("--merge a --merge b --weight 0,1 --merge c", "--weight 0,1 stands between"),
    ],
)
def test_bad_settings_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(Problems, match=message):
        resolved("--base-model", "base", *arguments.split())


def test_ties_needs_a_base_and_slerp_two_models() -> None:
    with pytest.raises(Problems, match="ties needs --base-model"):
        resolved("--merge", "a")
    with pytest.raises(Problems, match="exactly two models"):
        resolved("--method", "slerp", "--merge", "a", "--weight", "0.5")
    with pytest.raises(Problems, match="one --weight"):
        resolved(*"--method slerp --merge a --weight 0.5 --merge b --weight 0.5".split())


def test_the_table_says_which_model_is_which() -> None:
    given = "--method slerp --merge a --merge b --weight 0.3".split()
    assert table(resolved(*given)).splitlines() == [
        "method: slerp, t = 0.3",
        "model",
        "a      t = 0",
        "b      t = 1",
    ]
    given = "--base-model o --merge a --weight mlp:2 --weight 1 --no-normalize --lambda 0.5".split()
    assert table(resolved(*given)).splitlines() == [
        "method: ties, not normalized, trim_scope = tensor, lambda = 0.5",
        "model  weight   density",
        "o      base",
        "a      mlp:2 1  0.33",
    ]


def test_a_description_says_how_a_recipe_departs_from_the_equation() -> None:
    ties = METHODS["ties"].equation
    given = ["--base-model", "o", "--merge", "a"]
    assert described(resolved(*given)) == ties
    departing = resolved(*given, "--no-normalize", "--naive-count")
    assert described(departing) == f"{ties}; here not normalized, naive count"


def test_a_missing_model_and_a_missing_base_are_reported_together() -> None:
    with pytest.raises(Problems, match=r"(?s)2 problems.*needs --base-model.*no model to merge"):
        resolved()


def test_weights_beyond_float32_are_taken_if_they_are_normalised() -> None:
    given = ["--base-model", "o", "--merge", "a", "--weight", "1e35"]
    assert resolved(*given).slices[0].sources[0].values["weight"] == Schedule((1e35,))
    with pytest.raises(Problems, match=r"too large, expected at most 1e\+30"):
        resolved(*given, "--no-normalize")


def test_help_of_a_method_shows_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main(["--method", "dare_ties", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--seed N" in shown and "--density D" in shown and "(DARE, https://arxiv.org" in shown
    hidden = ["--gamma", "--epsilon", "--naive-count", "--select-topk", "--trim-scope", "methods:"]
    assert not [option for option in hidden if option in shown]


def test_all_bad_settings_are_reported_together() -> None:
    with pytest.raises(Problems, match=r"(?s)3 problems:.*--density: .*--method ties.*--weight"):
        resolved(*"--merge a --merge b --merge c --weight 1 --weight 1 --density 2".split())


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


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


HEAVY = "{'torch', 'transformers', 'safetensors'}"


def test_recipes_load_without_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, merging.recipes\n"
        "names = [m.name for m in pkgutil.iter_modules(merging.recipes.__path__)]\n"
        "for name in names: importlib.import_module(f'merging.recipes.{name}')\n"
        f"assert not {HEAVY} & set(sys.modules)\n"
        "print(*names)"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert {"methods", "command_line", "recipe", "stack_files"} <= set(done.stdout.split())


@pytest.mark.parametrize("method", METHODS)
def test_a_mistyped_path_does_not_wait_for_torch(method: str) -> None:
    arguments = ["out", "--method", method, "--merge", "./typo", "--weight", "1"]
    if method == "ties":
        arguments += ["--base-model", "examples/base"]
    elif method == "slerp":
        arguments += ["--merge", "./typo"]
    code = (
        f"import sys, main\nstatus = main.main({arguments})\n"
        f"assert not {HEAVY} & set(sys.modules), 'loaded'\nsys.exit(status)"
    )
    done = run_code(code)
    assert done.returncode == 2, done.stderr
    assert "./typo: looked for a local directory, there is none" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistyped_path_in_a_stack_does_not_wait_for_torch(tmp_path: Path) -> None:
    stack = stack_file(tmp_path, "layer_slices: [{model: ./typo, start: 0, end: 1}]")
    code = (
        f"import sys, bakllama\nstatus = bakllama.main([{stack!r}, 'out'])\n"
        f"assert not {HEAVY} & set(sys.modules), 'loaded'\nsys.exit(status)"
    )
    done = run_code(code)
    assert done.returncode == 2, done.stderr
    assert "./typo: looked for a local directory, there is none" in done.stderr


# -------------------------------------------------------------------- names of models


@pytest.mark.parametrize(
    "given, expected",
    [
        ("org/base+org/lora", ("org/base", "org/lora")),
        ("org/base@v1+./lora", ("org/base@v1", "./lora")),
        ("base+lora", ("base", "lora")),
        ("here+there", ("here+there", None)),  # exists as a whole
        ("here+there+lora", ("here+there", "lora")),
        ("org/name", ("org/name", None)),
    ],
)
def test_base_and_adapter_are_split(
    given: str, expected: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here+there", "lora", "there"):
        (tmp_path / name).mkdir()
    assert split_adapter(given) == expected


@pytest.mark.parametrize("model", ["base+", "+adapter", "+"])
def test_an_empty_half_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["out", "--base-model", "x", "--merge", model])
    assert "expected BASE+ADAPTER, one of them is empty" in capsys.readouterr().err


# -------------------------------------------------------------------- stack files


def test_a_stack_file_makes_a_recipe(tmp_path: Path) -> None:
    text = "layer_slices: [{model: a, start: 0, end: 2}, {model: b, start: 1, end: 4, scale: 0.5}]"
    recipe = read_stack(Path(stack_file(tmp_path, text)))
    assert (recipe.method, recipe.text, recipe.is_stack) == (PASSTHROUGH, text, True)
    assert (recipe.embedding_source, recipe.lm_head_source) == ("a", "b")
    assert not recipe.asks_for_head
    layers = [(source.model, source.layers) for part in recipe.slices for source in part.sources]
    assert layers == [("a", range(2)), ("b", range(1, 4))]
    assert [part.values["scale"] for part in recipe.slices] == [Factors(1.0), Factors(0.5)]
    named = read_stack(Path(stack_file(tmp_path, f"{text}\nlm_head_source: b")))
    assert named.asks_for_head


def test_factors_of_nested_modules_multiply() -> None:
    factors = Factors({"mlp": 0.5, "down_proj": 0.7})
    assert factors.at("model.layers.0.mlp.down_proj.weight") == 0.5 * 0.7
    assert factors.at("model.layers.0.mlp.up_proj.weight") == 0.5
    assert factors.at("model.layers.0.self_attn.q_proj.weight") == 1
    assert Factors(0.9).at("model.layers.0.self_attn.q_proj.weight") == 0.9


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "expected a mapping with the keys layer_slices"),
        ("layer_slices: []", "layer_slices: expected a list of at least one slice"),
        ("layer_slice: []", "layer_slice: unknown key"),
        (
            "layer_slices: [{model: M, start: 0, end: 2, size: 3}]",
            r"layer_slices\[0\].size: unknown",
        ),
        ("layer_slices: [{start: 0, end: 2}]", r"layer_slices\[0\].model: expected the name"),
        ("layer_slices: [{model: M, start: 0}]", r"layer_slices\[0\].end: .* found nothing"),
        ("layer_slices: [{model: M, start: true, end: 2}]", r"\[0\].start: .* found True"),
        ("layer_slices: [{model: M, start: 0, end: 1.5}]", r"\[0\].end: .* found 1.5"),
        (
            "layer_slices: [{model: M, start: 2, end: 2}]",
            r"layer_slices\[0\]: expected start < end",
        ),
        ("layer_slices: [{model: M, start: -1, end: 2}]", r"\[0\].start: .* found -1"),
        ("layer_slices: [{model: M, start: 0, end: 7}]", r"layer_slices\[0\]: .*0 to 6 of M"),
        ("layer_slices: [{model: M, start: 0, end: 1, scale: .nan}]", r"\[0\].scale: .*finite"),
        ("layer_slices: [{model: M, start: 0, end: 1, scale: big}]", r"\[0\].scale: .*'big'"),
        (
            "layer_slices: [{model: M, start: 0, end: 1, scale: {o_proj: x}}]",
            r"layer_slices\[0\].scale.o_proj: expected a finite number",
        ),
        (
            "layer_slices: [{model: M, start: 0, end: 1, scale: {oproj: 1}}]",
            r"layer_slices\[0\].scale.oproj: no such module .*o_proj",
        ),
        ("layer_slices: [{model: M, start: 0, end: 1}]\nembedding_source: 3", "embedding_source: "),
        ("layer_slices: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_files_are_refused(
    text: str,
    message: str,
    make: Make,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make("llama")
    config = stack_file(tmp_path, text.replace("M", str(model)))
    assert bakllama.main([config, str(output)]) == 2
    assert not output.parent.exists()
    assert re.search(message, capsys.readouterr().err.replace(str(model), "M"))


def test_a_scale_beyond_floats_is_refused(
    make: Make, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"layer_slices: [{{model: {make('llama')}, start: 0, end: 1, scale: 1{'0' * 400}}}]"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 2
    assert "layer_slices[0].scale: expected a finite number" in capsys.readouterr().err
