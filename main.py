"""Merge checkpoints of one architecture into one, by TIES, linear averaging or SLERP.

python main.py ./output --base-model org/base --merge org/math --weight 0.5 --density 0.5 \
    --merge org/code --weight 0.3 --density 0.5
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cli
from files import donor_files
from problems import collecting, refuse, some

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
    weights: tuple[float, ...]
    densities: tuple[float, ...] | None
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


def combine_linear(settings: Settings, dtype: "torch.dtype") -> "Combine":
    from merge_methods import linear

    return lambda tensors, device: linear(
        tensors, settings.weights, normalize=settings.normalize, dtype=dtype, device=device
    )


def combine_slerp(settings: Settings, dtype: "torch.dtype") -> "Combine":
    from merge_methods import slerp

    return lambda tensors, device: slerp(
        tensors[0], tensors[1], settings.weights[0], dtype=dtype, device=device
    )


def combine_ties(settings: Settings, dtype: "torch.dtype") -> "Combine":
    from merge_methods import ties

    assert settings.densities is not None
    densities = settings.densities
    return lambda tensors, device: ties(
        tensors[0],
        tensors[1:],
        settings.weights,
        densities,
        normalize=settings.normalize,
        naive_count=settings.naive_count,
        dtype=dtype,
        device=device,
    )


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


def number(text: str) -> float:
    """Parse an option's finite number."""
    value = float(text)
    if not -float("inf") < value < float("inf"):
        raise ValueError
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Merge language models that share an architecture. A model is a local "
        "directory or a Hugging Face Hub id (org/name, or org/name@revision).",
        epilog="--weight and --density are given once for all models (before the first --merge, or "
        "after the last), or once for each --merge, in the same order.",
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
        type=number,
        action=InOrder,
        help="ties, linear: factor of a model, any number (ties default: "
        f"{DEFAULT_WEIGHT:g}); slerp: the one t from 0 (base, or first model) to 1 (the other)",
    )
    parser.add_argument(
        "--density",
        metavar="D",
        type=number,
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
            f"--{option} {values[0]:g} stands between two of {models} --merge options, so it is "
            f"unclear whether it is for one model or for all; give --{option} for each --merge, or "
            "once after the last"
        )
    return (values[0],) * models


def settings_from(arguments: argparse.Namespace, problems: list[str]) -> Settings:
    """Check the merge options against each other and the method, and add what is wrong.

    Options that the method does not use are refused.
    """
    method, base, given = arguments.method, arguments.base_model, arguments.given
    merges = tuple(value for name, value in given if name == "merge")
    weights, densities = None, None
    with collecting(problems):
        weights = paired(given, "weight")
    with collecting(problems):
        densities = paired(given, "density")
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
            for density in densities or ()
            if not 0 < density <= 1
        ]
        if normalize and any(weight < 0 for weight in weights or ()):
            problems.append("negative weights with ties need --no-normalize")
    elif weights and normalize:
        from merge_methods import check_normalizable

        try:
            check_normalizable(weights)
        except ValueError as error:
            problems.append(f"{error}; use --no-normalize or other weights")
    count = len(merges)
    return Settings(
        method=method,
        base=base,
        merges=merges,
        weights=weights or (DEFAULT_WEIGHT,) * count,
        densities=(densities or (DEFAULT_DENSITY,) * count) if method == "ties" else None,
        normalize=normalize and method != "slerp",
        naive_count=arguments.naive_count,
    )


def _slerp_problems(
    arguments: argparse.Namespace, merges: Sequence[str], weights: Sequence[float] | None
) -> list[str]:
    problems = []
    models = len(merges) + (arguments.base_model is not None)
    if models != 2:
        problems.append(
            f"slerp merges exactly two models, --base-model and one --merge or two --merge; "
            f"got {models}"
        )
    if len([name for name, _ in arguments.given if name == "weight"]) > 1:
        problems.append("slerp takes one --weight, the t between its two models")
    problems += [
        f"--weight: slerp needs t in [0, 1], got {t:g}"
        for t in sorted(set(weights or ()))
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
        rows += list(zip(settings.operands, (f"{1 - t:g}", f"{t:g}"), ("", ""), strict=True))
    else:
        if settings.base is not None:
            role = "base" if settings.method == "ties" else "donor only"
            rows.append((settings.base, role, ""))
        densities = settings.densities or ("",) * len(settings.merges)
        rows += [
            (model, f"{weight:g}", str(density))
            for model, weight, density in zip(
                settings.merges, settings.weights, densities, strict=True
            )
        ]
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{model:<{width}}  {weight:<10}  {density}".rstrip() for model, weight, density in rows
    ]
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
    combine: "Callable[[torch.dtype], Combine]",
    *,
    dtype: "torch.dtype | None" = None,
    trust_remote_code: bool = False,
) -> "Planned":
    """Say how each tensor of the merged model is made from the tensors that the models store.

    Rows of embeddings and heads are matched by token. Raises Problems with every tensor that is
    missing, extra or of another shape.
    """
    import architecture as arch
    from checkpoints import FLOAT_DTYPES, Source
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

    plan: Plan = {}
    for name in names:
        info = source(donor, name).info
        target = output_dtype(info.dtype, dtype)
        if info.dtype in FLOAT_DTYPES:
            sources = tuple(source(model, name) for model in models)
            plan[name] = Recipe("merged", sources, info.shape, target, combine(target))
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
    arguments = build_parser().parse_args(argv)
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
            lambda target: METHODS[settings.method](settings, target),
            dtype=cli.chosen_dtype(arguments.dtype),
            trust_remote_code=arguments.trust_remote_code,
        )

    copied = donor_files(donor.path, donor.path if arguments.copy_tokenizer else None)
    cli.write(arguments, plan, copied, problems, started)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
