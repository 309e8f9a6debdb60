"""The command line of main.py: its options, from the methods' rows, and the recipe they make."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from merging.recipes.methods import METHODS, ORIGIN, Method, Parameter, users
from merging.recipes.model_names import split_adapter
from merging.recipes.numbers import Schedule, parse_values
from merging.recipes.options import EXIT_STATUS, add_common_options
from merging.recipes.recipe import Recipe, Slice, Source

Given = Sequence[tuple[str, Any]]  # (option, value) in the order of the command line
NUMBER_OPTIONS = sorted(
    {p.option for m in METHODS.values() for p in m.parameters if not p.is_switch}
)


class _InOrder(argparse.Action):
    """Collect (option, value) of several options in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.given = [*namespace.given, (self.option_strings[0], values)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Merge language models that share an architecture. A model is a local "
        "directory or a Hugging Face Hub id (org/name, or org/name@revision).",
        epilog="Numbers of models are given once for all of them (before the first --merge, or "
        "after the last), or once for each --merge, in the same order. Each is a number, or a list "
        "such as 0,0.5,1 that is interpolated from the first layer to the last. " + EXIT_STATUS,
        allow_abbrev=False,
    )
    parser.set_defaults(given=[])
    parser.add_argument(
        "output", type=os.path.expanduser, help="directory to write the merged model to"
    )
    parser.add_argument(
        "--merge",
        metavar="MODEL",
        type=_model_name,
        action=_InOrder,
        help="a model to merge; repeat for each (at least one)",
    )
    parser.add_argument(
        "--base-model",
        metavar="MODEL",
        type=_model_name,
        help="; ".join(f"{m.name}: {m.base}" for m in METHODS.values()),
    )
    parser.add_argument(
        "--method", choices=METHODS, default="ties", help="how to merge (default: %(default)s)"
    )
    for option in dict.fromkeys(p.option for m in METHODS.values() for p in m.parameters):
        _add_parameter(parser, option)
    parser.add_argument(
        "--copy-tokenizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy the tokenizer of the base, or else of the first model (default: "
        "--copy-tokenizer)",
    )
    add_common_options(parser)
    return parser


def _add_parameter(parser: argparse.ArgumentParser, option: str) -> None:
    """Add an option that is a parameter of several methods, with what it means to each."""
    found: dict[str, list[str]] = {}
    for method in METHODS.values():
        for parameter in method.parameters:
            if parameter.option == option:
                text = parameter.help + _default_text(parameter)
                found.setdefault(text, []).append(method.name)
                switch = parameter.is_switch
    text = "; ".join(f"{', '.join(methods)}: {text}" for text, methods in found.items())
    if switch:
        parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
    else:
        metavar = option[2].upper()
        parser.add_argument(option, metavar=metavar, type=_numbers, action=_InOrder, help=text)


def _default_text(parameter: Parameter) -> str:
    if parameter.default is None:
        return ""
    if parameter.is_switch:
        return f" (default: {'yes' if parameter.default else 'no'})"
    return f" (default: {parameter.default:g})"


def _model_name(text: str) -> str:
    if not text.strip():
        raise ValueError
    try:
        split_adapter(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _numbers(text: str) -> tuple[str | None, tuple[float, ...]]:
    """Parse an option's number, list of numbers, or either with a filter."""
    try:
        return parse_values(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number, or a list such as 0,0.5,1, got {text!r}"
        ) from error


def recipe_from(arguments: argparse.Namespace, problems: list[str]) -> Recipe:
    """Return the recipe that options ask for, and add what is wrong with them to the problems.

    Options that the method does not use are refused.
    """
    method, given = METHODS[arguments.method], arguments.given
    merges = [value for option, value in given if option == "--merge"]
    values: dict[str, Any] = {}
    of_models: dict[str, list[Schedule]] = {}
    for parameter in method.parameters:
        if parameter.is_switch:
            asked = getattr(arguments, parameter.name)
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
    recipe = Recipe(method, (Slice(sources),), arguments.base_model, values)
    problems += _unused(arguments, method)
    problems += _model_problems(recipe, merges)
    problems += _value_problems(recipe)
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
    problem = _pairing_problem(given, option) if parameter.per_model or len(pairs) == 1 else None
    words = [word for word, _ in pairs if word]
    bare = [values for word, values in pairs if word is None]
    if words and not parameter.filters:
        problem = (
            f"{option} {', '.join(sorted(set(words)))}: filters by name are for "
            f"{_with_filters()}; expected a number or a list"
        )
    elif not parameter.per_model and len(bare) != 1:
        problem = (
            f"{method.name} takes one {option}, {parameter.name}, besides any with a filter "
            f"(NAME:{option[2].upper()}); got {len(bare)}"
        )
    elif twice := {word for word in words if words.count(word) > 1}:
        named = ", ".join(sorted(twice))
        problem = f"{option} {named}: given twice; the first would hide the second"
    if problem is not None:
        problems.append(problem)
        return []
    if parameter.per_model:
        return [Schedule(values) for _, values in pairs]
    return [Schedule(bare[0], tuple((w, v) for w, v in pairs if w))]


def _with_filters() -> str:
    return ", ".join(m.name for m in METHODS.values() if any(p.filters for p in m.parameters))


def _pairing_problem(given: Given, option: str) -> str | None:
    """Say why an option's values cannot be paired with the models; None if they can.

    One value serves all models, if it does not stand between two of them; else each has its own.
    """
    places = [i for i, (name, _) in enumerate(given) if name == option]
    merges = [i for i, (name, _) in enumerate(given) if name == "--merge"]
    if len(places) not in (1, len(merges)):
        return (
            f"{option} was given {len(places)} times for {len(merges)} --merge; give it once for "
            "all, or once for each"
        )
    if len(places) == 1 and len(merges) > 1 and merges[0] < places[0] < merges[-1]:
        word, values = given[places[0]][1]
        return (
            f"{option} {Schedule(values) if word is None else word} stands between two of "
            f"{len(merges)} --merge: for one model or for all; give {option} for each --merge, or "
            "once after the last"
        )
    return None


def _unused(arguments: argparse.Namespace, method: Method) -> list[str]:
    """Return the options that are given and that the method does not use."""
    used = {parameter.option for parameter in method.parameters}
    given = {option for option, _ in arguments.given if option != "--merge"}
    switches = {p.option: p for m in METHODS.values() for p in m.parameters if p.is_switch}
    for option, parameter in switches.items():
        asked = getattr(arguments, parameter.name)
        if asked is not None and option not in used:
            given.add(option if asked else f"--no-{option[2:]}")
    return [
        f"{option} is for {users(option.replace('--no-', '--'))}, not for {method.name}"
        for option in sorted(given - used)
    ]


def _model_problems(recipe: Recipe, merges: Sequence[str]) -> list[str]:
    method = recipe.method
    if not merges:
        return ["no model to merge; name at least one with --merge"]
    if method.base == ORIGIN and recipe.base is None:
        return [f"--method {method.name} needs --base-model, {method.base.split(' (')[0]}"]
    count = len(recipe.operands(recipe.slices[0])) - recipe.takes_base
    fewest, most = method.models
    if most is not None and fewest == most != count:
        return [
            f"{method.name} merges exactly {'two' if most == 2 else most} models, --base-model and "
            f"one --merge or two --merge; got {count}"
        ]
    if count < fewest:
        return [f"{method.name} merges at least {fewest} models; got {count}"]
    return []


def _value_problems(recipe: Recipe) -> list[str]:
    """Return which numbers are out of range, or cannot be normalised whatever the tensor is."""
    problems = []
    schedules = recipe.schedules()
    for parameter, _, schedule in schedules:
        what = "a number" if parameter.name == parameter.option[2:] else parameter.name
        problems += [
            f"{parameter.option}: expected {what} in {parameter.range}, got {value:g}"
            for value in sorted(schedule.every_value())
            if not parameter.allows(value)
        ]
        problems += [
            f"{parameter.option}: {value:g} is too small to compute with"
            for value in sorted(schedule.every_value())
            if 0 < abs(value) < sys.float_info.min
        ]
        negative = parameter.name == "weight" and min(schedule.every_value()) < 0
        if negative and recipe.method.positive and recipe.values["normalize"]:
            problems.append(f"negative weights with {recipe.method.name} need --no-normalize")
    complete = len(schedules) == sum(
        len(recipe.slices[0].sources) if p.per_model else 1
        for p in recipe.method.parameters
        if not p.is_switch
    )
    if complete and recipe.slices[0].sources and not any(s.varies for _, _, s in schedules):
        refusal = recipe.refusal(recipe.arguments(recipe.slices[0], "", 0))
        problems += [refusal] if refusal else []
    return problems
