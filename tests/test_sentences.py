"""What the rules say of reports that are made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.arithmetic.likeness import likeness
from merging.plans.plan import Plan, PlannedTensor
from merging.recipes.methods import METHODS
from merging.recipes.recipe import Recipe, Slice, Source
from merging.runs.phrases import percent, times
from merging.runs.report import Report, short_names
from merging.runs.sections import sections, unlike
from merging.runs.sentences import sentences

# Directions of changes, at right angles to each other and to the base.
ALONG, ACROSS, BASE = torch.eye(3, 8, dtype=torch.float64)
ATTENTION, MLP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def report_of(
    changes: dict[str, Sequence[Tensor]],
    method: str = "ties",
    models: Sequence[str] = ("org/a", "org/b"),
    output: Sequence[float] = (0.5, 0.5),
    left: Sequence[float] = (1, 1),
    **arguments: Any,
) -> Report:
    """Return the report of a merge of what models changed, by the tensor's name.

    With a base of norm 1 if the method has one; the output adds the changes up, with factors, and
    `left` of each is the share that trimming leaves.
    """
    has_base = METHODS[method].base.endswith("(required)")
    base = BASE if has_base else torch.zeros(8, dtype=torch.float64)
    owners = ("org/base", *models) if has_base else tuple(models)
    found, planned = {}, {}
    for name, of_models in changes.items():
        made = sum((f * x for f, x in zip(output, of_models, strict=True)), base)
        tensors = [base + change for change in of_models]
        measured = likeness(torch.as_tensor(made), tensors, base if has_base else None)
        shares = [*left, *[1] * len(models)]
        kept = [share * square for share, square in zip(shares, measured.kept, strict=False)]
        found[name] = replace(measured, kept=kept)
        planned[name] = PlannedTensor(
            (), (8,), torch.float64, METHODS[method], arguments, has_base, models=owners
        )
    recipe = Recipe(METHODS[method], (Slice(tuple(map(Source, models))),), base="org/base")
    unused: Any = None
    return Report(recipe, Plan("org/base", planned, unused, unused), found)


def said(*given: Any, **options: Any) -> list[str]:
    return sentences(report_of(*given, **options))


def test_changes_are_compared_with_the_base_and_with_each_other() -> None:
    alike = said({ATTENTION.format(0): (0.021 * ALONG, 0.02 * ACROSS)})
    assert alike[0] == "a changes the base by 2.1 % and b by 2.0 %."
    uneven = said({ATTENTION.format(0): (0.002 * ALONG, 0.02 * ACROSS)})
    assert uneven[0] == "a changes the base by 0.20 % and b by 2.0 %: b 10 times as much as a."
    little = said({ATTENTION.format(0): (0.02 * ALONG, 0.0002 * ACROSS)})
    assert little[:2] == [
        "b is all but equal to the base (0.020 %).",
        "a changes the base by 2.0 %.",
    ]
    assert "The output has 50 % of a's change." in little
    none = said({ATTENTION.format(0): (0.02 * ALONG, 0 * ACROSS)})
    assert none[0] == "b equals the base: it changes nothing."


@pytest.mark.parametrize(
    "other, words",
    [
        (ALONG, "make all but the same change (cosine 1.00)."),
        (ALONG + ACROSS, "change the base in similar directions (cosine 0.71)."),
        (ACROSS + 0.2 * ALONG, "change the base a little in one direction (cosine 0.20)."),
        (ACROSS - 0.2 * ALONG, "pull a little apart (cosine -0.20)."),
        (ACROSS, "change the base in unrelated directions (cosine 0.00)."),
        (ACROSS - 0.05 * ALONG, "change the base in unrelated directions (cosine -0.05)."),
        (ACROSS - ALONG, "pull in opposite directions (cosine -0.71)."),
    ],
)
def test_directions_are_told(other: Tensor, words: str) -> None:
    found = said({ATTENTION.format(0): (0.02 * ALONG, 0.02 * other)})
    assert f"a and b {words}" in found


def test_of_many_pairs_the_extremes_are_told() -> None:
    changes = (ALONG, ALONG + 0.1 * ACROSS, ACROSS, -ALONG + 3 * ACROSS)
    found = said(
        {ATTENTION.format(0): [0.02 * c for c in changes]},
        models=["org/a", "org/b", "org/c", "org/d"],
        output=[1, 0, 0, 0],
    )
    told = [text for text in found if "cosine" in text]
    assert told == [
        "a and d pull in opposite directions (cosine -0.32).",
        "a and b make all but the same change (cosine 1.00).",
    ]


def test_where_models_disagree_is_told_by_kind_and_layers() -> None:
    changes = {ATTENTION.format(i): (ALONG, ALONG) for i in range(6)}
    angles = {1: 0.8, 2: -0.5, 3: -0.6, 4: -0.45, 5: 0.7}
    changes |= {
        MLP.format(i): (ALONG, cosine * ALONG + (1 - cosine**2) ** 0.5 * ACROSS)
        for i, cosine in angles.items()
    }
    found = said({name: (0.02 * a, 0.02 * b) for name, (a, b) in changes.items()})
    assert "a and b disagree most in the MLPs of layers 2 to 4 (cosine -0.60 to -0.45)." in found
    found = said(
        {name: (0.02 * a, 0.02 * b) for name, (a, b) in changes.items() if "4" not in name}
    )
    assert "a and b disagree most in the MLPs of layers 2 to 3 (cosine -0.60 to -0.50)." in found
    everywhere = {MLP.format(i): (ALONG, ACROSS) for i in range(6)} | {HEAD: (ALONG, ALONG)}
    found = said({name: (0.02 * a, 0.02 * b) for name, (a, b) in everywhere.items()})
    assert "a and b agree least in the MLPs of all layers (cosine 0.00)." in found
    some = {MLP.format(0): (ALONG, ACROSS), ATTENTION.format(0): (ALONG, ALONG)}
    found = said({name: (0.02 * a, 0.02 * b) for name, (a, b) in some.items()})
    assert "a and b agree least in the MLP of layer 0 (cosine 0.00)." in found


def test_where_a_model_hardly_changed_anything_is_not_told() -> None:
    changes = {ATTENTION.format(0): (ALONG, ALONG), MLP.format(0): (0.001 * ALONG, -ALONG)}
    found = said({name: (0.02 * a, 0.02 * b) for name, (a, b) in changes.items()})
    assert not [text for text in found if "MLP" in text]


def test_embeddings_that_changed_more_than_layers_are_told() -> None:
    found = said(
        {
            ATTENTION.format(0): (0.01 * ALONG, 0.01 * ACROSS),
            EMBEDDING: (0.1 * ALONG, 0.02 * ACROSS),
        }
    )
    assert "a's embedding differs 10 times as much as its layers: other tokens?" in found
    assert not [text for text in found if "b's embedding" in text]


def test_kinds_that_a_model_left_alone_are_told() -> None:
    changes = {
        ATTENTION.format(0): (0.01 * ALONG, 0.01 * ACROSS),
        MLP.format(0): (0 * ALONG, 0.01 * ACROSS),
        HEAD: (0 * ALONG, 0 * ALONG),
    }
    found = said(changes)
    assert "a changes nothing but its attention." in found
    assert "b has the head of the base." in found


def test_signs_are_told() -> None:
    both = torch.tensor([1.0, 1, -1, 0, 1, 1, 1, 1], dtype=torch.float64)
    other = torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
    found = said({ATTENTION.format(0): (0.01 * both, 0.01 * other)})
    assert "The changes disagree in sign at 25 % of the entries." in found


@pytest.mark.parametrize(
    "arguments, advice",
    [
        ({"weights": [1.0, 0.5], "normalize": False}, ": consider weight 1 for b."),
        ({"weights": [1.0, 0.5], "normalize": True}, ": consider a higher weight than 0.5 for b."),
        ({"weights": [1.0, 0.5]}, ": consider a higher weight than 0.5 for b."),
        ({"weights": [1.0, -0.5], "normalize": False}, "."),
        ({}, "."),
    ],
)
def test_uneven_shares_in_the_output_bring_advice(arguments: Any, advice: str) -> None:
    name = ATTENTION.format(0)
    found = said({name: (0.02 * ALONG, 0.02 * ACROSS)}, output=(0.8, 0.4), **arguments)
    assert f"The output has 80 % of a's change and 40 % of b's{advice}" in found
    even = said({name: (0.02 * ALONG, 0.02 * ACROSS)}, output=(0.8, 0.6), **arguments)
    assert "The output has 80 % of a's change and 60 % of b's." in even


@pytest.mark.parametrize(
    "left, density, advice",
    [
        ((0.9, 0.4), 0.1, ": consider a higher density than 0.1 for b."),
        ((0.9, 0.4), 1.0, ": consider weight 2 for b."),
        ((0.9, 0.8), 0.1, ": consider weight 2 for b."),
    ],
)
def test_trimming_is_told_and_a_density_advised_where_it_takes_more_than_half(
    left: tuple[float, float], density: float, advice: str
) -> None:
    found = said(
        {ATTENTION.format(0): (0.02 * ALONG, 0.02 * ACROSS)},
        output=(0.8, 0.4),
        left=left,
        weights=[1.0, 1.0],
        densities=[0.5, density],
        normalize=False,
    )
    first, second = percent(left[0]), percent(left[1])
    assert f"After trimming, {first} of a's change is left and {second} of b's." in found
    assert "What is left disagrees in sign at 0 % of the entries." in found
    assert f"The output has 80 % of a's change and 40 % of b's{advice}" in found


def test_an_advised_weight_makes_shares_even() -> None:
    """Where changes are at right angles, as those of different skills nearly are."""
    name, changes = ATTENTION.format(0), (0.02 * ALONG, 0.03 * ACROSS)
    before = said({name: changes}, output=(1, 0.4), weights=[1.0, 0.4], normalize=False)
    assert "The output has 100 % of a's change and 40 % of b's: consider weight 1 for b." in before
    after = said({name: changes}, output=(1, 1), weights=[1.0, 1.0], normalize=False)
    assert "The output has 100 % of a's change and 100 % of b's." in after


def test_an_output_beyond_the_models_or_against_one_is_told() -> None:
    found = said({ATTENTION.format(0): (0.02 * ALONG, 0.02 * ACROSS)}, output=(2, -1))
    assert "The output moves against b's change." in found
    assert found[-1] == "The output changes the base by 4.5 %, more than any of the models."


@pytest.mark.parametrize(
    "a, b, words",
    [
        (BASE, BASE + 0.001 * ALONG, "are all but equal (cosine 1.0000)."),
        (BASE, BASE + 0.2 * ALONG, "are alike (cosine 0.9806), as models of one origin are."),
        (BASE, BASE + ALONG, "have drifted far apart (cosine 0.7071)."),
        (BASE, ALONG, "have little in common (cosine 0.0000): if they were not trained from one"),
    ],
)
def test_models_without_a_base_are_compared(a: Tensor, b: Tensor, words: str) -> None:
    found = said({ATTENTION.format(0): (a, b)}, method="linear")
    assert found[0].startswith(f"a and b {words}")


def test_where_models_are_least_alike_and_what_the_output_is_near_to() -> None:
    changes = {ATTENTION.format(i): (BASE, BASE + 0.01 * ALONG) for i in range(3)}
    changes[MLP.format(1)] = (BASE, BASE + 0.3 * ALONG)
    found = said(changes, method="linear", output=(0.75, 0.25))
    assert found[1] == "a and b are least alike in the MLP of layer 1 (cosine 0.9578)."
    assert found[2] == ("The output is nearest to a (3.8 % away) and farthest from b (11 %).")
    found = said(changes, method="linear")
    assert found[2] == "The output is about as far from each model (7.5 %)."


def test_a_model_beside_one_of_zeros_is_not_called_scaled() -> None:
    """They share tensors, though they have no cosine; alone in its tensors, it is scaled."""
    name = ATTENTION.format(0)
    assert said({name: (BASE, torch.zeros(8, dtype=torch.float64))}, method="linear") == []
    alone = said({name: (BASE,)}, method="linear", models=["a"], output=[0.5])
    assert alone == ["What is taken of a is scaled, by 50 % of it in all."]


def test_a_report_of_nothing_says_nothing() -> None:
    for method in ("ties", "linear"):
        report = report_of({}, method=method)
        assert sentences(report) == [] and sections(report) == [] and unlike(report) == []


def test_the_most_unlike_tensors_are_named_and_small_ones_are_not() -> None:
    changes = {ATTENTION.format(i): (ALONG, (i / 10) * ALONG + ACROSS) for i in range(8)} | {
        "model.norm.weight": (1e-3 * ALONG, -1e-3 * ALONG)
    }
    found = unlike(report_of(changes))
    assert [tensor.name for tensor, _, _ in found] == [ATTENTION.format(i) for i in range(5)]
    assert found[0][1:] == ("a and b", "cosine 0.0000")
    alone = unlike(report_of({n: (a,) for n, (a, _) in changes.items()}, models=["a"], output=[1]))
    assert alone[0][1:] == ("a", "changed by 100 %")


def test_names_of_models_are_short_where_they_differ() -> None:
    assert short_names(["org/a", "./models/b/", "base+you/lora"]) == ["a", "b", "lora"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert short_names(["x/a", "x/a", "b"]) == ["a", "a (2)", "b"]


def test_numbers_are_told_with_two_digits() -> None:
    told = [percent(x) for x in (0, 1e-7, 0.000213, 0.0213, 0.213, 1, 2.5, -0.12)]
    assert told == ["0 %", "under 0.001 %", "0.021 %", "2.1 %", "21 %", "100 %", "250 %", "-12 %"]
    assert [times(x) for x in (0.5, 3.04, 9.4, 9.6, 120)] == [
        "0.5 times", "3 times", "9.4 times", "10 times", "120 times",
    ]  # fmt: skip
