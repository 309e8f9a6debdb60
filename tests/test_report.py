"""The numbers of reports, against naive computations in float64 from the files of a merge."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Make, contents, make_other, rewrite, stored
from torch import Tensor

import bakllama
import main
import merge_methods
from merging.arithmetic import likeness as likeness_module
from merging.arithmetic.likeness import Likeness, Measuring, likeness
from merging.arithmetic.watching import watching
from merging.recipes.declarations import ORIGIN, Method
from merging.recipes.methods import METHODS

Trim = Callable[[Tensor], Tensor]
LAYER = re.compile(r"(?:(encoder|decoder)\.block|layers)\.(\d+)\.")
KINDS = [  # the first pattern that is found in a name
    ("norm", "norms"),
    ("experts|moe", "experts"),
    ("(?i:attn|attention)", "attention"),
    ("mlp|DenseReluDense", "MLP"),
    ("embed|shared", "embedding"),
    ("lm_head", "head"),
]


def changed(source: Path, target: Path, seed: int, scale: float = 0.02) -> Path:
    """Save a model that differs a little from another in its floats, and in some not at all."""
    generator = torch.Generator().manual_seed(seed)
    tensors = stored(source)
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.is_floating_point() and i % 7 != seed:
            change = torch.randn(tensor.shape, generator=generator) * scale
            tensors[name] = (tensor.float() + change).to(tensor.dtype)
    return rewrite(source, target, tensors)


def run(script: Any, *arguments: object) -> dict[str, Any]:
    """Run a script with a report beside the output, and return the report."""
    output = Path(str(arguments[0] if script is main else arguments[1]))
    report = output.parent / "report.json"
    options = ["--report", report, "--quiet", "--threads", "2"]
    assert script.main([str(a) for a in (*arguments, *options)]) == 0
    found = json.loads(report.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def trimmed(density: float) -> Trim:
    """Return what keeps the largest changes of a tensor, compared as ties does, in float32."""

    def trim(delta: Tensor) -> Tensor:
        narrow = delta.float().abs().flatten()
        k = max(1, math.floor(density * len(narrow)))
        kth = narrow.sort(descending=True).values[k - 1]
        return torch.where(delta.float().abs() >= kth, delta, 0)

    return trim


def vectors(
    names: Sequence[str],
    base: dict[str, Tensor] | None,
    models: Sequence[dict[str, Tensor]],
    output: dict[str, Tensor],
    trim: Trim,
) -> dict[str, Any]:
    """Return the numbers of some tensors, each model's joined to one long vector."""

    def joined(tensors: dict[str, Tensor], of: Trim = lambda t: t) -> np.ndarray:
        parts = [
            of(tensors[n].double() - (base[n].double() if base is not None else 0)).flatten()
            for n in names
        ]
        return torch.cat(parts).numpy()

    def over(one: float, other: float) -> float | None:
        return float(one / other) if other else None

    changes, made = [joined(model) for model in models], joined(output)
    norms = [float(np.linalg.norm(x)) for x in changes]
    origin = None if base is None else np.concatenate([base[n].double().flatten() for n in names])
    size = None if origin is None else float(np.linalg.norm(origin))
    kept = np.stack([joined(model, trim) for model in models])
    has_base = base is not None
    squares = [norm**2 for norm in norms]
    return {
        "entries": len(made),
        "norm": norms,
        "change": [over(n, size) if size is not None else None for n in norms],
        "cosine": [
            [over(float(x @ y), n * m) for y, m in zip(changes, norms, strict=True)]
            for x, n in zip(changes, norms, strict=True)
        ],
        "opposed": float(np.mean((kept.max(0) > 0) & (kept.min(0) < 0))) if has_base else None,
        "left": [
            over(float(k @ x), s) if has_base else None
            for k, x, s in zip(kept, changes, squares, strict=True)
        ],
        "kept": [
            over(float(made @ x), s) if has_base else None
            for x, s in zip(changes, squares, strict=True)
        ],
        "distance": [
            over(float(np.linalg.norm(made - x)), size if size is not None else n)
            for x, n in zip(changes, norms, strict=True)
        ],
        "output_norm": float(np.linalg.norm(made)),
        "output_change": over(float(np.linalg.norm(made)), size) if size is not None else None,
    }


def agrees(found: Any, expected: Any, where: str = "") -> None:
    """Assert that numbers are within 1e-6 of others, in lists and by key."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            agrees(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            agrees(one, other, f"{where}[{i}]")
    else:
        is_near = expected is not None and found == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert is_near or found is expected is None, f"{where}: {found}, not {expected}"


def check(
    report: dict[str, Any],
    base: Path | None,
    models: Sequence[Path],
    output: Path,
    trim: Trim = lambda delta: delta,
) -> None:
    """Compare every number of a report with those made from the files."""
    tensors = stored(output)
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    read = (None if base is None else stored(base), [stored(m) for m in models], tensors, trim)
    groups: dict[tuple[str, Any], list[str]] = defaultdict(list)
    for name in floats:
        match = LAYER.search(name)
        layer = None if match is None else (match[1] or "", int(match[2]))
        kind = next(kind for pattern, kind in KINDS if re.search(pattern, name))
        of_name = [("total", ""), ("kinds", kind), ("layers", layer), ("cells", (layer, kind))]
        for key in of_name + [("tensors", name)]:
            groups[key].append(name)
    found: dict[tuple[str, Any], Any] = {("total", ""): report["total"]}
    found |= {("kinds", kind): numbers for kind, numbers in report["kinds"].items()}

    def place(entry: dict[str, Any]) -> tuple[str, int] | None:
        return entry["layer"] and (entry["layer"]["stack"], entry["layer"]["number"])

    found |= {("layers", place(entry)): entry for entry in report["layers"]}
    found |= {("cells", (place(entry), entry["kind"])): entry for entry in report["cells"]}
    found |= {("tensors", e["name"]): e for e in report["tensors"] if e["name"] in floats}
    assert found.keys() == groups.keys()
    assert [e["name"] for e in report["tensors"]] != [] and len(report["tensors"]) == len(tensors)
    for key, names in groups.items():
        agrees(found[key], vectors(names, *read), str(key))


def base_of(name: str, make: Make, folder: Path) -> Path:
    """Return a tiny base model of a class that is a decoder, or another."""
    if name == "t5":
        make_other(name, 1, folder / "t5")
        return folder / "t5"
    return make(name, 1)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_every_number_of_a_merge_of_changes(name: str, make: Make, tmp_path: Path) -> None:
    base = base_of(name, make, tmp_path)
    models = [changed(base, tmp_path / "a", 1), changed(base, tmp_path / "b", 2, 0.01), base]
    merges = [word for model in models for word in ("--merge", model)]
    output = tmp_path / "out"
    report = run(main, output, "--base-model", base, *merges, "--density", "0.4")
    assert report["names"] == ["a", "b", base.name] and report["base"] == str(base)
    check(report, base, models, output, trimmed(0.4))


@pytest.mark.parametrize(
    "name, method",
    [("llama", "linear"), ("mixtral", "slerp"), ("t5", "linear"), ("t5", "task_arithmetic")],
)
def test_every_number_of_a_sum(name: str, method: str, make: Make, tmp_path: Path) -> None:
    origin = base_of(name, make, tmp_path)
    models = [changed(origin, tmp_path / "a", 1), changed(origin, tmp_path / "b", 2)]
    merges = [word for model in models for word in ("--merge", model)]
    base = ["--base-model", origin] if METHODS[method].base == ORIGIN else []
    output = tmp_path / "out"
    report = run(main, output, "--method", method, *base, *merges, "--weight", "0.3")
    check(report, origin if base else None, models, output)


def required(method: Method) -> list[str]:
    return [word for p in method.parameters if p.default is None for word in (p.option, "0.5")]


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_is_reported(method: Method, make: Make, tmp_path: Path) -> None:
    origin = make("llama", 1, num_hidden_layers=2)
    models = [changed(origin, tmp_path / name, i) for i, name in enumerate("ab", 1)]
    models = models[: 1 if method.models[1] == 1 else 2]
    merges = [word for model in models for word in ("--merge", model)]
    base = ["--base-model", origin] if method.base == ORIGIN else []
    output = tmp_path / "out"
    arguments = ["--method", method.name, *base, *merges, *required(method)]
    report = run(main, output, *arguments)
    assert report["method"] == method.name and report["sentences"]
    tensors = (stored(origin) if base else None, [stored(m) for m in models], stored(output))
    expected = vectors(list(stored(output)), *tensors, lambda delta: delta)
    of_sparsified = ("left", "opposed") if base else ()  # see the test of watched methods below
    agrees(report["total"], {k: v for k, v in expected.items() if k not in of_sparsified})
    if base:
        assert all(0 < share < 1.5 for share in report["total"]["left"])
        assert 0 <= (report["total"]["opposed"] or 0) <= expected["opposed"] or len(models) == 1


# -------------------------------------------------------------------- what methods keep


def call(name: str, base: Tensor, tensors: list[Tensor], keys: Sequence[int]) -> Tensor:
    """Call a method with a number for each parameter that must have one."""
    known = {
        "weights": [1.0] * len(tensors),
        "densities": [0.3] * len(tensors),
        "epsilons": [0.1] * len(tensors),
        "gammas": [0.05] * len(tensors),
        "keys": list(keys),
        "t": 0.4,
    }
    wanted = {p.argument for p in METHODS[name].parameters}
    given = {key: value for key, value in known.items() if key in wanted}
    if name in ("dare_ties", "breadcrumbs_ties", "ties", "della"):
        given["normalize"] = False
    result: Tensor = getattr(merge_methods, name)(base, tensors, **given)
    return result


@pytest.mark.parametrize(
    "name",
    [
        "ties", "dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs",
        "breadcrumbs_ties", "nearswap", "arcee_fusion",
    ],
)  # fmt: skip
def test_what_a_method_keeps_is_watched(name: str, device: torch.device) -> None:
    """Of each model what the method makes of it alone, of a base of zeros."""
    generator = torch.Generator().manual_seed(3)
    base = torch.zeros(70, 5000, dtype=torch.float64, device=device)
    count = 1 if METHODS[name].models[1] == 1 else 3
    tensors = [torch.randn(base.shape, generator=generator).to(base) for _ in range(count)]
    alone = torch.stack([call(name, base, [tensors[i]], [i + 5]) for i in range(count)])
    measured = Measuring(base.numel())
    with watching(measured):
        result = call(name, base, tensors, range(5, 5 + count))
    assert torch.equal(result, call(name, base, tensors, range(5, 5 + count)))
    cpu = [t.cpu() for t in (result, *tensors, base)]
    found = likeness(cpu[0], cpu[1:-1], cpu[-1], measured)
    expected = [float((one * t).sum()) for one, t in zip(alone, tensors, strict=True)]
    assert found.kept == pytest.approx(expected, rel=1e-9)
    assert found.opposed == int(((alone.amax(0) > 0) & (alone.amin(0) < 0)).sum())


def test_what_depends_on_all_models_is_watched() -> None:
    generator = torch.Generator().manual_seed(4)
    base = torch.zeros(50, 40, dtype=torch.float64)
    deltas = torch.randn((2, 50, 40), generator=generator, dtype=torch.float64)
    variance = deltas.var(0, correction=0)
    chosen = variance >= variance.flatten().sort().values[-600]
    for call, keeps in (
        (lambda: merge_methods.ram(base, [*deltas], epsilon=0.5), deltas.abs() > 0.5),
        (lambda: merge_methods.ramplus_tl(base, [*deltas], epsilon=0.5), deltas.abs() > 0.5),
        (lambda: merge_methods.sce(base, [*deltas], select_topk=0.3), chosen.expand(2, 50, 40)),
    ):
        measured = Measuring(base.numel())
        with watching(measured):
            result = call()
        left = deltas * keeps
        found = likeness(result, [*deltas], base, measured)
        assert found.kept == pytest.approx((left * deltas).sum((1, 2)).tolist(), rel=1e-9)
        assert found.opposed == int(((left.amax(0) > 0) & (left.amin(0) < 0)).sum())
        assert found.output == pytest.approx(float(result.square().sum()), rel=1e-12)


def test_methods_that_take_changes_whole_are_measured_afterwards() -> None:
    measured = Measuring(9)
    with watching(measured):
        merge_methods.task_arithmetic(torch.zeros(9), [torch.ones(9)], [1.0])
    assert measured.totals() == {}


# -------------------------------------------------------------------- likeness


def same(one: Likeness, other: Likeness, error: float) -> None:
    """Assert that products differ by no more than so much of the norms."""
    size = max(one.output, *(one.products[t][t] for t in range(len(one.kept))), 1e-300)
    for name, value in vars(one).items():
        scale = one.base if name == "base" else size
        exact = pytest.approx(np.array(value), rel=0, abs=error * scale)
        assert np.array(getattr(other, name)) == exact, name
    assert (one.entries, one.opposed) == (other.entries, other.opposed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_base", [False, True])
def test_likeness_does_not_depend_on_threads_or_alignment(
    dtype: torch.dtype, has_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    base, *rest = (torch.randn(200_003, generator=generator).to(dtype) for _ in range(4))
    given = (rest[0], rest[1:], base if has_base else None)
    expected = likeness(*given)
    exact = [(t.double() - base.double() * has_base).numpy() for t in rest]
    products = [[float(x @ y) for y in exact] for x in exact]
    assert np.array(expected.products) == pytest.approx(np.array(products)[1:, 1:], abs=0.04)
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            assert likeness(*given) == expected
            odd = [torch.cat([t[:1], t])[1:] for t in rest]
            assert likeness(odd[0], odd[1:], given[2]) == expected
        monkeypatch.setattr(likeness_module, "LIKENESS_CHUNK", 1 << 13)
        same(expected, likeness(*given), 1e-7)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "scales",
    [
        [1.0, 1.0],
        [1.0, 1e-4],  # a change that is ten thousand times another
        [1e-9, 1e-9],  # squares that leave the range of float32 a row at a time
        [0.0, 1.0],
    ],
)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_float32_is_left_where_it_would_lose_digits(method: str, scales: list[float]) -> None:
    """Of large tensors of 16 bits, all that a report says is within 1e-6 of exact numbers."""
    generator = torch.Generator().manual_seed(6)
    base = torch.zeros(300_000, dtype=torch.bfloat16)
    base[::2] = 1
    tensors = []
    for scale in scales:
        change = torch.randn(base.shape, generator=generator) * scale
        tensors.append(torch.where(base == 0, change, 1).bfloat16())
    measured = Measuring(base.numel())
    numbers = {"densities": [0.5, 0.5]} if method == "ties" else {}
    with watching(measured):
        output = getattr(merge_methods, method)(base, tensors, weights=[1.0, 1.0], **numbers)
    found = likeness(output, tensors, base, measured)
    made, *changes = (t.double() - base.double() for t in (output, *tensors))
    for i, x in enumerate(changes):
        square = float(x @ x)
        assert found.products[i][i] == pytest.approx(square, rel=1e-6)
        if square:
            assert found.outputs[i] / square == pytest.approx(float(made @ x) / square, abs=1e-6)
        for j, other in enumerate(changes):
            norms = math.sqrt(square * float(other @ other))
            cosine = pytest.approx(float(x @ other) / norms if norms else 0, abs=1e-6)
            assert (found.products[i][j] / norms if norms else found.products[i][j]) == cosine
        apart = (made - x).norm() / base.double().norm()
        assert math.sqrt(found.distance(i) / found.base) == pytest.approx(float(apart), abs=1e-6)


def test_an_output_that_is_all_but_an_input_is_at_its_true_distance() -> None:
    generator = torch.Generator().manual_seed(6)
    base, a, b = (torch.randn(100_000, generator=generator) for _ in range(3))
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [(base + a).to(dtype), (base + b).to(dtype)]
        output = tensors[0].clone()
        assert likeness(output, tensors, base.to(dtype)).distance(0) == 0
        output[17] += 0.5
        found = likeness(output, tensors, base.to(dtype))
        expected = float(output[17].double() - tensors[0][17].double())
        assert math.sqrt(found.distance(0)) == pytest.approx(abs(expected), rel=1e-6)


# -------------------------------------------------------------------- what has no number


def test_models_without_changes_have_no_nan(make: Make, tmp_path: Path) -> None:
    """All models equal the base, of which some tensors are zeros."""
    tensors = stored(make("llama", 1, num_hidden_layers=2))
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name].zero_()
    base = rewrite(make("llama", 1, num_hidden_layers=2), tmp_path / "base", tensors)
    merges = ["--merge", base, "--merge", base]
    report = run(main, tmp_path / "out", "--base-model", base, *merges)
    total = report["total"]
    assert total["change"] == [0, 0] and total["distance"] == [0, 0]
    assert total["kept"] == total["left"] == [None, None]
    assert total["cosine"] == [[None, None], [None, None]]
    (zero,) = [e for e in report["tensors"] if e["name"] == "model.norm.weight"]
    assert zero["change"] == [None, None] and zero["norm"] == [0, 0]
    equal = "equals the base: it changes nothing."
    assert report["sentences"][:2] == [f"base {equal}", f"base (2) {equal}"]


def test_integer_tensors_are_named_without_numbers(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_other("resnet", seed, tmp_path / str(seed))
    base, model = tmp_path / "1", tmp_path / "2"
    report = run(main, tmp_path / "out", "--base-model", base, "--merge", model)
    whole = [e for e in report["tensors"] if e["name"].endswith("num_batches_tracked")]
    assert whole and all(e["how"] == "copied" and "norm" not in e for e in whole)
    names = [e["name"] for e in report["tensors"] if "norm" in e]
    read = (stored(base), [stored(model)], stored(tmp_path / "out"), trimmed(0.33))
    agrees(report["total"], vectors(names, *read) | {"opposed": None})


def test_squares_beyond_float64_are_no_numbers(make: Make, tmp_path: Path) -> None:
    base = make("llama", 1, torch.float64, num_hidden_layers=1)
    tensors = stored(base)
    tensors["model.norm.weight"][0] = 1e200
    models = [rewrite(base, tmp_path / "a", tensors), changed(base, tmp_path / "b", 1)]
    merges = ["--merge", models[0], "--merge", models[1], "--weight", "1"]
    report = run(main, tmp_path / "out", "--method", "linear", *merges)
    assert report["total"]["norm"][0] is None and report["total"]["norm"][1] > 0
    assert report["total"]["cosine"][0] == [None, None]


# -------------------------------------------------------------------- stacks, bytes


def test_a_stack_is_reported(make: Make, tmp_path: Path) -> None:
    a, b = make("llama", 1), make("llama", 2)
    config = tmp_path / "stack.yml"
    config.write_text(
        f"layer_slices:\n  - {{model: {a}, start: 0, end: 2}}\n"
        f"  - {{model: {b}, start: 3, end: 5, scale: 0.5}}\n"
    )
    report = run(bakllama, config, tmp_path / "out")
    assert report["models"] == [str(a), str(b)] and report["base"] is None
    output = stored(tmp_path / "out")
    for i, (model, factor) in enumerate([(0, 0.0), (0, 0.0), (1, 0.5), (1, 0.5)]):
        entry = next(e for e in report["layers"] if e["layer"] == {"stack": "", "number": i})
        values = torch.cat([t.flatten() for n, t in output.items() if f"layers.{i}." in n])
        assert entry["output_norm"] == pytest.approx(float(values.double().norm()), rel=1e-9)
        assert entry["distance"][model] == pytest.approx(factor, abs=2e-3)
        assert entry["norm"][1 - model] is None
    (seam,) = [s for s in report["sentences"] if "the attention of layer 2, of llama-2" in s]
    assert "are 0.5 times as large as those of layer 1, of llama-1." in seam


def test_the_same_bytes_on_any_number_of_threads(make: Make, tmp_path: Path) -> None:
    base = make("llama", 1)
    models = [changed(base, tmp_path / "a", 1), changed(base, tmp_path / "b", 2)]
    found = []
    for threads in ("1", "5"):
        files = [tmp_path / f"{threads}.{ending}" for ending in ("html", "json")]
        output = tmp_path / threads / "out"
        arguments = ["--base-model", base, "--merge", models[0], "--merge", models[1]]
        for file in files:
            arguments += ["--report", file]
        options = ["--quiet", "--threads", threads]
        assert main.main([str(a) for a in (output, *arguments, *options)]) == 0
        svg = contents(output).get("merge.svg")
        found.append([*(file.read_bytes() for file in files), svg])
    assert found[0] == found[1]
