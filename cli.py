"""What both scripts have in common on the command line: options, errors and the last line."""

import argparse
import gc
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import files
from problems import Problems, collecting, explain, refuse, some
from staging import STOP_SIGNALS

if TYPE_CHECKING:  # torch and transformers take seconds to load; --help does not wait for them
    import torch

    from checkpoints import Checkpoint
    from saving import Planned

VERSION = "0.1.0"
LIBRARIES = 600_000_000  # bytes of memory that torch and transformers take, generously
EXIT_STATUS = (
    "Exit status: 0 success, 2 an error that you can mend, 130 or 143 interrupted (Ctrl-C, SIGTERM)"
)
DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of both scripts")
    group.add_argument(
        "--cuda", action="store_true", help="compute on the GPU; models need not fit into it"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the output; auto keeps the dtype of each of the donor's tensors "
        "(default: %(default)s)",
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
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a model; only for models you trust",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model in the output directory, once the new one is whole",
    )
    group.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="processors to compute on (default: all that this process may use)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the plan, but write nothing",
    )
    group.add_argument(
        "--model-card",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a README.md that says what the model was made of (default: --model-card)",
    )
    talk = group.add_mutually_exclusive_group()
    talk.add_argument(
        "--quiet", action="store_true", help="print nothing but errors, and the output's path"
    )
    talk.add_argument(
        "--verbose", action="store_true", help="print how each tensor is made, and all warnings"
    )
    group.add_argument("--version", action="version", version=f"%(prog)s {versions()}")


def joined(argv: Sequence[str] | None) -> list[str]:
    """Join options with values that start with a minus, which argparse would take for options."""
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if re.match(r"-[\d.]", word) and words and words[-1] in ("--weight", "--density"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def model_name(text: str) -> str:
    """Parse the name of a model."""
    if not text.strip():
        raise ValueError
    try:
        files.split_adapter(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def versions() -> str:
    """Return the version of this tool and of what it stands on."""
    found = []
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed: pip install -r requirements.txt")
    return f"{VERSION} ({', '.join(found)})"


def command(script: str, argv: Sequence[str] | None) -> str:
    """Return the command of this run."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


def available_processors() -> int:
    """Return how many processors this process may use, by affinity and control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count or 1, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such control group, or no limit
        pass
    return count or 1


def say(quiet: bool, text: str) -> None:
    if not quiet and sys.stderr is not None:  # where it is closed
        print(text, file=sys.stderr, flush=True)


def say_path(path: str) -> None:
    """Print a path on standard output. The model is there, whether or not anybody can read this."""
    try:
        print(path, flush=True)
    except UnicodeError:
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    except OSError:  # a closed pipe, a full disk; leave nothing that is tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_inputs(
    arguments: argparse.Namespace,
    names: Iterable[str],
    sizes: Sequence[str],
    problems: list[str],
    other_inputs: Iterable[str] = (),
) -> "dict[str, Checkpoint]":
    """Open the named models, the donor first; add to the problems what speaks against the run.

    Cheap checks come first: nothing is loaded for a mistyped path, nothing downloaded for options
    that cannot work, no weights downloaded for models of different sizes. `sizes` are the config
    values in which all must agree. Raises Problems if not all models can be opened.
    """
    names = list(dict.fromkeys(names))
    usable = not problems
    folders: dict[str, Path] = {}
    adapters: dict[str, Path] = {}
    split = {name: files.split_adapter(name) for name in names}
    for name, (base, adapter) in split.items():
        if usable or files.is_local(base):
            with collecting(problems):
                folders[name] = files.find(base, arguments.cache_dir)
        if adapter is not None and (usable or files.is_local(adapter)):
            with collecting(problems):
                adapters[name] = files.find_adapter(adapter, arguments.cache_dir)
    output = Path(arguments.output)
    inputs = [*folders.values(), *adapters.values(), *map(Path, other_inputs)]
    problems += files.output_problems(output, inputs, arguments.overwrite)
    with collecting(problems):
        check_shard_size(arguments.max_shard_size)
    missing = [n for n in names if n not in folders or (split[n][1] and n not in adapters)]
    if not usable or missing:
        refuse(problems)

    import transformers

    import architecture  # noqa: F401  (with all that planning and saving will import)
    import checkpoints
    import saving  # noqa: F401
    from adapters import adapted

    if not arguments.verbose:  # their advice is about loading models to run, which nobody does here
        transformers.utils.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    with collecting(problems):
        choose_device(arguments.cuda)
    configs = {}
    for name, folder in folders.items():
        with collecting(problems):
            configs[name] = checkpoints.read_config(name, folder, arguments.trust_remote_code)
    if len(configs) < len(names):
        refuse(problems)
    if different := checkpoints.size_problems(configs, names[0], sizes):
        refuse(problems + different)
    for warning in checkpoints.meaning_warnings(configs, names[0]):
        say(arguments.quiet, f"warning: {warning}")
    models = {}
    for name, folder in folders.items():
        with collecting(problems):
            files.fetch_weights(split[name][0], folder, arguments.cache_dir)
            models[name] = checkpoints.open_checkpoint(name, folder, configs[name])
            if name in adapters:
                trust = arguments.trust_remote_code
                models[name] = adapted(models[name], adapters[name], trust)
    if len(models) < len(names):
        refuse(problems)
    return models


def write(
    arguments: argparse.Namespace,
    plan: "Callable[[], Planned]",
    card: "Callable[[str, Planned], str]",
    copied: Mapping[str, Path],
    problems: list[str],
    started: float,
) -> None:
    """Plan a model and save it with the common options, or with --dry-run say what would be saved.

    `card` makes its model card, of a title. Raises Problems with all that the plan finds, besides
    those found before.
    """
    from saving import save

    planned = None
    with collecting(problems):
        planned = plan()
    if planned is None:
        raise Problems(problems)
    output = Path(arguments.output)
    extra = sum(path.stat().st_size for path in copied.values())
    refuse(problems + files.space_problems(output, planned.nbytes + extra))
    say(arguments.quiet and not arguments.dry_run, summary(planned, arguments.max_shard_size))
    if arguments.verbose:
        say(False, recipes(planned))
    if arguments.dry_run:
        return
    text = None
    if arguments.model_card:
        try:
            text = card(output.resolve().name, planned).encode("utf-8", "backslashreplace")
        except Exception as error:  # whatever is odd in other cards, the model is worth more
            say(arguments.quiet, f"warning: no model card could be made: {error}")
    shards = save(
        planned,
        copied,
        output,
        device=choose_device(arguments.cuda),
        threads=arguments.threads or available_processors(),
        max_shard_size=arguments.max_shard_size,
        card=text,
        overwrite=arguments.overwrite,
        show_progress=not arguments.quiet and sys.stderr is not None and sys.stderr.isatty(),
    )
    say(
        arguments.quiet,
        f"{arguments.output}: {planned.parameters:,} parameters in {shards} "
        f"shard{'s' * (shards != 1)}, {time.monotonic() - started:.1f} s, "
        f"peak memory {gigabytes(peak_memory())}",
    )
    say_path(arguments.output)


def recipes(planned: "Planned") -> str:
    """Return how each tensor is made, one a line."""
    return "\n".join(
        f"{name} {list(recipe.shape)} {str(recipe.dtype).removeprefix('torch.')}: {recipe.how}, "
        + ", ".join(f"{source.checkpoint.name} {source.name}" for source in recipe.sources)
        for name, recipe in planned.plan.items()
    )


def summary(planned: "Planned", max_shard_size: str) -> str:
    """Return what a plan will read, make and write, as text."""
    ways = Counter(recipe.how for recipe in planned.plan.values())
    dtypes = Counter(str(r.dtype).removeprefix("torch.") for r in planned.plan.values())
    read = {source: source.info.nbytes for r in planned.plan.values() for source in r.sources}
    shards = len(planned.shards(max_shard_size))
    largest = max((recipe.nbytes for recipe in planned.plan.values()), default=0)
    lines = [
        f"donor: {planned.donor}, {type(planned.model).__name__}",
        f"tensors: {', '.join(f'{count} {way}' for way, count in ways.most_common())}",
        f"dtype: {', '.join(f'{dtype} ({count})' for dtype, count in dtypes.most_common())}",
        f"ignored: {some(planned.ignored) or 'none'}",
        f"reads {gigabytes(sum(read.values()))}, writes {gigabytes(planned.nbytes)} in "
        f"{shards} shard{'s' * (shards != 1)}, needs about "
        f"{gigabytes(2 * largest + LIBRARIES)} of memory besides mapped files",
        *planned.notes,
    ]
    return "\n".join(lines)


def chosen_dtype(name: str) -> "torch.dtype | None":
    """Return the --dtype; None for auto."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def choose_device(cuda: bool) -> "torch.device":
    import torch

    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--cuda: PyTorch finds no CUDA device; install a CUDA build of torch and a driver, "
            "or leave --cuda out to compute on the CPU"
        )
    return torch.device("cuda")


def check_shard_size(size: str) -> None:
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*[KMGT]B\s*", size, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError(f"--max-shard-size: expected a size such as 500MB or 5GB, got {size!r}")


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


class Interrupted(BaseException):
    """A signal asked the run to stop."""


def run(work: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's work and return the exit status.

    0; 2 with one message for what a user can mend; 128 + its number for a signal (130 on Ctrl-C,
    143 on SIGTERM), after the leftovers are removed.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        raise Interrupted

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [s for s in STOP_SIGNALS if in_main_thread and signal.getsignal(s) != signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in handled}
    collected = gc.isenabled()
    gc.disable()  # it slows importing torch and transformers by a third, and finds nothing
    try:
        with warnings.catch_warnings():
            work(argv)
    except BaseException as error:
        if received:  # the error may be what a library made of the interruption
            for each in handled:
                signal.signal(each, signal.SIG_IGN)
            say(False, "interrupted, nothing was left behind")
            return 128 + received[0]
        if isinstance(error, ValueError | OSError):
            say(False, f"error: {explain(error)}")
            return 2
        if isinstance(error, MemoryError) or re.search("(out of|allocate) memory", str(error)):
            say(False, f"error: out of memory: {str(error).splitlines()[0]}")
            return 2
        raise
    finally:
        if collected:
            gc.enable()
        if argv is None:  # the end of a script: collecting takes a second, and changes nothing
            gc.freeze()
        if argv is not None or not received:  # at the end of a script, let no signal disturb it
            for each, handler in before.items():
                signal.signal(each, handler)
    return 0
