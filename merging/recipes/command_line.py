"""The recipe that the command line of main.py asks for, and what is wrong with it."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from merging.problems import collecting, refuse
from merging.recipes.declarations import OPERAND, ORIGIN, Method, Parameter, users
from merging.recipes.merge_options import DEFAULT_METHOD
from merging.recipes.methods import METHODS
from merging.recipes.numbers import Schedule, is_too_small
from merging.recipes.recipe import Recipe, Slice, Source, Value
from merging.recipes.recipe_files import read_recipe
from merging.recipes.word_options import WORD_OPTIONS, without_words, word_wishes

Given = Sequence[tuple[str, Any]]  # (option, value) in the order of the command line

# The parameters that are no numbers, by the options of all methods.
SETTINGS = {p.option: p for m in METHODS.values() for p in m.parameters if not p.is_number}


def recipe_from(arguments: argparse.Namespace, problems: list[str]) -> Recipe:
    """Return the recipe that options ask for, and add what is wrong with them to the problems.

    Options that the method does not use are refused, and all of them beside a recipe's file, whose
    Problems are raised.
    """
    if arguments.recipe is not None:
        with_file = [f"{option} beside --recipe: the file says it" for option in _given(arguments)]
        with collecting(with_file):
            recipe = without_words(arguments, read_recipe(Path(arguments.recipe)), with_file)
        refuse(with_file)
        return recipe
    method, given = METHODS[arguments.method or DEFAULT_METHOD], arguments.given
    merges = [value for option, value in given if option == "--merge"]
    values: dict[str, Value] = {}
    of_models: dict[str, list[Schedule]] = {}
    for parameter in method.parameters:
        if not parameter.is_number:
            asked = _asked(arguments, parameter.option)
            values[parameter.name] = parameter.default if asked is None else asked
            continue
        found = _read(parameter, given, method, problems)
        if parameter.per_model:
            of_models[parameter.name] = (found * len(merges))[: len(merges)]
        elif found:
            values[parameter.name] = found[0]
    sources = tuple(
        Source(model, {name: schedules[i] for name, schedules in of_models.items() if schedules})
        for i, model in enumerate(merges)
    )
    models = list(dict.fromkeys(filter(None, [arguments.base_model, *merges])))
    words = word_wishes(arguments, models, problems)
    recipe = Recipe(method, (Slice(sources),), arguments.base_model, values, **words)
    problems += [*_unused(arguments, method), *_model_problems(recipe, merges)]
    problems += value_problems(recipe)
    return recipe


def _read(
    parameter: Parameter, given: Given, method: Method, problems: list[str]
) -> list[Schedule]:
    """Return one schedule for all, or one for each --merge; none if there is a problem."""
    option = parameter.option
    pairs = [value for name, value in given if name == option]
    if not pairs:
        if parameter.default is not None:
            return [Schedule((float(parameter.default),))]
        problems.append(f"--method {method.name} needs {option}")
        return []
    bare = [i for i, (word, _) in enumerate(pairs) if word is None]
    # Filters stand before the number that they go with; beside a single one, they may stand behind.
    ends = [len(pairs)] if len(bare) == 1 else [i + 1 for i in bare]
    groups = [pairs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    problem = _pairing_problem(parameter, given, len(groups))
    words = [[word for word, _ in group if word] for group in groups]
    twice = {word for group in words for word in group if group.count(word) > 1}
    if not parameter.per_model and len(bare) != 1:
        problem = (
            f"{method.name} takes one {option}, {parameter.name}, besides any with a filter "
            f"(NAME:{option[2].upper()}); got {len(bare)}"
        )
    elif not bare or ends[-1] < len(pairs):
        filters = ", ".join(str(word) for word, _ in pairs[ends[-1] if ends else 0 :])
        problem = f"{option} {filters}: a filter stands before the number for all other tensors"
    elif twice:
        problem = f"{option} {', '.join(sorted(twice))}: given twice; the first hides the second"
    if problem is not None:
        problems.append(problem)
        return []
    return [
        Schedule(
            next(values for word, values in group if word is None),
            tuple((word, values) for word, values in group if word is not None),
        )
        for group in groups
    ]


def _pairing_problem(parameter: Parameter, given: Given, numbers: int) -> str | None:
    """Say why an option's numbers cannot be paired with the models; None if they can.

    One number serves all models, if it does not stand between two of them; else each has its own.
    """
    option = parameter.option
    places = [i for i, (name, _) in enumerate(given) if name == option]
    merges = [i for i, (name, _) in enumerate(given) if name == "--merge"]
    if parameter.per_model and numbers not in (1, len(merges)):
        return (
            f"{option} was given {numbers} times for {len(merges)} --merge; give it once for "
            "all, or once for each"
        )
    between = [i for i in places if len(merges) > 1 and merges[0] < i < merges[-1]]
    if numbers == 1 and between:
        word, values = given[between[0]][1]
        return (
            f"{option} {Schedule(values) if word is None else word} stands between two of "
            f"{len(merges)} --merge: for one model or for all; give {option} for each --merge, or "
            "once after the last"
        )
    return None


def _asked(arguments: argparse.Namespace, option: str) -> Any:
    """Return the value of an option that may be given once; None if it is not."""
    return getattr(arguments, option[2:].replace("-", "_"))


def _given(arguments: argparse.Namespace) -> list[str]:
    """Return the options that are given of those that say what to merge."""
    once = ("--method", "--base-model", *WORD_OPTIONS, *SETTINGS)
    given = {option for option, _ in arguments.given}
    return sorted(given.union(o for o in once if _asked(arguments, o) is not None))


def _unused(arguments: argparse.Namespace, method: Method) -> list[str]:
    """Return the options that are given and that the method does not use."""
    used = {parameter.option for parameter in method.parameters}
    given = {option for option, _ in arguments.given if option != "--merge"}
    for option, parameter in SETTINGS.items():
        asked = _asked(arguments, option)
        if asked is not None and option not in used:
            given.add(f"--no-{option[2:]}" if parameter.is_switch and not asked else option)
    needing_base = [p.option for p in method.parameters if p.with_base and p.option in given]
    return [
        f"{option} is for {users(option.replace('--no-', '--'), METHODS.values())}, not for "
        f"{method.name}"
        for option in sorted(given - used)
    ] + [
        f"{option} scales the change to a base: with {method.name} it needs --base-model"
        for option in needing_base
        if arguments.base_model is None
    ]


def _model_problems(recipe: Recipe, merges: Sequence[str]) -> Iterator[str]:
    method = recipe.method
    if not merges:
        yield "no model to merge; name at least one with --merge"
    if method.base == ORIGIN and recipe.base is None:
        yield f"--method {method.name} needs --base-model, {method.base.split(' (')[0]}"
    if not merges:
        return
    count = len(recipe.operands(recipe.slices[0])) - recipe.takes_base
    fewest, most = method.models
    besides = " besides the base" if recipe.takes_base else ""
    if count < fewest and most is None:
        yield f"{method.name} merges at least {fewest} models{besides}; got {count}"
    elif most is not None and not fewest <= count <= most:
        number = {1: "one model", 2: "two models"}[most]
        how = ", --base-model and one --merge or two --merge" if method.base == OPERAND else besides
        yield f"{method.name} merges exactly {number}{how}; got {count}"


def value_problems(recipe: Recipe) -> list[str]:
    """Return which numbers are out of range, or do not go together whatever the tensor is."""
    problems = []
    for parameter, _, schedule in recipe.schedules():
        what = "a number" if parameter.name == parameter.option[2:] else parameter.name
        problems += [
            f"{parameter.option}: expected {what} in {parameter.range}, got {value:g}"
            for value in sorted(schedule.every_value())
            if not parameter.allows(value)
        ]
        problems += [
            f"{parameter.option}: {value:g} is too small to compute with"
            for value in sorted(schedule.every_value())
            if is_too_small(value)
        ]
    problems += [
        f"{parameter.option}: expected a number in {parameter.range}, got {parameter.low:g} for "
        f"all of {model}"
        for parameter, model in recipe.nothing_of()
    ]
    problems += [
        f"{parameter.option} {recipe.values[parameter.name]} needs one {parameter.same_for_all} "
        "for the whole of a model, no list and no filters"
        for parameter in recipe.in_need_of_one_number()
    ]
    if not problems and recipe.is_complete:
        problems += recipe.refusals(recipe.slices[0])
    return problems
