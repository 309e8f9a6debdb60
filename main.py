"""Merge checkpoints of one architecture into one, by any of nineteen methods.

python main.py ./output --base-model org/base --merge org/math --weight 0.5 --density 0.5 \
    --merge org/code --weight 0.3 --density 0.5
"""

from collections.abc import Sequence
from pathlib import Path

from merging.recipes.command_line import recipe_from
from merging.recipes.merge_options import NUMBER_OPTIONS, build_parser
from merging.recipes.options import command, join_negative
from merging.runs.console import leave, run
from merging.runs.merge import make


def work(argv: Sequence[str] | None) -> None:
    words = join_negative(argv, NUMBER_OPTIONS)
    arguments = build_parser(words).parse_args(words)
    problems: list[str] = []
    recipe = recipe_from(arguments, problems)
    files = [] if arguments.recipe is None else [Path(arguments.recipe)]
    made_by = {"sh": command("main.py", argv)}
    make(recipe, arguments, made_by, problems, files, by_itself=argv is None)


def main(argv: Sequence[str] | None = None) -> int:
    return run(work, argv)


if __name__ == "__main__":
    leave(main())
