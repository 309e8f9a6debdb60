"""What a row of the table of methods says: a method, and the parameters that it takes."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A number of a method; or a switch (whose default is True or False), a choice, or a seed."""

    name: str
    help: str
    default: float | bool | str | None = None  # None: must be given
    option: str = ""  # if it is not the name
    argument: str | None = ""  # of the function, if it is not the name; None if it takes none
    per_model: bool = False  # one for each model to merge, rather than one for all
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False  # whether a value must be above `low` somewhere in the model
    below_high: bool = False  # whether `high` itself is too high
    words: tuple[str, str] = ("", "")  # what a table says of a switch that is off, or on
    choices: tuple[str, ...] = ()
    same_for_all: str = ""  # the parameter that must not vary over a model unless this has default
    is_seed: bool = False  # of random masks; the function takes keys made of it
    with_base: bool = False  # whether it has a meaning only with a base
    recipe_default: float | bool | None | EllipsisType = ...  # mergekit's, if it is another

    def __post_init__(self) -> None:
        option = self.option.removeprefix("--") or self.name.replace("_", "-")
        object.__setattr__(self, "option", f"--{option}")
        if self.argument == "":
            object.__setattr__(self, "argument", self.name)

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def is_number(self) -> bool:
        """Whether it may vary over the layers and by name."""
        return not (self.is_switch or self.choices or self.is_seed)

    @property
    def range(self) -> str:
        return (
            f"{'(' if self.above_low else '['}{self.low:g}, "
            f"{self.high:g}{')' if self.below_high else ']'}"
        )

    def allows(self, value: float) -> bool:
        return self.low <= value and (value < self.high if self.below_high else value <= self.high)


ORIGIN = "the model that the others were fine-tuned from (required)"
OPTIONAL = "the model that the others were fine-tuned from, to merge their changes (optional)"
OPERAND = "the first of the models"
DONOR = "only gives config, tokenizer and vocabulary"

# Says why arguments, by name, cannot be taken together; None if they can.
Check = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Method:
    """A method: what it takes, what it computes of each tensor, and who says so."""

    name: str
    base: str  # what --base-model means to it: one of the above
    models: tuple[int, int | None]  # how many are merged, at least and at most
    parameters: tuple[Parameter, ...]
    equation: str
    paper: str
    link: str
    when: str  # to choose it, in a sentence
    checks: tuple[Check, ...] = ()
    done: str = "merged"  # what is said of its tensors

    @property
    def needs(self) -> str:
        """Say which models and numbers it cannot do without."""
        fewest, most = self.models
        models = {
            (1, None): "one or more `--merge`",
            (1, 1): "one `--merge`",
            (2, 2): "two models",
        }.get(self.models, f"{fewest} or more models")
        required = [f"`{p.option}`" for p in self.parameters if p.default is None]
        return ", ".join(["`--base-model`"] * (self.base == ORIGIN) + [models, *required])

    @property
    def takes(self) -> str:
        """Say which options it has besides those that it needs."""
        optional = [f"`{p.option}`" for p in self.parameters if p.default is not None]
        base = ["`--base-model`"] * (self.base == OPTIONAL)
        return ", ".join([*base, *optional])


def users(option: str, methods: Iterable[Method]) -> str:
    """Return the names of the methods that use an option, as text."""
    names = [m.name for m in methods if any(p.option == option for p in m.parameters)]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
