"""The options of main.py, from the methods' rows."""

import argparse
import os
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from merging.recipes.declarations import Method, Parameter, users
from merging.recipes.methods import METHODS
from merging.recipes.model_names import split_adapter
from merging.recipes.numbers import parse_values
from merging.recipes.options import EXIT_STATUS, add_common_options, whole_number
from merging.recipes.word_options import add_word_options

NUMBER_OPTIONS = sorted(
    {p.option for m in METHODS.values() for p in m.parameters if not p.is_switch and not p.choices}
)
DEFAULT_METHOD = "ties"
NUMBERS = (
    "Numbers of models are given once for all of them (before the first --merge, or after the "
    "last), or once for each --merge, in the same order. Each is a number, or a list such as "
    "0,0.5,1 that is interpolated from the first layer to the last. Before it may stand others for "
    "some tensors, as NAME:NUMBER or NAME:LIST, where NAME is a component of their names."
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


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser. Its help is that of one method, if the arguments name one."""
    shown = _methods_of(argv)
    parser = argparse.ArgumentParser(
        description=fill(
            "Merge language models that share an architecture. A model is a local directory or a "
            "Hugging Face Hub id (org/name, or org/name@revision)."
        ),
        epilog=_epilog(shown),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(given=[])
    parser.add_argument(
        "output", type=os.path.expanduser, help="directory to write the merged model to"
    )
    _add_what(parser, shown)
    _add_parameters(parser, shown)
    add_word_options(parser)
    add_common_options(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser, shown: Mapping[str, Method]) -> None:
    """Add the options that say what to merge, and by which of the methods."""
    parser.add_argument(
        "--merge",
        metavar="MODEL",
        type=model_name,
        action=_InOrder,
        help="a model to merge; repeat for each (at least one)",
    )
    bases: dict[str, list[str]] = {}
    for method in shown.values():
        bases.setdefault(method.base, []).append(method.name)
    parser.add_argument(
        "--base-model",
        metavar="MODEL",
        type=model_name,
        help="; ".join(f"{', '.join(names)}: {base}" for base, names in bases.items()),
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        metavar="METHOD",
        help=f"how to merge, see below (default: {DEFAULT_METHOD}); `--method NAME --help` shows "
        "what one takes",
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="a recipe of mergekit, or a model card with one, in place of all that says what to "
        "merge",
    )


def _methods_of(argv: Sequence[str]) -> Mapping[str, Method]:
    """Return the method that arguments name, or all if they name none."""
    named = [word.partition("=")[2] for word in argv if word.startswith("--method=")]
    named += [name for word, name in zip(argv, argv[1:], strict=False) if word == "--method"]
    known = [name for name in named if name in METHODS]
    return {known[-1]: METHODS[known[-1]]} if known else METHODS


def _epilog(shown: Mapping[str, Method]) -> str:
    if len(shown) == 1:
        (method,) = shown.values()
        lines = [fill(_plain(f"{method.name}: {method.equation} ({method.paper}, {method.link})"))]
    else:
        lines = ["methods:"]
        lines += [f"  {m.name:16} {_plain(m.when)}" for m in shown.values()]
    return "\n".join([*lines, "", fill(NUMBERS), "", fill(EXIT_STATUS)])


def _plain(text: str) -> str:
    return text.replace("`", "")


def _add_parameters(parser: argparse.ArgumentParser, shown: Mapping[str, Method]) -> None:
    """Add the parameters of all methods, grouped by who uses them; show those of some."""
    groups: dict[str, Any] = {}
    for option in dict.fromkeys(p.option for m in METHODS.values() for p in m.parameters):
        title = users(option, shown.values())
        if title.count(",") > 6:
            title = "most methods"
        if title and title not in groups:
            groups[title] = parser.add_argument_group(f"options of {title}")
        _add_parameter(groups.get(title, parser), option, shown)


def _add_parameter(group: Any, option: str, shown: Mapping[str, Method]) -> None:
    """Add an option that is a parameter of several methods, with what it means to each."""
    found: dict[str, list[str]] = {}
    known = [p for m in METHODS.values() for p in m.parameters if p.option == option]
    for method in shown.values():
        for parameter in method.parameters:
            if parameter.option == option:
                text = parameter.help + _default_text(parameter)
                found.setdefault(text, []).append(method.name)
    texts = [f"{', '.join(names)}: {text}" for text, names in found.items()]
    text = "; ".join(texts if len(found) > 1 else found)
    help = text.replace("%", "%%") or argparse.SUPPRESS
    if known[0].is_switch:
        group.add_argument(option, action=argparse.BooleanOptionalAction, help=help)
    elif known[0].choices:
        group.add_argument(option, choices=known[0].choices, help=help)
    elif known[0].is_seed:
        group.add_argument(option, metavar="N", type=whole_number, help=help)
    else:
        metavar = option[2].upper()
        group.add_argument(option, metavar=metavar, type=_numbers, action=_InOrder, help=help)


def _default_text(parameter: Parameter) -> str:
    if parameter.default is None:
        return ""
    if parameter.is_switch:
        return f" (default: {'yes' if parameter.default else 'no'})"
    default = parameter.default
    return f" (default: {default if isinstance(default, str) else f'{default:g}'})"


def model_name(text: str) -> str:
    try:
        if not text.strip():
            raise ValueError("expected the name of a model, got nothing")
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
