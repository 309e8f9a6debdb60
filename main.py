"""Merge checkpoints of one architecture into one, by TIES, linear averaging or SLERP.

python main.py ./output --base-model org/base --merge org/math --weight 0.5 --density 0.5 \
    --merge org/code --weight 0.3 --density 0.5
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
from files import donor_files
from problems import collecting, refuse, some
from schedules import Schedule, layer_values, matches, parse_values, places

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from checkpoints import Checkpoint, Source
    from saving import Plan, Planned

    Combine = Callable[[list[Tensor], torch.device], Tensor]

DEFAULT_WEIGHT = 1.0  # for ties; linear and slerp ask for one
DEFAULT_DENSITY = 0.33
# Config values in which all models of a merge must agree, as they shape the tensors.
SIZES = (
    "hidden_size num_hidden_layers intermediate_size num_local_experts num_experts n_routed_experts"
).split()


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


def combine_linear(settings: Settings, numbers: Numbers, dtype: "torch.dtype") -> "Combine":
    from merge_methods import linear

    return lambda tensors, device: linear(
        tensors, numbers.weights, normalize=settings.normalize, dtype=dtype, device=device
    )


def combine_slerp(settings: Settings, numbers: Numbers, dtype: "torch.dtype") -> "Combine":
    from merge_methods import slerp

    return lambda tensors, device: slerp(
        tensors[0], tensors[1], numbers.weights[0], dtype=dtype, device=device
    )


def combine_ties(settings: Settings, numbers: Numbers, dtype: "torch.dtype") -> "Combine":
    from merge_methods import ties

    return lambda tensors, device: ties(
        tensors[0],
        tensors[1:],
        numbers.weights,
        numbers.densities,
        normalize=settings.normalize,
        naive_count=settings.naive_count,
        dtype=dtype,
        device=device,
    )


DESCRIPTIONS = {  # for model cards: the equation, and its source
    "ties": (
        "θ_base + Σ wₜδₜ / Σ wₜ of the changes δₜ = θₜ - θ_base, each trimmed to its largest, that "
        "have the elected sign, of Σ wₜδₜ",
        "[TIES-Merging](https://arxiv.org/abs/2306.01708)",
    ),
    "linear": ("Σ wₜθₜ / Σ wₜ", "[Model soups](https://arxiv.org/abs/2203.05482)"),
    "slerp": (
        "(sin((1 - t)φ) a + sin(tφ) b) / sin φ, φ being the angle between the tensors a and b",
        "[Shoemake 1985](https://doi.org/10.1145/325165.325242)",
    ),
}
METHODS = {"ties": combine_ties, "linear": combine_linear, "slerp": combine_slerp}


# ---------------------------------------------------------------------------- arguments


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
    return parse_values(text)


def build_parser() -> argparse.ArgumentParser:
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
        "--method", choices=METHODS, default="ties", help="how to merge (default: %(default)s)"
    )
    parser.add_argument(
        "--weight",
        metavar="W",
        type=numbers,
        action=InOrder,
        help="ties, linear: factor of a model, any number (ties default: "
        f"{DEFAULT_WEIGHT:g}); slerp: the t from 0 (base, or first model) to 1 (the other), and "
        "as NAME:W another for the tensors with NAME in their name",
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


# ---------------------------------------------------------------------------- plan


def plan_merge(
    donor: "Checkpoint",
    models: "Sequence[Checkpoint]",
    settings: Settings,
    *,
    dtype: "torch.dtype | None" = None,
    trust_remote_code: bool = False,
) -> "Planned":
    """Say how each tensor of the merged model is made from the tensors that the models store.

    Rows of embeddings and heads are matched by token. Raises Problems with every tensor that is
    missing, extra or of another shape.
    """
    import architecture as arch
    from checkpoints import FLOAT_DTYPES, Source, text_config
    from saving import Planned, Recipe, output_dtype

    cls = arch.model_class(donor.config, donor.path, trust_remote_code)
    skeleton, problems = arch.assemble(cls, donor.config, donor.tensors)
    refuse([f"{donor.name}: {problem}" for problem in problems])
    ties = arch.possible_ties(skeleton, donor.tensors)
    donor, *models = arch.aligned([donor, *models], skeleton.base_model_prefix, ties)
    ignored = arch.ignored_names((donor, *models), skeleton)
    tied = {model: arch.tied_names(model, ties) for model in (donor, *models)}
    untied = [
        target
        for target in ties
        if any(target in model.tensors for model in models)
        and not all(target in tied[model] for model in models)
    ]
    names = [n for n in donor.tensors if n not in ignored and (n not in ties or n in untied)]
    names += [name for name in untied if name not in donor.tensors]
    rows, notes = arch.vocabulary_rows(cls, skeleton, donor, models, trust_remote_code)

    def source(model: "Checkpoint", name: str) -> "Source":
        stored = ties[name] if name in tied[model] else name
        given = Source(donor, ties[name] if name in tied[donor] else name)
        return Source(model, stored, rows(model, stored, given))

    depth = int(getattr(text_config(donor.config), "num_hidden_layers", 0) or 0)
    beyond = int(getattr(text_config(donor.config), "num_nextn_predict_layers", 0) or 0)
    place = places(names, arch.before_layers(skeleton, names), depth, beyond)
    problems += unused_filters(settings, names)
    notes += layer_notes(settings, place)
    plan: Plan = {}
    for name in names:
        info = source(donor, name).info
        target = output_dtype(info.dtype, dtype)
        if info.dtype in FLOAT_DTYPES:
            sources = tuple(source(model, name) for model in models)
            numbers = Numbers([], [])
            with collecting(problems):
                numbers = settings.numbers(name, place[name])
            combine = METHODS[settings.method](settings, numbers, target)
            plan[name] = Recipe("merged", sources, info.shape, target, combine)
        else:
            plan[name] = Recipe("copied", (Source(donor, name),), info.shape, target)
    for model in dict.fromkeys(models):
        problems += compare(model, plan, ignored | ties.keys())
    refuse(problems)
    config = donor.config
    if ties and arch.says_tied(config) != (not untied):
        config = arch.changed_config(config, tie_word_embeddings=not untied)
    model, problems = arch.assemble(cls, config, plan)
    refuse(problems)
    return Planned(donor.name, plan, model, tuple(sorted(ignored)), tuple(notes))


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


def compare(model: "Checkpoint", plan: "Plan", optional: set[str]) -> list[str]:
    """Return how a model's stored tensors differ from what the plan takes of it."""
    from checkpoints import FLOAT_DTYPES

    problems = []
    taken = {s.name: (s, r) for r in plan.values() for s in r.sources if s.checkpoint is model}
    missing = taken.keys() - model.tensors.keys()
    extra = model.tensors.keys() - taken.keys() - plan.keys() - optional
    if missing:
        problems.append(f"{model.name}: misses {some(missing)}, which the donor has")
    if extra:
        problems.append(f"{model.name}: has {some(extra)}, which the donor does not have")
    shapes, integers = [], []
    for name in sorted(taken.keys() - missing):
        source, recipe = taken[name]
        if source.shape != recipe.shape:
            shapes.append(f"{name} {source.shape}, not {recipe.shape}")
        elif recipe.combine and source.info.dtype not in FLOAT_DTYPES:
            integers.append(f"{name} ({source.info.dtype})")
    if shapes:
        problems.append(f"{model.name}: not of the donor's shapes are {some(shapes)}")
    if integers:
        problems.append(f"{model.name}: not floating-point, as the donor's, are {some(integers)}")
    return problems


# ---------------------------------------------------------------------------- run


def work(argv: Sequence[str] | None) -> None:
    started = time.monotonic()
    arguments = build_parser().parse_args(cli.joined(argv))
    problems: list[str] = []
    settings = settings_from(arguments, problems)
    if not problems:
        cli.say(arguments.quiet and not arguments.dry_run, table(settings))
    models = cli.open_inputs(arguments, settings.models, SIZES, problems)
    donor = models[settings.models[0]]

    def plan() -> "Planned":
        return plan_merge(
            donor,
            [models[name] for name in settings.operands],
            settings,
            dtype=cli.chosen_dtype(arguments.dtype),
            trust_remote_code=arguments.trust_remote_code,
        )

    def card(title: str, planned: "Planned") -> str:
        from cards import Method, model_card

        resolved = "\n".join([table(settings), *planned.notes])
        method = Method(settings.method, *DESCRIPTIONS[settings.method])
        made_by = [cli.command("main.py", argv)]
        return model_card(title, models.values(), method, resolved, made_by)

    copied = donor_files(donor.path, donor.path if arguments.copy_tokenizer else None)
    cli.write(arguments, plan, card, copied, problems, started)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
