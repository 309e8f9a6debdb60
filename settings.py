"""What a user asks of main.py: its options, paired with the models and checked, and as text."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cli
from problems import collecting, some
from schedules import Schedule, layer_values, matches, parse_values

DEFAULT_WEIGHT = 1.0  # for ties; linear and slerp ask for one
DEFAULT_DENSITY = 0.33


@dataclass(frozen=True)
class Settings:
    """A merge as the user asked for it, checked and with every default filled in."""

    method: str
    base: str | None
    merges: tuple[str, ...]
    weights: tuple[Schedule, ...]  # one a merge; of slerp, the only t
    densities: tuple[Schedule, ...] | None
    normalize: bool
    naive_count: bool

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, the donor first."""
        return tuple(filter(None, (self.base, *self.merges)))

    @property
    def operands(self) -> tuple[str, ...]:
        """The models that the arithmetic takes, in its order."""
        with_base = self.base is not None and self.method != "linear"
        return (str(self.base), *self.merges) if with_base else self.merges

    def numbers(self, name: str, place: float) -> "Numbers":
        """Return the weights and densities for a tensor at a place among the layers."""
        weights = [weight.at(name, place) for weight in self.weights]
        if self.method == "linear" and self.normalize:
            check_normalizable(weights)
        return Numbers(weights, [density.at(name, place) for density in self.densities or ()])


class Numbers(NamedTuple):
    """The weights and densities of one tensor."""

    weights: list[float]
    densities: list[float]


class InOrder(argparse.Action):
    """Collect (option, value) of several options in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.given = [*namespace.given, (self.dest, values)]


def numbers(text: str) -> tuple[str | None, tuple[float, ...]]:
    """Parse an option's number, list of numbers, or either with a filter."""
    try:
        return parse_values(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number, or a list such as 0,0.5,1, got {text!r}"
        ) from error


def build_parser(methods: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Merge language models that share an architecture. A model is a local "
        "directory or a Hugging Face Hub id (org/name, or org/name@revision).",
        epilog="--weight and --density are given once for all models (before the first --merge, or "
        "after the last), or once for each --merge, in the same order. Each is a number, or a list "
        "such as 0,0.5,1 that is interpolated from the first layer to the last. "
        f"{cli.EXIT_STATUS}",
        allow_abbrev=False,
    )
    parser.set_defaults(given=[])
    parser.add_argument("output", help="directory to write the merged model to")
    parser.add_argument(
        "--merge",
        metavar="MODEL",
        type=cli.model_name,
        action=InOrder,
        help="a model to merge; repeat for each (at least one)",
    )
    parser.add_argument(
        "--base-model",
        metavar="MODEL",
        type=cli.model_name,
        help="ties: the model that the others were fine-tuned from (required); slerp: the model at "
        "weight 0; linear: only gives config, tokenizer and vocabulary",
    )
    parser.add_argument(
        "--method",
        choices=tuple(methods),
        default="ties",
        help="how to merge (default: %(default)s)",
    )
    parser.add_argument(
        "--weight",
        metavar="W",
        type=numbers,
        action=InOrder,
        help="ties, linear: factor of a model, any number (ties default: "
        f"{DEFAULT_WEIGHT:g}); slerp: the t from 0 (base, or first model) to 1 (the other), and "
        "as NAME:W another for tensors of which NAME is a component of the name",
    )
    parser.add_argument(
        "--density",
        metavar="D",
        type=numbers,
        action=InOrder,
        help="ties: fraction of a model's changes to keep, the largest, in (0, 1] "
        f"(default: {DEFAULT_DENSITY})",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="ties, linear: divide by the sum of the weights (default: --normalize)",
    )
    parser.add_argument(
        "--naive-count",
        action="store_true",
        help="ties: elect signs by counting models instead of summing weighted changes",
    )
    parser.add_argument(
        "--copy-tokenizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy the tokenizer of the base, or else of the first model (default: "
        "--copy-tokenizer)",
    )
    cli.add_common_options(parser)
    return parser


def paired(given: Sequence[tuple[str, Any]], option: str) -> tuple[Any, ...] | None:
    """Return one value of an option per --merge, or None if it was not given.

    One value serves all models, if it does not stand between two of them; else each has its own.
    """
    values = [value for name, value in given if name == option]
    order = [name for name, _ in given if name in ("merge", option)]
    models = order.count("merge")
    if not values:
        return None
    if len(values) == models:
        return tuple(values)
    if len(values) > 1:
        raise ValueError(
            f"--{option} was given {len(values)} times for {models} --merge options; give it once "
            "for all of them, or once for each"
        )
    if 0 < order.index(option) < models:
        raise ValueError(
            f"--{option} {Schedule(values[0][1])} stands between two of {models} --merge options, "
            f"so it is unclear whether it is for one model or for all; give --{option} for each "
            "--merge, or once after the last"
        )
    return (values[0],) * models


def settings_from(arguments: argparse.Namespace, problems: list[str]) -> Settings:
    """Check the merge options against each other and the method, and add what is wrong.

    Options that the method does not use are refused.
    """
    method, base, given = arguments.method, arguments.base_model, arguments.given
    merges = tuple(value for name, value in given if name == "merge")
    weights: tuple[Schedule, ...] | None = None
    densities: tuple[Schedule, ...] | None = None
    with collecting(problems):
        weights = (slerp_weight(given),) if method == "slerp" else per_model(given, "weight")
    with collecting(problems):
        densities = per_model(given, "density")
    options = {name for name, _ in given}

    if not merges:
        problems.append("no model to merge; name at least one with --merge")
    if method != "ties" and "density" in options:
        problems.append(f"--density is for ties, --method is {method}")
    if method != "ties" and arguments.naive_count:
        problems.append(f"--naive-count is for ties, --method is {method}")
    if method != "ties" and "weight" not in options:
        problems.append(f"--method {method} needs --weight")
    normalize = arguments.normalize is not False
    if method == "slerp":
        problems += _slerp_problems(arguments, merges, weights)
    elif method == "ties":
        if base is None:
            problems.append("--method ties needs --base-model, the model the others came from")
        problems += [
            f"--density: expected a number in (0, 1], got {density:g}"
            for density in _every_value(densities)
            if not 0 < density <= 1
        ]
        if normalize and any(weight < 0 for weight in _every_value(weights)):
            problems.append("negative weights with ties need --no-normalize")
    elif weights and normalize and not any(weight.varies for weight in weights):
        with collecting(problems):
            check_normalizable([weight.at("", 0) for weight in weights])
    count = len(merges)
    default_densities = (Schedule((DEFAULT_DENSITY,)),) * count
    return Settings(
        method=method,
        base=base,
        merges=merges,
        weights=weights or (Schedule((DEFAULT_WEIGHT,)),) * count,
        densities=(densities or default_densities) if method == "ties" else None,
        normalize=normalize and method != "slerp",
        naive_count=arguments.naive_count,
    )


def check_normalizable(weights: Sequence[float]) -> None:
    """Refuse weights whose sum is about zero; ValueError says what to do."""
    from merge_methods import check_normalizable

    try:
        check_normalizable(weights)
    except ValueError as error:
        raise ValueError(f"{error}; use --no-normalize or other weights") from error


def per_model(given: Sequence[tuple[str, Any]], option: str) -> tuple[Schedule, ...] | None:
    """Return what an option says of each --merge; ValueError if it filters names."""
    pairs = paired(given, option) or ()
    words = {word for word, _ in pairs if word}
    if words:
        raise ValueError(
            f"--{option} {some(words)}: filters by name are for slerp; expected a number or a list"
        )
    return tuple(Schedule(values) for _, values in pairs) or None


def slerp_weight(given: Sequence[tuple[str, Any]]) -> Schedule:
    """Return the one t of slerp, of all its --weight options."""
    pairs = [value for name, value in given if name == "weight"]
    if len(pairs) == 1:
        paired(given, "weight")  # refuses one that seems to belong to one of two models
    bare = [values for word, values in pairs if word is None]
    words = [word for word, _ in pairs if word]
    if pairs and len(bare) != 1:
        raise ValueError(
            f"slerp takes one --weight, the t between its two models, besides any with a filter "
            f"(NAME:W); got {len(bare)}"
        )
    if twice := {word for word in words if words.count(word) > 1}:
        raise ValueError(f"--weight {some(twice)}: given twice; the first would hide the second")
    return Schedule(bare[0] if bare else (), tuple((w, v) for w, v in pairs if w))


def _every_value(schedules: Sequence[Schedule] | None) -> list[float]:
    return sorted(set().union(*(schedule.every_value() for schedule in schedules or ())))


def _slerp_problems(
    arguments: argparse.Namespace, merges: Sequence[str], weights: Sequence[Schedule] | None
) -> list[str]:
    problems = []
    models = len(merges) + (arguments.base_model is not None)
    if models != 2:
        problems.append(
            f"slerp merges exactly two models, --base-model and one --merge or two --merge; "
            f"got {models}"
        )
    problems += [
        f"--weight: slerp needs t in [0, 1], got {t:g}"
        for t in _every_value(weights)
        if not 0 <= t <= 1
    ]
    if arguments.normalize is not None:
        problems.append("--normalize and --no-normalize are for ties and linear, not for slerp")
    return problems


def table(settings: Settings) -> str:
    """Return the resolved settings as text, one model a line."""
    rows = [("model", "weight", "density")]
    if settings.method == "slerp":
        t = settings.weights[0]
        shares = ("1 - t", f"t = {t}") if t.varies else (f"{1 - t.values[0]:g}", str(t))
        rows += list(zip(settings.operands, shares, ("", ""), strict=True))
    else:
        if settings.base is not None:
            role = "base" if settings.method == "ties" else "donor only"
            rows.append((settings.base, role, ""))
        densities = settings.densities or ("",) * len(settings.merges)
        rows += [
            (model, str(weight), str(density))
            for model, weight, density in zip(
                settings.merges, settings.weights, densities, strict=True
            )
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    flags = [settings.method]
    if settings.method != "slerp":
        flags.append("normalized" if settings.normalize else "not normalized")
    if settings.naive_count:
        flags.append("naive count")
    return "\n".join([f"method: {', '.join(flags)}", *lines])


def description(settings: Settings) -> tuple[str, str]:
    """Return for a model card the equation of the method, and its source."""
    over = " / Σ wₜ" if settings.normalize else ""
    if settings.method == "ties":
        equation = f"θ_base + Σ wₜδₜ{over}, of those changes δₜ = θₜ - θ_base that are among the "
        equation += "largest of their model and have the elected sign"
        return equation, "[TIES-Merging](https://arxiv.org/abs/2306.01708)"
    if settings.method == "linear":
        return f"Σ wₜθₜ{over}", "[Model soups](https://arxiv.org/abs/2203.05482)"
    equation = "(sin((1 - t)φ) a + sin(tφ) b) / sin φ, φ being the angle between tensors a and b"
    return equation, "[Shoemake 1985](https://doi.org/10.1145/325165.325242)"


def unused_filters(settings: Settings, names: Sequence[str]) -> list[str]:
    """Return the filters that match no tensor, or none that an earlier one leaves."""
    components = {part for name in names for part in name.split(".") if not part.isdigit()}
    problems = []
    rest = list(names)
    for word, _ in settings.weights[0].filters:
        if not any(matches(word, name) for name in rest):
            problems.append(
                f"--weight {word}: matches no tensor that is left to it; "
                f"names have {some(components - {'weight', 'bias'}, 20)}"
            )
        rest = [name for name in rest if not matches(word, name)]
    return problems


def layer_notes(settings: Settings, place: Mapping[str, float]) -> list[str]:
    """Return lines with the numbers at each place, from the first layer to the last."""
    lines = []
    merges = settings.merges if settings.method != "slerp" else ("t",)
    for option, schedules in (("weight", settings.weights), ("density", settings.densities or ())):
        for model, schedule in zip(merges, schedules, strict=False):
            if schedule.varies:
                of = "" if model == "t" else f" of {model}"
                lines += [f"{option}{of}, {line}" for line in layer_values(schedule, place)]
    return lines
