"""The options of main.py that say whose words an output has: tokenizer and chat template."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from merging.recipes.recipe import Recipe

WORD_OPTIONS = ("--tokenizer", "--pad-to-multiple-of", "--chat-template")
LARGEST_MULTIPLE = 1 << 16


def add_word_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokenizer and chat template")
    group.add_argument(
        "--tokenizer",
        metavar="{base,union,MODEL}",
        help="whose tokenizer, and so which rows of embeddings the output has: the base's (or else "
        "the first model's), that of MODEL, one of those that are merged, or the base's with all "
        "tokens that the others added to theirs (default: base)",
    )
    group.add_argument(
        "--pad-to-multiple-of",
        metavar="N",
        type=_multiple,
        help="round the number of rows of embeddings up to a multiple of N",
    )
    group.add_argument(
        "--chat-template",
        metavar="{auto,donor,MODEL,FILE}",
        help="whose chat template the output has; auto: the tokenizer's own, else the donor's, "
        "else that of the others, if those that have one agree (default: auto)",
    )
    group.add_argument(
        "--copy-tokenizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy the tokenizer of the base, or else of the first model (default: "
        "--copy-tokenizer)",
    )


def word_wishes(
    arguments: argparse.Namespace, models: Sequence[str], problems: list[str]
) -> dict[str, Any]:
    """Return what a recipe is told of them, and add what is wrong to the problems."""
    wish, template = arguments.tokenizer, arguments.chat_template or "auto"
    if wish not in (None, "base", "union", *models):
        problems.append(
            f"--tokenizer {wish}: expected base, union, or a model that is merged: "
            f"{', '.join(models)}"
        )
    if not arguments.copy_tokenizer:
        given = [
            ("--tokenizer", wish is not None),
            ("--chat-template", arguments.chat_template is not None),
        ]
        problems += [
            f"{option} asks for what --no-copy-tokenizer leaves out; give one of them"
            for option, is_given in given
            if is_given
        ]
        template = "donor"
    multiple = arguments.pad_to_multiple_of
    return {"tokenizer": wish, "pad_to_multiple_of": multiple, "chat_template": template}


def without_words(arguments: argparse.Namespace, recipe: Recipe, problems: list[str]) -> Recipe:
    """Return a recipe's file with what `--no-copy-tokenizer` makes of it."""
    if arguments.copy_tokenizer:
        return recipe
    for key, wished in (
        ("tokenizer", recipe.tokenizer is not None),
        ("chat_template", recipe.chat_template not in ("auto", "donor")),
    ):
        if wished:
            problems.append(f"--no-copy-tokenizer leaves out the {key} that the recipe asks for")
    return replace(recipe, chat_template="donor")


def _multiple(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST_MULTIPLE:
        raise argparse.ArgumentTypeError(f"expected 1 to {LARGEST_MULTIPLE}, got {value}")
    return value
