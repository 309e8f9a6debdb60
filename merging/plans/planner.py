"""Plan a model: say of every output tensor what it is made of, or all that is in the way."""

from collections.abc import Mapping, Sequence, Set

from transformers import PretrainedConfig, PreTrainedModel

from merging.models.checkpoints import Checkpoint, changed_config, meaning_warnings, says_tied
from merging.models.structure import Structure, assemble
from merging.models.vocabulary_sizes import with_values
from merging.models.words import Words, settle_words
from merging.plans.layouts import Layout, chosen_layers, stacked_layers, whole_models
from merging.plans.plan import Plan, PlannedTensor, planned
from merging.plans.same_layers import (
    compare_layers,
    forward_notes,
    mixed_kinds,
    odd_parts,
    running_problems,
)
from merging.plans.stacked_config import stacked_config
from merging.problems import refuse, some
from merging.recipes.numbers import values_by_place
from merging.recipes.recipe import Recipe


def plan_model(
    recipe: Recipe, models: Mapping[str, Checkpoint], trust_remote_code: bool = False
) -> Plan:
    """Say how each tensor of a model is made of the tensors that the named models store.

    Rows of embeddings and heads are matched by token. Raises Problems with all that does not fit:
    tensors that are missing, extra or of another shape, layers that a model does not have.
    """
    donor = models[recipe.models[0]]
    structure = Structure(donor, trust_remote_code)
    models = {name: structure.renamed(model) for name, model in models.items()}
    lay_out = stacked_layers if recipe.is_stack else whole_models
    layout = lay_out(recipe, models, structure)
    speakers = list(layout.vocabularies)
    if recipe.tokenizer is not None or recipe.chat_template not in ("auto", "donor"):
        speakers = [speakers[0], *models.values()]  # of a stack, those in its middle too
    words = settle_words(structure, speakers, recipe, trust_remote_code)
    notes = list(words.notes)
    tensors, problems = _plan_tensors(recipe, layout, words)
    hidden, unused = _unused_filters(recipe, layout)
    problems += hidden
    refuse(problems + _misfits(layout, tensors, structure, whole=not recipe.is_stack))
    config, followed = _config(recipe, models, structure, layout)
    config = with_values(config, words.values) if words.values else config
    makers = ", ".join(models) if recipe.is_stack else donor.name
    model, problems = structure.assembled(makers, config, tensors)
    if recipe.is_stack:
        notes += _prove_stack(recipe, models, structure, layout, model, tensors, problems)
    refuse(problems)
    warnings = meaning_warnings({n: m.config for n, m in models.items()}, donor.name, followed)
    of_models = [note for checkpoint in models.values() for note in checkpoint.notes]
    notes = [*warnings, *of_models, *notes, *unused, *_gradients(recipe, layout)]
    trims_models = recipe.values.get("trim_scope") == "model"
    if trims_models:
        notes.append("note: changes are trimmed over whole models, so all inputs are read thrice")
    if words.end_ids and model.can_generate():
        model.generation_config.eos_token_id = words.end_ids
    ignored = tuple(sorted(layout.ignored))
    return Plan(donor.name, tensors, model, words, ignored, tuple(notes), trims_models)


def _plan_tensors(
    recipe: Recipe, layout: Layout, words: Words
) -> tuple[dict[str, PlannedTensor], list[str]]:
    """Return how each tensor is made, and which numbers are missing or cannot be taken."""
    tensors: dict[str, PlannedTensor] = {}
    refusals: list[str] = []
    missing: dict[str, list[str]] = {}
    for name, role in layout.roles.items():
        if any(stored not in model.tensors for model, stored in role.operands):
            continue
        arguments = recipe.arguments(role.part, name, role.place, role.names)
        lacking = recipe.missing(role.part, arguments)
        weights = None if lacking else arguments.get("weights")
        given, sources, own = words.match(role.given, role.operands, weights)
        owners = tuple(model.name for model, _ in role.operands)
        tensors[name] = planned(recipe, sources, given, arguments, own, owners)
        if lacking:
            missing.setdefault(lacking[0], []).append(name)
        elif refusal := recipe.refusal(arguments):
            refusals.append(refusal)
    problems = [
        f"no {what} for {some(names)}: no filter matches; add a value without one"
        for what, names in missing.items()
    ]
    if refusals:
        problems.append(f"in {len(refusals)} of {len(layout.roles)} tensors, {refusals[0]}")
    return tensors, problems


def _misfits(
    layout: Layout, tensors: Mapping[str, PlannedTensor], structure: Structure, whole: bool
) -> list[str]:
    """Return how the tensors of each model differ from what the output takes of it."""
    problems = []
    taking_part = dict.fromkeys(m for role in layout.roles.values() for m, _ in role.operands)
    for model in taking_part:
        missing, shapes, integers, taken = [], [], [], set()
        for name, role in layout.roles.items():
            for i, (operand, stored) in enumerate(role.operands):
                if operand is not model:
                    continue
                taken.add(stored)
                if stored not in model.tensors:
                    missing.append(stored)
                elif name in tensors:
                    source, planned = tensors[name].sources[i], tensors[name]
                    if source.shape != planned.shape:
                        shapes.append(f"{stored} {source.shape}, not {planned.shape}")
                    elif planned.method is not None and not source.is_floating:
                        integers.append(f"{stored} ({source.dtype})")
        extra = model.tensors.keys() - taken - layout.ignored - structure.ties.keys()
        extra -= layout.roles.keys()  # such as integers, of which only the donor's are taken
        wanted = structure.parameters_of(missing)
        found = structure.parameters_of(extra if missing else ())  # of stacks, which take few, many
        if alike := set(found.values()) & set(wanted.values()):
            problems.append(
                f"{model.name}: stores {some(alike)} in other tensors than the donor (experts one "
                "by one or together, say); to have them in one form, load all models with "
                "transformers and call save_pretrained(folder, save_original_format=False)"
            )
            extra = {name for name in extra if found[name] not in alike}
            missing = [name for name in missing if wanted[name] not in alike]
        if missing:
            problems.append(f"{model.name}: misses {some(missing)}, which the output needs")
        if extra and whole:
            problems.append(f"{model.name}: has {some(extra)}, which the donor does not have")
        if shapes:
            problems.append(f"{model.name}: not of the donor's shapes are {some(set(shapes))}")
        if integers:
            named = some(set(integers))
            problems.append(f"{model.name}: not floating-point, as the donor's, are {named}")
    return problems


def _config(
    recipe: Recipe, models: Mapping[str, Checkpoint], structure: Structure, layout: Layout
) -> tuple[PretrainedConfig, Set[str]]:
    """Return the output's config, and the keys of it that are not just the donor's.

    Of a merge it is the donor's, which says whether the output is tied.
    """
    of_donor = says_tied(structure.config)
    tied = not layout.untied if structure.ties else of_donor
    if recipe.is_stack:
        return stacked_config(recipe, models, layout, tied)
    if of_donor != tied:
        return changed_config(structure.config, tie_word_embeddings=tied), set()
    return structure.config, set()


def _prove_stack(
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    structure: Structure,
    layout: Layout,
    output: PreTrainedModel,
    tensors: Mapping[str, PlannedTensor],
    misfits: Sequence[str],
) -> list[str]:
    """Compare a stack's layers with those of their models, and try to run it; return notes."""
    donor = recipe.models[0]
    chosen = [layer.made_of for layer in chosen_layers(recipe)]
    followed = [layer.follows for layer in chosen_layers(recipe)]
    if misfits:
        refuse([*odd_parts(structure, output, tensors, layout.path, followed)] or misfits)
    skeletons = {donor: structure.model}
    for name in dict(pair for layer in chosen for pair in layer):
        if name != donor:
            skeletons[name], _ = assemble(
                name, structure.cls, models[name].config, models[name].tensors
            )
    problems, notes = compare_layers(output, skeletons, followed, donor, layout.path)
    notes += mixed_kinds(skeletons, chosen, followed, layout.path)
    cannot, untried = running_problems(output, structure.trial.ways)
    refuse(problems + cannot)
    return [*notes, *forward_notes(structure.config.to_dict()), *untried]


def _unused_filters(recipe: Recipe, layout: Layout) -> tuple[list[str], list[str]]:
    """Return filters that match no tensor, or none that an earlier one leaves: problems, or notes.

    Published recipes have such filters, for models that name their tensors otherwise.
    """
    used: dict[tuple[str, str, bool], bool] = {}
    for part in recipe.slices:
        own = {name: role for name, role in layout.roles.items() if role.part is part}
        for parameter, _, schedule in recipe.schedules(part):
            rest = [n for role_name, role in own.items() for n in (role.names or [role_name])]
            for word, _ in schedule.filters:
                matched = {name for name in rest if schedule.matches(word, name)}
                rest = [name for name in rest if name not in matched]
                what = parameter.name if schedule.anywhere else parameter.option
                key = (what, word, schedule.anywhere)
                used[key] = used.get(key, False) or bool(matched)
    components = {part for name in layout.roles for part in name.split(".") if not part.isdigit()}
    known = some(components - {"weight", "bias"}, 20)
    unused = {
        f"{what} {word}: matches no tensor that is left to it; names have {known}": anywhere
        for (what, word, anywhere), matched in used.items()
        if not matched
    }
    problems = [text for text, anywhere in unused.items() if not anywhere]
    return problems, [f"note: filter of {text}" for text, anywhere in unused.items() if anywhere]


def _gradients(recipe: Recipe, layout: Layout) -> list[str]:
    """Return lines with the numbers at each place, from the first layer to the last."""
    found = []
    for number, part in enumerate(recipe.slices):
        places = {name: role.place for name, role in layout.roles.items() if role.part is part}
        of_slice = f"slice {number}, " if len(recipe.slices) > 1 else ""
        found += [
            f"{of_slice}{parameter.name}{'' if model is None else f' of {model}'}, {line}"
            for parameter, model, schedule in recipe.schedules(part)
            if schedule.varies
            for line in values_by_place(schedule, places)
        ]
    return found
