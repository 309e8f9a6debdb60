"""What both scripts have in common on the command line: options, errors and the last line."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from problems import refuse, some

if TYPE_CHECKING:  # torch and transformers take seconds to load; --help does not wait for them
    import torch

    from checkpoints import Checkpoint, Planned

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
        help="largest size of one output file, such as 500MB; memory holds one "
        "(default: %(default)s)",
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
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def open_inputs(arguments: argparse.Namespace, names: Iterable[str]) -> "dict[str, Checkpoint]":
    """Check the common options, open the named models, and check where the output would go."""
    import transformers

    import checkpoints

    transformers.utils.logging.set_verbosity_error()  # its advice is about loading models to run
    transformers.utils.logging.disable_progress_bar()
    check_shard_size(arguments.max_shard_size)
    choose_device(arguments.cuda)
    models = {
        name: checkpoints.open_checkpoint(
            name, cache_dir=arguments.cache_dir, trust_remote_code=arguments.trust_remote_code
        )
        for name in dict.fromkeys(names)
    }
    output = Path(arguments.output)
    refuse(checkpoints.check_output(output, list(models.values()), arguments.overwrite))
    return models


def write(
    arguments: argparse.Namespace, planned: "Planned", files: Mapping[str, Path], started: float
) -> None:
    """Save a planned model with the common options, and say what came of it."""
    import checkpoints

    if planned.ignored:
        say(arguments.quiet, f"ignored: {some(planned.ignored)}")
    shards = checkpoints.save(
        planned,
        files,
        Path(arguments.output),
        device=choose_device(arguments.cuda),
        max_shard_size=arguments.max_shard_size,
        show_progress=not arguments.quiet and sys.stderr.isatty(),
    )
    say(
        arguments.quiet,
        f"{arguments.output}: {planned.parameters:,} parameters in {shards} "
        f"shard{'s' * (shards != 1)}, {time.monotonic() - started:.1f} s, "
        f"peak memory {gigabytes(peak_memory())}",
    )


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
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        if parse_size_to_int(size) > 0:
            return
    except ValueError:
        pass
    raise ValueError(f"--max-shard-size: expected a size such as 500MB or 5GB, got {size!r}")


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def run(work: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's work: exit status 0, 2 with one message for a user's error, 130 on Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        work(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0
