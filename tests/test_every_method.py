"""Every method from the command line, as its row declares it: results, refusals, help."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Make, contents, fails, loads_clean, make_other, rewrite, stored
from oracles import (
    Expected,
    Sparse,
    arcee_fusion_oracle,
    changes,
    combined,
    karcher_oracle,
    largest_oracle,
    linear_oracle,
    model_stock_oracle,
    multislerp_oracle,
    nearswap_oracle,
    nuslerp_oracle,
    ram_oracle,
    sce_oracle,
    slerp_oracle,
    task_arithmetic_oracle,
    wrong,
    wrong_sums,
)
from torch import Tensor
from transformers import T5ForConditionalGeneration

import main
from merging.arithmetic import chunks, memory
from merging.recipes.command_line import recipe_from
from merging.recipes.declarations import DONOR, OPERAND, OPTIONAL, ORIGIN, Method, Parameter
from merging.recipes.merge_options import build_parser
from merging.recipes.methods import METHODS
from merging.recipes.recipe import Recipe

ROWS = list(METHODS.values())
RANDOM = [row.name for row in ROWS if any(p.is_seed for p in row.parameters)]

# Numbers that tell methods apart: of each model, or of all.
OF_MODELS = {"weight": (0.6, 0.3), "density": (0.5, 0.4), "epsilon": (0.1, 0.2)}
OF_MODELS |= {"gamma": (0.05, 0.1)}
OF_ALL = {"t": 0.3, "lambda": 0.8, "select_topk": 0.5, "r": 0.3, "alpha": 0.5, "epsilon": 0.05}

Arguments = dict[str, Any]
Oracle = Callable[[Tensor, Sequence[Tensor], Arguments], Tensor | Expected]


def trimmed(base: Tensor, models: Sequence[Tensor], a: Arguments) -> Expected:
    numbers = (a["weights"], a["densities"], [0.0] * len(models))
    return largest_oracle(base, models, *numbers, elect=True, normalize=True, lambda_=a["lambda"])


def crumbs(elect: bool) -> Oracle:
    return lambda base, models, a: largest_oracle(
        base, models, a["weights"], a["densities"], a["gammas"], elect=elect, lambda_=a["lambda"]
    )


ORACLES: dict[str, Oracle] = {
    "linear": lambda b, m, a: linear_oracle(m, a["weights"], True),
    "slerp": lambda b, m, a: slerp_oracle(b, m[0], a["t"]),
    "task_arithmetic": lambda b, m, a: task_arithmetic_oracle(
        b, m, a["weights"], False, a["lambda"]
    ),
    "nuslerp": lambda b, m, a: nuslerp_oracle(m, a["weights"], b, a["lambda"]),
    "multislerp": lambda b, m, a: multislerp_oracle(m, a["weights"], b, a["lambda"]),
    "karcher": lambda b, m, a: karcher_oracle(m, a["weights"]),
    "model_stock": lambda b, m, a: model_stock_oracle(b, m, a["lambda"]),
    "ties": trimmed,
    "breadcrumbs": crumbs(False),
    "breadcrumbs_ties": crumbs(True),
    "sce": lambda b, m, a: sce_oracle(b, m, a["select_topk"], a["lambda"]),
    "ram": lambda b, m, a: ram_oracle(b, m, a["epsilon"], lambda_=a["lambda"]),
    "ramplus_tl": lambda b, m, a: ram_oracle(
        b, m, a["epsilon"], a["r"], a["alpha"], lambda_=a["lambda"]
    ),
    "nearswap": lambda b, m, a: nearswap_oracle(b, m[0], a["t"], a["lambda"]),
    "arcee_fusion": lambda b, m, a: arcee_fusion_oracle(b, m[0], a["lambda"]),
}


def test_every_method_has_an_oracle_or_is_random() -> None:
    assert {*ORACLES, *RANDOM} == set(METHODS)
    assert not set(RANDOM) & set(ORACLES)


# -------------------------------------------------------------------- commands, from the rows


def number_of(parameter: Parameter, model: int = 0) -> float:
    if parameter.per_model:
        return OF_MODELS[parameter.name][model]
    return OF_ALL[parameter.name]


def merged_models(row: Method) -> int:
    """Return how many --merge to give: two, if it takes so many."""
    return min(2, row.models[1] or 2) - (row.base == OPERAND)


def command(row: Method, base: object, models: Sequence[object], **others: float) -> list[str]:
    """Return the arguments of a merge with numbers for all that the method takes."""
    words = ["--method", row.name]
    words += ["--base-model", str(base)] if row.base != DONOR else []
    for i, model in enumerate(models):
        words += ["--merge", str(model)]
        for parameter in row.parameters:
            if parameter.per_model:
                words += [
                    parameter.option,
                    str(others.get(parameter.name, number_of(parameter, i))),
                ]
    for parameter in row.parameters:
        if parameter.is_number and not parameter.per_model:
            words += [parameter.option, str(others.get(parameter.name, number_of(parameter)))]
    return words


def arguments_of(row: Method, count: int) -> Arguments:
    """Return the same numbers, for an oracle."""
    found: Arguments = {}
    for parameter in row.parameters:
        if parameter.per_model:
            found[str(parameter.argument)] = [number_of(parameter, i) for i in range(count)]
        elif parameter.is_number:
            found[parameter.name] = number_of(parameter)
    return found


# -------------------------------------------------------------------- results

MakeFolder = Callable[[int], Path]


@pytest.fixture(scope="module", params=["llama", "mixtral", "t5"])
def checkpoints(
    request: pytest.FixtureRequest, make: Make, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Give a base and two models of an architecture."""
    if request.param != "t5":
        return [make(request.param, seed, num_hidden_layers=2) for seed in range(3)]
    folders = [tmp_path_factory.mktemp("t5") / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        make_other("t5", seed, folder)
    return folders


@pytest.mark.parametrize("name", ORACLES)
def test_a_method_merges_as_its_oracle(name: str, checkpoints: list[Path], output: Path) -> None:
    row = METHODS[name]
    base, *models = checkpoints[: 1 + merged_models(row)]
    assert main.main([str(output), *command(row, base, models), "--quiet"]) == 0
    of_base, *of_models = (stored(folder) for folder in (base, *models))
    arguments = arguments_of(row, len(models))
    result = stored(output)
    assert result.keys() == of_base.keys()
    for tensor, values in result.items():
        sources = [of_base[tensor], *(m[tensor] for m in of_models)]
        expected = ORACLES[name](sources[0], sources[1:], arguments)
        assert values.dtype == torch.bfloat16
        if isinstance(expected, Expected):
            assert wrong(values, expected) == 0, tensor
        else:
            assert wrong_sums(values, expected, sources) == 0, tensor
    loads(output)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_results_that_are_written_leave_their_memory_to_others(
    row: Method, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = (make("llama", seed, num_hidden_layers=2) for seed in range(3))
    words = [*command(row, base, models[: merged_models(row)]), "--quiet", "--no-model-card"]
    taken: list[Tensor] = []
    empty = memory.empty

    def watched(*given: Any) -> Tensor:
        before = len(memory._unused)
        found = empty(*given)
        taken.extend([found] * (len(memory._unused) < before))
        return found

    for module in (chunks, memory):
        monkeypatch.setattr(module, "empty", watched)
    assert main.main([str(tmp_path / "new"), *words]) == 0
    assert not taken
    monkeypatch.setattr(memory, "SMALLEST", 1)
    for threads in ("1", "3"):
        output = tmp_path / threads
        assert main.main([str(output), *words, "--threads", threads]) == 0
        assert contents(output) == contents(tmp_path / "new")
    assert any(tensor.dtype == torch.uint8 for tensor in taken)  # for results
    memory._unused.clear()


def loads(folder: Path) -> None:
    if '"t5"' in (folder / "config.json").read_text():
        loads_clean(folder, T5ForConditionalGeneration)
    else:
        loads_clean(folder)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_a_base_is_left_out_where_it_may_be(name: str, make: Make, output: Path) -> None:
    row, models = METHODS[name], [make("llama", seed, num_hidden_layers=2) for seed in (1, 2)]
    assert row.base == OPTIONAL
    words = command(row, "", models)
    at, end = words.index("--base-model"), words.index("--lambda")
    words = words[:at] + words[at + 2 : end] + words[end + 2 :]
    assert main.main([str(output), *words, "--quiet"]) == 0
    oracle = {"nuslerp": nuslerp_oracle, "multislerp": multislerp_oracle}[name]
    of_models = [stored(model) for model in models]
    for tensor, values in stored(output).items():
        sources = [m[tensor] for m in of_models]
        assert wrong_sums(values, oracle(sources, OF_MODELS["weight"]), sources) == 0


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_method_depends_on_its_seed_alone(
    name: str, checkpoints: list[Path], tmp_path: Path
) -> None:
    base, *models = checkpoints
    words = [*command(METHODS[name], base, models), "--quiet", "--no-model-card"]

    def run(folder: str, *options: str) -> dict[str, Tensor]:
        assert main.main([str(tmp_path / folder), *words, *options]) == 0
        return stored(tmp_path / folder)

    one = run("one", "--threads", "1")
    assert contents(tmp_path / "one").keys()
    run("two", "--threads", "3", "--seed", "0")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shards = run("shards", "--max-shard-size", "20KB", "--threads", "2")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert one.keys() == shards.keys()
    assert all(torch.equal(one[tensor], shards[tensor]) for tensor in one)
    other = run("other", "--seed", "1")
    large = [tensor for tensor in one if one[tensor].numel() > 200]
    assert not any(torch.equal(one[tensor], other[tensor]) for tensor in large)
    loads(tmp_path / "other")


@pytest.mark.parametrize("name", RANDOM)
def test_masks_of_models_and_tensors_differ(name: str, make: Make, tmp_path: Path) -> None:
    """Of tensors of one shape, and of a model that is merged twice."""
    base, model = (make("llama", seed, num_hidden_layers=2) for seed in (0, 1))
    row = METHODS[name]
    once = command(row, base, [model], weight=1, density=0.5, epsilon=0.0, **{"lambda": 1})
    assert main.main([str(tmp_path / "once"), *once, "--no-rescale", "--quiet"]) == 0
    of_base, found = stored(base), stored(tmp_path / "once")
    kept = {n: (found[n] != of_base[n]).flatten() for n in found if found[n].numel() > 500}
    total = torch.cat(list(kept.values())).double()
    assert abs(float(total.mean()) - 0.5) < 4 * 0.5 / math.sqrt(len(total)) + 0.005
    for one, other in itertools.combinations(kept, 2):
        if len(kept[one]) == len(kept[other]):
            share = float((kept[one] == kept[other]).double().mean())
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(kept[one]))
    twice = command(row, base, [model, model], weight=1, density=0.5, epsilon=0.0, **{"lambda": 1})
    assert main.main([str(tmp_path / "twice"), *twice, "--no-rescale", "--quiet"]) == 0
    both = stored(tmp_path / "twice")
    # The first has the mask that it has alone; the second adds a quarter that the first dropped.
    untouched = torch.cat([(both[n] == of_base[n]).flatten() for n in kept])
    assert not bool((untouched & total.bool()).any())
    assert abs(float(untouched.double().mean()) - 0.25) < 4 * 0.44 / math.sqrt(len(total)) + 0.005


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_tensors_without_a_mean_are_refused_by_name(
    name: str, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make("llama", 1, num_hidden_layers=2)
    tensors = stored(one)
    tensors["model.layers.1.mlp.up_proj.weight"].neg_()
    other = rewrite(one, tmp_path / "other", tensors)
    words = ["--method", name, "--merge", str(one), "--merge", str(other)]
    text = fails(capsys, output, *words)
    assert "model.layers.1.mlp.up_proj.weight: the models point in opposite directions" in text
    assert not output.parent.exists()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused_by_name(
    row: Method,
    bad: float,
    make: Make,
    tmp_path: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a model, and in the base; in an entry alone, and in a whole tensor."""
    sound = [make("llama", seed, num_hidden_layers=2) for seed in range(3)]
    name = "model.layers.1.mlp.up_proj.weight"
    count = merged_models(row) + (row.base != DONOR)
    for broken, entries in ((0, slice(None)), (count - 1, slice(7, 8))):
        tensors = stored(sound[broken])
        tensors[name].view(-1)[entries] = bad
        models = [*sound[:count]]
        models[broken] = rewrite(sound[broken], tmp_path / f"broken {broken}", tensors)
        base, *others = models if row.base != DONOR else [models[0], *models]
        text = fails(capsys, output, *command(row, base, others))
        assert f"error: {models[broken]}: {name} contains NaN or infinity" in text
        assert not output.parent.exists()


# -------------------------------------------------------------------- trimming models as a whole


@pytest.mark.parametrize(
    "dtype, densities",
    [(torch.bfloat16, [0.3, 0.05]), (torch.float32, [0.3, 0.05]), (torch.float32, [1.0, 1e-9])],
)
def test_trimming_a_model_as_a_whole(
    dtype: torch.dtype, densities: list[float], make: Make, tmp_path: Path
) -> None:
    """As an oracle has it that sorts the changes of the whole model; in any number of threads."""
    base, *models = (make("mixtral", seed, dtype, num_hidden_layers=2) for seed in range(3))
    words = ["--base-model", str(base), "--trim-scope", "model", "--no-model-card", "--quiet"]
    weights = [0.7, 0.5]
    for model, weight, density in zip(models, weights, densities, strict=True):
        words += ["--merge", str(model), "--weight", str(weight), "--density", str(density)]
    for threads, size in (("1", "5GB"), ("2", "5GB"), ("3", "30KB")):
        options = ["--threads", threads, "--max-shard-size", size]
        assert main.main([str(tmp_path / threads), *words, *options]) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")

    of_base, *of_models = (stored(folder) for folder in (base, *models))
    thresholds = []
    for of_model, density in zip(of_models, densities, strict=True):
        deltas = [(of_model[n].double() - of_base[n].double()).flatten() for n in of_base]
        falling = torch.cat(deltas).abs().sort(descending=True).values
        thresholds.append(float(falling[max(1, math.floor(density * len(falling))) - 1]))
    rounding, total_doubt = 2**-22, 0
    result, sharded = stored(tmp_path / "1"), stored(tmp_path / "3")
    for name, origin in of_base.items():
        deltas = changes(origin, [m[name] for m in of_models])
        at = torch.tensor(thresholds, dtype=torch.float64).view(-1, *[1] * origin.dim())
        doubtful = ((deltas.abs() - at).abs() <= rounding * at) & (deltas.abs() != at)
        sparse = Sparse(torch.where(deltas.abs() >= at, deltas, 0), doubtful)
        options = {"elect": True, "normalize": True, "lambda_": 1.0, "rounding": rounding}
        expected = combined(origin, sparse, weights, **options)
        total_doubt += int(expected.doubtful.sum())
        assert wrong(result[name], expected) == 0, name
        assert torch.equal(result[name], sharded[name])
    assert total_doubt < 20


def test_trimming_as_a_whole_is_no_trimming_by_tensor(make: Make, tmp_path: Path) -> None:
    """A model whose changes are large in one tensor keeps them there alone."""
    base, model = (make("llama", seed, num_hidden_layers=2) for seed in (0, 1))
    words = ["--base-model", str(base), "--merge", str(model), "--density", "0.05", "--quiet"]
    found = {}
    for scope in ("tensor", "model"):
        assert main.main([str(tmp_path / scope), *words, "--trim-scope", scope]) == 0
        of_base, result = stored(base), stored(tmp_path / scope)
        found[scope] = [float((result[n] != of_base[n]).double().mean()) for n in of_base]
    # Some tensors' entries are kept by chance more often than others', by the model's threshold.
    assert max(found["tensor"]) - min(found["tensor"]) < max(found["model"]) - min(found["model"])


# -------------------------------------------------------------------- refusals, from the rows


def problems_of(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    recipe_from(build_parser().parse_args(["out", *words]), found)
    return found


def recipe_of(words: Sequence[str]) -> Recipe:
    found: list[str] = []
    recipe = recipe_from(build_parser().parse_args(["out", *words]), found)
    assert found == []
    return recipe


def given(row: Method, **others: float) -> list[str]:
    return command(row, "base", [f"model-{i}" for i in range(merged_models(row))], **others)


def parameters(of: Callable[[Parameter], bool]) -> list[Any]:
    """Return (row, parameter) of all that is true of."""
    return [
        pytest.param(row, p, id=f"{row.name} {p.name}")
        for row in ROWS
        for p in row.parameters
        if of(p)
    ]


def without(words: list[str], option: str) -> list[str]:
    """Return words without an option and what follows it."""
    at = [i for i, word in enumerate(words) if word == option]
    return [word for i, word in enumerate(words) if i not in at and i - 1 not in at]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_a_row_declares_is_accepted(row: Method) -> None:
    recipe = recipe_of(given(row))
    arguments = recipe.arguments(recipe.slices[0], "model.norm.weight", 1)
    assert arguments.keys() == {p.argument for p in row.parameters if p.argument}
    for parameter in row.parameters:
        if parameter.per_model:
            expected = [number_of(parameter, i) for i in range(merged_models(row))]
            assert arguments[str(parameter.argument)] == expected
        elif parameter.is_number:
            assert arguments[str(parameter.argument)] == number_of(parameter)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_missing_base_is_refused(row: Method) -> None:
    found = problems_of(without(given(row), "--base-model"))
    if row.base == ORIGIN:
        assert any(f"--method {row.name} needs --base-model" in text for text in found)
    else:
        assert not any("needs --base-model, the" in text for text in found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_too_few_and_too_many_models_are_refused(row: Method) -> None:
    fewest, most = row.models
    operands = int(row.base == OPERAND)
    numbers = {"weight": 0.5, "density": 0.5, "epsilon": 0.1, "gamma": 0.0}
    shared = [
        word for p in row.parameters if p.per_model for word in (p.option, f"{numbers[p.name]}")
    ]
    rest = [w for p in row.parameters if p.is_number and not p.per_model for w in (p.option, "0.5")]
    base = ["--base-model", "base"] if row.base != DONOR else []

    def counted(count: int) -> list[str]:
        merges = [word for i in range(count - operands) for word in ("--merge", f"model-{i}")]
        words = ["--method", row.name, *base, *merges, *shared, *rest]
        return [text for text in problems_of(words) if f"{row.name} merges" in text]

    for count in range(1 + operands, fewest):
        (text,) = counted(count)
        assert f"got {count}" in text
    assert counted(fewest) == []
    for count in (4, 5):
        if most is None:
            assert counted(count) == []
        else:
            (text,) = counted(count)
            assert "merges exactly" in text and f"got {count}" in text
    assert any("at least one with --merge" in p for p in problems_of(["--method", row.name]))


@pytest.mark.parametrize("row, parameter", parameters(lambda p: p.default is None))
def test_a_number_without_a_default_must_be_given(row: Method, parameter: Parameter) -> None:
    found = problems_of(without(given(row), parameter.option))
    assert f"--method {row.name} needs {parameter.option}" in found


@pytest.mark.parametrize("row, parameter", parameters(lambda p: p.default is not None))
def test_a_number_with_a_default_need_not_be_given(row: Method, parameter: Parameter) -> None:
    recipe = recipe_of(without(given(row), parameter.option))
    if parameter.argument and not parameter.is_seed:
        found = recipe.arguments(recipe.slices[0], "", 0)[parameter.argument]
        count = merged_models(row)
        assert found == ([parameter.default] * count if parameter.per_model else parameter.default)


def test_defaults_are_those_of_the_papers() -> None:
    numbers = {"gamma": {0.01}, "select_topk": {1.0}, "r": {0.1}, "alpha": {0.2}, "seed": {0}}
    numbers |= {"lambda": {1.0}, "epsilon": {0.15, 1e-5}, "density": {None, 0.33}, "t": {None}}
    numbers |= {"weight": {None, 1.0}}
    found: dict[str, set[Any]] = {}
    for row in ROWS:
        for parameter in row.parameters:
            if parameter.is_number or parameter.is_seed:
                found.setdefault(parameter.name, set()).add(parameter.default)
    assert found == numbers
    averaging = {"ties", "linear", "della"}  # by default, and none of the others
    switches = [(row.name, p) for row in ROWS for p in row.parameters if p.name == "normalize"]
    assert {name for name, parameter in switches if parameter.default} == averaging


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_options_of_other_methods_are_refused(row: Method) -> None:
    own = {p.option for p in row.parameters}
    others = {p.option: p for other in ROWS for p in other.parameters if p.option not in own}
    assert others
    for option, parameter in others.items():
        values: list[list[str]] = [[option, "1"]]
        if parameter.is_switch:
            values = [[option], [f"--no-{option[2:]}"]]
        elif parameter.choices:
            values = [[option, choice] for choice in parameter.choices]
        for words in values:
            (text,) = problems_of([*given(row), *words])
            assert text.startswith(f"{words[0]} is for ")
            assert text.endswith(f", not for {row.name}")
            users = text.removesuffix(f", not for {row.name}")
            assert all(
                other.name in users
                for other in ROWS
                if option in {p.option for p in other.parameters}
            )


def outside(parameter: Parameter) -> Iterator[float]:
    """Yield numbers just outside of a parameter's range."""
    if parameter.low > -math.inf:
        yield parameter.low if parameter.above_low else parameter.low - 0.01
        yield parameter.low - 1
    if parameter.high < math.inf:
        yield parameter.high if parameter.below_high else parameter.high + 0.01
        yield parameter.high + 1


def inside(parameter: Parameter) -> Iterator[float]:
    """Yield the ends of a parameter's range, or what is next to them."""
    if parameter.low > -math.inf:
        yield parameter.low + 0.001 if parameter.above_low else parameter.low
    if parameter.high < math.inf:
        yield parameter.high - 0.001 if parameter.below_high else parameter.high


@pytest.mark.parametrize("row, parameter", parameters(lambda p: p.is_number))
def test_numbers_outside_of_their_range_are_refused(row: Method, parameter: Parameter) -> None:
    for value in outside(parameter):
        found = problems_of(given(row, **{parameter.name: value}))
        expected = f"{parameter.option}: expected "
        assert any(text.startswith(expected) and f"got {value:g}" in text for text in found), found
    for value in inside(parameter):
        found = problems_of(given(row, **{parameter.name: value}))
        assert not any(text.startswith(f"{parameter.option}: ") for text in found)


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("density, epsilon", [(0.25, 0.25), (0.75, 0.25), (0.9, 0.3)])
def test_probabilities_of_0_and_1_are_refused(name: str, density: float, epsilon: float) -> None:
    (text,) = problems_of(given(METHODS[name], density=density, epsilon=epsilon))
    assert f"a density of {density:g} and an epsilon of {epsilon:g}: expected" in text
    less = math.nextafter(epsilon, 0)
    near = given(METHODS[name], density=math.nextafter(density, 0.5), epsilon=less)
    assert bool(problems_of(near)) == (density == 0.9)
    assert not problems_of(given(METHODS[name], density=1.0, epsilon=epsilon))  # all are kept


@pytest.mark.parametrize("row, density", parameters(lambda p: p.name == "density"))
def test_a_density_of_0_is_for_some_tensors_only(row: Method, density: Parameter) -> None:
    rest = without(given(row), "--density")
    for words in ("--density 0", "--density 0,0", "--density mlp:0 --density 0"):
        found = problems_of([*rest, *words.split()])
        models = [b for a, b in itertools.pairwise(rest) if a == "--merge"]
        expected = "--density: expected a number in (0, 1], got 0 for all of "
        assert found == [expected + model for model in models] != []
    for words in ("--density 0,1", "--density mlp:0 --density 1"):
        assert problems_of([*rest, *words.split()]) == []


@pytest.mark.parametrize("row, parameter", parameters(lambda p: p.is_seed))
def test_a_seed_is_a_whole_number_of_63_bits(
    row: Method, parameter: Parameter, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (0, 10**18, 2**62, int(parameter.high)):
        recipe = recipe_of([*given(row), parameter.option, str(value)])
        assert recipe.values[parameter.name] == value
    for text in ("-1", str(int(parameter.high) + 1), "9" * 30, "1.5", "1,2", ""):
        with pytest.raises(SystemExit):
            recipe_of([*given(row), f"{parameter.option}={text}"])
        expected = f"{parameter.option}: expected a whole number from 0 to {int(parameter.high)}"
        assert f"{expected}, got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize("row, parameter", parameters(lambda p: p.is_number))
def test_every_number_takes_gradients_and_filters(row: Method, parameter: Parameter) -> None:
    """0,1 over the layers for tensors of an mlp, and the number that is given for all others."""
    place = 0.5
    high = min(parameter.high, 1.0) - 0.001
    low = max(parameter.low, 0.0) + 0.001
    words = given(row)
    at = words.index(parameter.option)
    words[at:at] = [parameter.option, f"mlp:{low},{high}"]
    found: list[str] = []
    recipe = recipe_from(build_parser().parse_args(["out", *words]), found)
    assert not [text for text in found if "density" not in text and "cancel" not in text]

    def at_tensor(name: str) -> float:
        value = recipe.arguments(recipe.slices[0], name, place)[str(parameter.argument)]
        return value[0] if parameter.per_model else value

    assert at_tensor("model.layers.1.mlp.up_proj.weight") == pytest.approx((low + high) / 2)
    assert at_tensor("model.layers.1.self_attn.q_proj.weight") == number_of(parameter)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_weights_that_cannot_be_divided_by_their_sum_are_refused(row: Method) -> None:
    names = [p.name for p in row.parameters]
    if "weight" not in names or merged_models(row) < 2:
        return
    words = given(row)
    places = [i + 1 for i, word in enumerate(words) if word == "--weight"]
    for place, weight in zip(places, ("1", "-1"), strict=True):
        words[place] = weight
    (text,) = problems_of([*words, *["--normalize"] * ("normalize" in names)])
    assert "cannot be normalised" in text or "expected" in text
    if "normalize" in names:
        assert "--no-normalize" in text
        assert problems_of([*words, "--no-normalize"]) == []


@pytest.mark.parametrize("row, parameter", parameters(lambda p: p.with_base))
def test_what_scales_a_change_needs_a_base(row: Method, parameter: Parameter) -> None:
    (text,) = problems_of(without(given(row), "--base-model"))
    assert text.startswith(parameter.option) and "needs --base-model" in text


@pytest.mark.parametrize("row, parameter", parameters(lambda p: bool(p.same_for_all)))
def test_what_needs_one_number_for_a_model_refuses_others(
    row: Method, parameter: Parameter
) -> None:
    (other,) = [choice for choice in parameter.choices if choice != parameter.default]
    option = f"--{parameter.same_for_all}"
    words = [*given(row), parameter.option, other]
    assert problems_of(words) == []
    words[words.index(option) + 1] = "0.1,0.2"
    (text,) = problems_of(words)
    assert f"{parameter.option} {other} needs one {parameter.same_for_all}" in text


# -------------------------------------------------------------------- help


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_help_of_a_method_shows_what_it_takes_and_no_more(row: Method) -> None:
    text = build_parser(["--method", row.name, "--help"]).format_help()
    own = {p.option for p in row.parameters}
    words = set(text.replace(",", " ").replace("[", " ").replace("]", " ").split())
    for option in {p.option for other in ROWS for p in other.parameters}:
        assert (option in words) == (option in own), option
    assert row.paper in " ".join(text.split())


def test_the_help_lists_every_method_and_option_once() -> None:
    text = build_parser(["--help"]).format_help()
    lines = text.splitlines()
    for row in ROWS:
        assert len([line for line in lines if line.split()[:1] == [row.name]]) == 1
        for parameter in row.parameters:
            heads = [
                line for line in lines if line.replace(",", "").split()[:1] == [parameter.option]
            ]
            assert len(heads) == 1, parameter.option
