"""Merge checkpoints of one architecture into one, by TIES, linear averaging or SLERP.

python main.py ./output --base-model org/base --merge org/math --weight 0.5 --density 0.5 \
    --merge org/code --weight 0.3 --density 0.5
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import cli
from files import donor_files
from problems import collecting, refuse, some
from schedules import places
from settings import (
    Numbers,
    Settings,
    build_parser,
    description,
    layer_notes,
    settings_from,
    table,
    unused_filters,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from checkpoints import Checkpoint, Source
    from saving import Plan, Planned

    Combine = Callable[[list[Tensor], torch.device], Tensor]

# Config values in which all models of a merge must agree, as they shape the tensors.
SIZES = (
    "hidden_size num_hidden_layers intermediate_size num_local_experts num_experts n_routed_experts"
).split()


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


METHODS = {"ties": combine_ties, "linear": combine_linear, "slerp": combine_slerp}


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
    cancelled: list[str] = []
    for name in names:
        info = source(donor, name).info
        target = output_dtype(info.dtype, dtype)
        if info.dtype in FLOAT_DTYPES:
            sources = tuple(source(model, name) for model in models)
            numbers = Numbers([], [])
            with collecting(cancelled):
                numbers = settings.numbers(name, place[name])
            combine = METHODS[settings.method](settings, numbers, target)
            plan[name] = Recipe("merged", sources, info.shape, target, combine)
        else:
            plan[name] = Recipe("copied", (Source(donor, name),), info.shape, target)
    if cancelled:
        problems.append(f"in {len(cancelled)} of {len(names)} tensors, {cancelled[0]}")
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
    arguments = build_parser(METHODS).parse_args(cli.joined(argv))
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
        method = Method(settings.method, *description(settings))
        made_by = {"sh": cli.command("main.py", argv)}
        return model_card(title, models.values(), method, resolved, made_by)

    copied = donor_files(donor.path, donor.path if arguments.copy_tokenizer else None)
    cli.write(arguments, plan, card, copied, problems, started)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
