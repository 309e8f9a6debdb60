"""The methods: one row each, from which parser, help, refusals, tables and cards follow.

The function of a row's name in merge_methods.py does the work; its arguments are the row's
parameters. To add a method, write the function and add a row.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A number of a method, or a switch (whose default is True or False)."""

    name: str
    help: str
    default: float | bool | None = None  # None: must be given
    option: str = ""  # if it is not the name
    argument: str = ""  # of the function, if it is not the name
    per_model: bool = False  # one for each model to merge, rather than one for all
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False  # whether `low` itself is too low
    filters: bool = False  # whether it may differ by tensor name, as in NAME:NUMBER
    words: tuple[str, str] = ("", "")  # what a table says of a switch that is off, or on

    def __post_init__(self) -> None:
        object.__setattr__(self, "option", f"--{self.option or self.name.replace('_', '-')}")
        object.__setattr__(self, "argument", self.argument or self.name)

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def range(self) -> str:
        return f"{'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"

    def allows(self, value: float) -> bool:
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high


ORIGIN = "the model that the others were fine-tuned from (required)"
OPERAND = "the first of the models"
DONOR = "only gives config, tokenizer and vocabulary"


@dataclass(frozen=True)
class Method:
    """A method: what it takes, what it computes of each tensor, and who says so."""

    name: str
    base: str  # what --base-model means to it: ORIGIN, OPERAND or DONOR
    models: tuple[int, int | None]  # how many are merged, at least and at most
    parameters: tuple[Parameter, ...]
    equation: str
    paper: str
    link: str
    when: str  # to choose it, in a sentence
    normalizable: bool = False  # its weights must not sum to zero when normalising
    positive: bool = False  # its weights must not be negative when normalising
    done: str = "merged"  # what is said of its tensors

    @property
    def needs(self) -> str:
        """Say which models and numbers it cannot do without."""
        fewest, most = self.models
        models = {(1, None): "one or more `--merge`", (2, 2): "two models"}.get(
            self.models, f"{fewest} or more models" if most is None else f"{fewest} models"
        )
        required = [f"`{p.option}`" for p in self.parameters if p.default is None]
        return ", ".join(["`--base-model`"] * (self.base == ORIGIN) + [models, *required])


NORMALIZE = Parameter(
    "normalize",
    "divide by the sum of the weights",
    default=True,
    words=("not normalized", "normalized"),
)


def _weight(default: float | None, largest: float = math.inf) -> Parameter:
    text = "factor of a model, any number"
    return Parameter(
        "weight", text, default, argument="weights", per_model=True, low=-largest, high=largest
    )


TIES = Method(
    "ties",
    base=ORIGIN,
    models=(1, None),
    parameters=(
        _weight(default=1.0, largest=1e30),
        Parameter(
            "density",
            "fraction of a model's changes to keep, the largest, in (0, 1]",
            default=0.33,
            argument="densities",
            per_model=True,
            low=0,
            high=1,
            above_low=True,
        ),
        NORMALIZE,
        Parameter(
            "naive_count",
            "elect signs by counting models instead of summing weighted changes",
            default=False,
            words=("", "naive count"),
        ),
    ),
    equation="δₜ = θₜ − θ_base; keep the largest `--density` of each δₜ by magnitude; per entry, "
    "elect the sign of Σ wₜδₜ; add to the base the sum of the wₜδₜ of that sign, over the sum of "
    "their wₜ",
    paper="TIES",
    link="https://arxiv.org/abs/2306.01708",
    when="several fine-tunes of one base that should all keep their skills",
    positive=True,
)
LINEAR = Method(
    "linear",
    base=DONOR,
    models=(1, None),
    parameters=(_weight(default=None), NORMALIZE),
    equation="Σ wₜθₜ, over Σ wₜ",
    paper="Model soups",
    link="https://arxiv.org/abs/2203.05482",
    when="runs of one training that differ little, such as seeds or checkpoints",
    normalizable=True,
)
SLERP = Method(
    "slerp",
    base=OPERAND,
    models=(2, 2),
    parameters=(
        Parameter(
            "t",
            "the t from 0 (base, or first model) to 1 (the other), and as NAME:W another for "
            "tensors of which NAME is a component of the name",
            option="weight",
            low=0,
            high=1,
            filters=True,
        ),
    ),
    equation="(sin((1−t)θ)·a + sin(tθ)·b) / sin θ, with θ the angle between the tensors taken as "
    "vectors; a straight line where they are all but parallel",
    paper="Shoemake 1985",
    link="https://doi.org/10.1145/325165.325242",
    when="two models that differ much, or layers that take more of one and less of the other",
)
METHODS = {method.name: method for method in (TIES, LINEAR, SLERP)}

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


def users(option: str, methods: Iterable[Method] = METHODS.values()) -> str:
    """Return the names of the methods that use an option, as text."""
    names = [m.name for m in methods if any(p.option == option for p in m.parameters)]
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
