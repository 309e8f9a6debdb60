"""What both scripts have in common on the command line."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

VERSION = "0.1.0"
EXIT_STATUS = (
    "Exit status: 0 success, 2 an error that you can mend, 130 or 143 interrupted (Ctrl-C, SIGTERM)"
)
DTYPES = ("auto", "float32", "float16", "bfloat16")
MOST_THREADS = 4096
LARGEST_WHOLE_NUMBER = 2**63 - 1
SIZE = re.compile(r"\s*(\d+\.?\d*)\s*[KMGT]B\s*", re.IGNORECASE)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of both scripts")

    def flag(name: str, text: str, to: Any = group) -> None:
        to.add_argument(name, action="store_true", help=text)

    flag("--cuda", "compute on the GPU; models need not fit into it")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the output; auto keeps the dtype of each of the donor's tensors "
        "(default: auto, or a recipe's)",
    )
    group.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest size of one output file, such as 500MB (default: %(default)s)",
    )
    group.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where downloads from the Hub are kept (default: HF_HOME)",
    )
    flag("--trust-remote-code", "run Python code that comes with a model; only if you trust it")
    flag("--overwrite", "replace a model in the output directory, once the new one is whole")
    group.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="processors to compute on (default: all that this process may use)",
    )
    flag("--dry-run", "check everything and print the plan, but write nothing")
    _add_what_is_told(group)
    talk = group.add_mutually_exclusive_group()
    flag("--quiet", "print nothing but errors, and the output's path", talk)
    flag("--verbose", "print how each tensor is made, and all warnings", talk)
    group.add_argument("--version", action="version", version=f"%(prog)s {_versions()}")


def _add_what_is_told(group: Any) -> None:
    group.add_argument(
        "--model-card",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a README.md that says what the model was made of (default: --model-card)",
    )
    group.add_argument(
        "--report",
        metavar="FILE",
        action="append",
        default=[],
        help="write what the models have in common, and what the output has of each, as a page "
        "(FILE.html) or as numbers (FILE.json); may be given twice. With --dry-run it reads all "
        "tensors and writes nothing else",
    )


def join_negative(argv: Sequence[str] | None, options: Iterable[str]) -> list[str]:
    """Join options with values that start with a minus, which argparse would take for options."""
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if re.match(r"-[\d.]", word) and words and words[-1] in options:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def shard_size_problems(size: str) -> list[str]:
    match = SIZE.fullmatch(size)
    if match and 0 < float(match[1]) < 1e9:
        return []
    return [f"--max-shard-size: expected a size such as 500MB or 5GB, got {size!r}"]


def command(script: str, argv: Sequence[str] | None) -> str:
    """Return the command of this run."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


def _threads(text: str) -> int:
    value = int(text) if re.fullmatch(r"\s*\d{1,9}\s*", text) else 0
    if not 1 <= value <= MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {MOST_THREADS}, got {text!r}"
        )
    return value


def whole_number(text: str) -> int:
    """Parse a number of at least 0 that 63 bits hold."""
    value = int(text) if re.fullmatch(r"[0-9]{1,19}", text) else -1
    if not 0 <= value <= LARGEST_WHOLE_NUMBER:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {LARGEST_WHOLE_NUMBER}, got {text!r}"
        )
    return value


def _versions() -> str:
    """Return the version of this tool and of what it stands on."""
    found = []
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed: pip install -r requirements.txt")
    return f"{VERSION} ({', '.join(found)})"
