"""The methods: one row each, from which parser, help, refusals, tables and cards follow.

The function of a row's name in merge_methods.py does the work; its arguments are the row's
parameters. To add a method, write the function and add a row.
"""

from dataclasses import replace

from merging.recipes.declarations import DONOR, OPERAND, OPTIONAL, ORIGIN, Method, Parameter
from merging.recipes.parameters import (
    ADD_UP,
    CHANGED,
    DENSITY,
    EPSILON,
    EQUAL_WEIGHT,
    GAMMA,
    LAMBDA,
    LAMBDA_WITH_BASE,
    NORMALIZE,
    RESCALE,
    SEED,
    WEIGHT,
    T,
    negative_weights,
    probabilities,
    weights_cancel,
)

# -------------------------------------------------------------------- sums of tensors

LINEAR = Method(
    "linear",
    base=DONOR,
    models=(1, None),
    parameters=(WEIGHT, NORMALIZE),
    equation="Σ wₜθₜ, over Σ wₜ",
    paper="Model soups",
    link="https://arxiv.org/abs/2203.05482",
    when="runs of one training that differ little, such as seeds or checkpoints",
    checks=(weights_cancel,),
)
TASK_ARITHMETIC = Method(
    "task_arithmetic",
    base=ORIGIN,
    models=(1, None),
    parameters=(WEIGHT, ADD_UP, LAMBDA),
    equation="θ₀ + λ Σ wₜδₜ, with δₜ = θₜ − θ₀",
    paper="Task arithmetic",
    link="https://arxiv.org/abs/2212.04089",
    when="adding skills to a base in chosen amounts, or taking one away by a negative weight",
    checks=(weights_cancel,),
)
SLERP = Method(
    "slerp",
    base=OPERAND,
    models=(2, 2),
    parameters=(T,),
    equation="(sin((1−t)θ)·a + sin(tθ)·b) / sin θ, with θ the angle between the tensors taken as "
    "vectors; a straight line where they are all but parallel",
    paper="Shoemake 1985",
    link="https://doi.org/10.1145/325165.325242",
    when="two models that differ much, or layers that take more of one and less of the other",
)
NUSLERP = Method(
    "nuslerp",
    base=OPTIONAL,
    models=(2, 2),
    parameters=(WEIGHT, LAMBDA_WITH_BASE),
    equation="slerp with t = w₂ / (w₁ + w₂); with a base θ₀ + λ times that of δ₁ and δ₂",
    paper="mergekit's guide",
    link="https://github.com/arcee-ai/mergekit",
    when="slerp of two fine-tunes by weights, or of what they changed of their base",
    checks=(weights_cancel,),
)
MULTISLERP = Method(
    "multislerp",
    base=OPTIONAL,
    models=(2, None),
    parameters=(EQUAL_WEIGHT, LAMBDA_WITH_BASE),
    equation="m Σ wₜ‖θₜ‖, with m the direction of Σ wₜθₜ/‖θₜ‖ and Σ wₜ = 1; with a base "
    "θ₀ + λ times that of the δₜ",
    paper="Multi-SLERP",
    link="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    when="slerp of more than two models, fast",
    checks=(weights_cancel,),
)
KARCHER = Method(
    "karcher",
    base=DONOR,
    models=(2, None),
    parameters=(replace(EQUAL_WEIGHT, help="share of a model, at least 0", low=0),),
    equation="x Σ wₜ‖θₜ‖, with x the direction of least Σ wₜ ∠(x, θₜ)² and Σ wₜ = 1",
    paper="Karcher 1977",
    link="https://arxiv.org/abs/2603.04972",
    when="slerp of more than two models, by the exact mean on the sphere",
    checks=(weights_cancel,),
)
MODEL_STOCK = Method(
    "model_stock",
    base=ORIGIN,
    models=(2, None),
    parameters=(LAMBDA,),
    equation="θ₀ + λt (mean of the θₜ − θ₀), with t = Nc / (1 + (N−1)c), c the mean cosine "
    "between two of the δₜ, and t = 0 where c ≤ 0",
    paper="Model Stock",
    link="https://arxiv.org/abs/2403.19522",
    when="a few fine-tunes of one base on one task, without numbers to choose",
)

# -------------------------------------------------------------------- task vectors

TIES = Method(
    "ties",
    base=ORIGIN,
    models=(1, None),
    parameters=(
        replace(EQUAL_WEIGHT, recipe_default=None),
        replace(DENSITY, default=0.33, help="share of a model's changes to keep, the largest"),
        NORMALIZE,
        Parameter(
            "naive_count",
            "elect signs by counting models instead of summing weighted changes",
            default=False,
            words=("", "naive count"),
        ),
        Parameter(
            "trim_scope",
            "what the share is taken of: each tensor, or the model as a whole, which reads the "
            "inputs twice more",
            default="tensor",
            argument=None,
            choices=("tensor", "model"),
            same_for_all="density",
        ),
        LAMBDA,
    ),
    equation="δₜ = θₜ − θ₀; keep the largest `--density` of each δₜ by magnitude; per entry, "
    "elect the sign of Σ wₜδₜ; θ₀ + λ times the sum of the wₜδₜ of that sign, over the sum of "
    "their wₜ",
    paper="TIES",
    link="https://arxiv.org/abs/2306.01708",
    when="several fine-tunes of one base that should all keep their skills",
    checks=(negative_weights,),
)


def _keeping(
    name: str, parameters: tuple[Parameter, ...], keeps: str, paper: str, link: str, when: str
) -> Method:
    """Return the row of a method that adds up what it keeps of each change."""
    return Method(
        name,
        base=ORIGIN,
        models=(1, None),
        parameters=(WEIGHT, *parameters, ADD_UP, LAMBDA),
        equation=f"{keeps}; θ₀ + λ Σ wₜδₜ",
        paper=paper,
        link=link,
        when=when,
        checks=(weights_cancel, *[probabilities] * (EPSILON in parameters)),
    )


def _electing(method: Method, name: str, normalize: Parameter) -> Method:
    """Return the row of a method that keeps the same and then goes on as ties does."""
    parameters = tuple(normalize if p is ADD_UP else p for p in method.parameters)
    keeps, _, _ = method.equation.rpartition("; ")
    return replace(
        method,
        name=name,
        parameters=parameters,
        equation=f"{keeps}; elect signs and add as `ties`",
        when=f"the same as `{method.name}`, where models disagree",
        checks=(negative_weights, *method.checks[1:]),
    )


DARE_LINEAR = _keeping(
    "dare_linear",
    (DENSITY, SEED, RESCALE),
    "keep each entry of δₜ with the probability `--density`, and divide it by that",
    "DARE",
    "https://arxiv.org/abs/2311.03099",
    "several fine-tunes whose changes are small and redundant",
)
DELLA_LINEAR = _keeping(
    "della_linear",
    (DENSITY, EPSILON, SEED, RESCALE),
    "keep each entry of δₜ with a probability p from `--density` − ε to `--density` + ε, by the "
    "rank of its magnitude in its row, and divide it by p",
    "DELLA",
    "https://arxiv.org/abs/2406.11617",
    "the same as `dare_linear`, where large changes matter more",
)
BREADCRUMBS = _keeping(
    "breadcrumbs",
    (DENSITY, GAMMA),
    "drop the largest `--gamma` of each δₜ by magnitude, then the smallest until `--density` is "
    "left",
    "Model Breadcrumbs",
    "https://arxiv.org/abs/2312.06795",
    "many fine-tunes, of whose changes neither outliers nor noise should stay",
)
DARE_TIES = _electing(DARE_LINEAR, "dare_ties", ADD_UP)
DELLA = _electing(DELLA_LINEAR, "della", NORMALIZE)
BREADCRUMBS_TIES = _electing(BREADCRUMBS, "breadcrumbs_ties", ADD_UP)

# -------------------------------------------------------------------- without weights

SCE = Method(
    "sce",
    base=ORIGIN,
    models=(2, None),
    parameters=(
        Parameter(
            "select_topk",
            "share of the entries to merge, those of largest variance over the models",
            default=1.0,
            low=0,
            high=1,
        ),
        LAMBDA,
    ),
    equation="keep the entries among the `--select-topk` share of largest variance of δ over the "
    "models; wₜ = the mean of δₜ², over their sum; per entry, elect the sign of Σ δₜ; θ₀ + λ times "
    "the sum of the wₜδₜ of that sign, over the sum of their wₜ",
    paper="SCE",
    link="https://arxiv.org/abs/2408.07990",
    when="models of different strengths, without weights to choose",
)
RAM = Method(
    "ram",
    base=ORIGIN,
    models=(1, None),
    parameters=(CHANGED, LAMBDA),
    equation="θ₀ + λ times the mean of the δₜ of those models that changed the entry by more than "
    "`--epsilon`",
    paper="Reinforced Agent Merging",
    link="https://arxiv.org/abs/2601.13572",
    when="fine-tunes that each changed few entries, as by reinforcement learning",
)
RAMPLUS_TL = replace(
    RAM,
    name="ramplus_tl",
    parameters=(
        CHANGED,
        Parameter("r", "how much more of what a model alone changed", default=0.1, low=0),
        Parameter("alpha", "largest ratio of shared to unique entries", default=0.2, low=0),
        LAMBDA,
    ),
    equation=f"{RAM.equation}; what one model alone changed is multiplied by 1 + r·min(α, its "
    "entries changed by others too / by it alone)",
    when="the same as `ram`, where what models share waters down what they do not",
)
NEARSWAP = Method(
    "nearswap",
    base=ORIGIN,
    models=(1, 1),
    parameters=(
        replace(T, help="largest change of an entry, at least 0", high=float("inf")),
        LAMBDA,
    ),
    equation="θ₀ + λ times δ limited to ±t, the `--weight`",
    paper="QuartetAnemoi-70B",
    link="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    when="a base that should become a little like another model where they are near",
)
ARCEE_FUSION = Method(
    "arcee_fusion",
    base=ORIGIN,
    models=(1, 1),
    parameters=(LAMBDA,),
    equation="keep the entries of δ whose importance, their size times KL(softmax of the row of θ "
    "‖ of θ₀), is at least median + 1.5 (Q₃ − Q₁) of it; θ₀ + λδ",
    paper="Arcee Fusion",
    link="https://github.com/arcee-ai/mergekit",
    when="a base that should take only the most important changes of one fine-tune",
)

METHODS = {
    method.name: method
    for method in (
        TIES, LINEAR, SLERP, TASK_ARITHMETIC, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK,
        DARE_LINEAR, DARE_TIES, DELLA_LINEAR, DELLA, BREADCRUMBS, BREADCRUMBS_TIES,
        SCE, RAM, RAMPLUS_TL, NEARSWAP, ARCEE_FUSION,
    )
}  # fmt: skip

# What bakllama.py does with the layers of a slice.
PASSTHROUGH = Method(
    "passthrough",
    base=DONOR,
    models=(1, 1),
    parameters=(Parameter("scale", "factor of all weights, or of some modules'", default=1.0),),
    equation="layers of the models below, in this order",
    paper="",
    link="",
    when="a model of layers taken from others",
    done="scaled",
)
