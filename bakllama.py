"""Build a model out of layers taken from several checkpoints, as a YAML file says.

python bakllama.py stack.yml ./output

    layer_slices:
      - {model: org/a, start: 0, end: 20}
      - {model: org/b, start: 10, end: 32, scale: 0.9}
    embedding_source: org/a     # optional; default: the first slice's model
    lm_head_source: org/b       # optional; default: the last slice's model

Where embedding and head are tied in both sources, they are tied in the output too, unless the file
names a lm_head_source of its own.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from merging.recipes.options import EXIT_STATUS, add_common_options, command
from merging.recipes.stack_files import read_stack
from merging.runs.console import leave, run
from merging.runs.merge import make


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Build a language model out of layers taken from several checkpoints. A model "
        "is a local directory or a Hugging Face Hub id (org/name, or org/name@revision).",
        epilog=EXIT_STATUS,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file that lists the slices of layers")
    parser.add_argument(
        "output", type=os.path.expanduser, help="directory to write the stacked model to"
    )
    add_common_options(parser)
    return parser


def work(argv: Sequence[str] | None) -> None:
    arguments = build_parser().parse_args(argv)
    path = Path(arguments.config)
    recipe = read_stack(path)
    made_by = {"sh": command("bakllama.py", argv), "yaml": recipe.text}
    make(recipe, arguments, made_by, [], [path])


def main(argv: Sequence[str] | None = None) -> int:
    return run(work, argv)


if __name__ == "__main__":
    leave(main())
