"""The parameters that several methods take, and what must hold of several of them together."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merging.arithmetic.weights import LARGEST_WEIGHT, are_probabilities, normalized
from merging.recipes.declarations import Parameter

# -------------------------------------------------------------------- what goes together

NOT_NORMALIZED = "--no-normalize (in a recipe, normalize: false)"


def weights_cancel(arguments: Mapping[str, Any]) -> str | None:
    if arguments.get("normalize", True):
        try:
            normalized(arguments["weights"])
        except ValueError as error:
            other = f"{NOT_NORMALIZED} or other weights" if "normalize" in arguments else "others"
            return f"{error}; use {other}"
    return None


def negative_weights(arguments: Mapping[str, Any]) -> str | None:
    weights, normalize = arguments["weights"], arguments["normalize"]
    if normalize and min(weights) < 0:
        return f"negative weights {weights} cannot be normalised; they need {NOT_NORMALIZED}"
    if not normalize and max(map(abs, weights)) > LARGEST_WEIGHT:
        return f"weights {weights} are too large, expected at most {LARGEST_WEIGHT:g}"
    return None


def probabilities(arguments: Mapping[str, Any]) -> str | None:
    for density, epsilon in zip(arguments["densities"], arguments["epsilons"], strict=True):
        if not are_probabilities(density, epsilon):
            return (
                f"a density of {density:g} and an epsilon of {epsilon:g}: expected density - "
                "epsilon and density + epsilon in (0, 1), or a density of 1; use a smaller epsilon"
            )
    return None


# -------------------------------------------------------------------- parameters

WEIGHT = Parameter("weight", "factor of a model, any number", argument="weights", per_model=True)
EQUAL_WEIGHT = replace(WEIGHT, default=1.0)
T = Parameter(
    "t", "the t from 0 (base, or first model) to 1 (the other)", option="weight", low=0, high=1
)
NORMALIZE = Parameter(
    "normalize",
    "divide by the sum of the weights; after an election of signs, of those that agree",
    default=True,
    words=("not normalized", "normalized"),
)
ADD_UP = replace(NORMALIZE, default=False)
LAMBDA = Parameter("lambda", "factor of the merged change", default=1.0, argument="lambda_")
LAMBDA_WITH_BASE = replace(LAMBDA, with_base=True)
DENSITY = Parameter(
    "density",
    "share of a model's changes to keep, in (0, 1]; 0 for some tensors only",
    argument="densities",
    per_model=True,
    low=0,
    high=1,
    above_low=True,
    recipe_default=1.0,
)
RESCALE = Parameter(
    "rescale",
    "divide what is kept by the probability to keep it",
    default=True,
    words=("not rescaled", ""),
)
SEED = Parameter(
    "seed",
    "of the random choice, a whole number",
    default=0,
    argument="keys",
    low=0,
    high=2**63 - 1,
    is_seed=True,
)
EPSILON = Parameter(
    "epsilon",
    "how far the probability is from the density at most, for the smallest and largest changes",
    default=0.15,
    argument="epsilons",
    per_model=True,
    low=0,
    high=0.5,
    below_high=True,
)
GAMMA = Parameter(
    "gamma",
    "share of a model's changes to drop as too large, in [0, 1)",
    default=0.01,
    argument="gammas",
    per_model=True,
    low=0,
    high=1,
    below_high=True,
)
CHANGED = Parameter("epsilon", "size above which an entry counts as changed", default=1e-5, low=0)
