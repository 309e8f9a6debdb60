"""Make the model that a recipe asks for: find, open, plan, check, write, tell."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.models.folders import (
    GENERATION_CONFIG,
    files_of_a_model,
    links_left_out,
    read_json,
)
from merging.models.opening import Found, find_models, open_models
from merging.models.reading_ahead import loading_first
from merging.problems import Problems, collecting, reading, refuse, some
from merging.recipes.options import shard_size_problems
from merging.recipes.recipe import Recipe, table, with_dtype
from merging.recipes.user_files import check_readable
from merging.runs.console import peak_memory, say, say_path
from merging.runs.outputs import (
    output_problems,
    overwrite_problems,
    report_problems,
    space_problems,
)
from merging.runs.staging import staged

if TYPE_CHECKING:
    import torch

    from merging.models.checkpoints import Checkpoint
    from merging.models.words import Words
    from merging.plans.plan import Plan
    from merging.runs.head_start import HeadStart
    from merging.runs.shards import Shards

LIBRARIES = 600_000_000  # bytes of memory that torch and transformers take, generously
# Config values in which all models must agree, as they shape the tensors; of a stack, the first.
SIZES = (
    "hidden_size num_hidden_layers intermediate_size num_local_experts num_experts n_routed_experts"
).split()


def make(
    recipe: Recipe,
    arguments: argparse.Namespace,
    made_by: Mapping[str, str],
    problems: list[str],
    other_inputs: Sequence[Path] = (),
    by_itself: bool = False,
) -> None:
    """Make a recipe's model with the options of both scripts.

    `made_by` is the command, and the text of the file that it reads, if any, by language.
    `problems` are those found so far; Problems is raised with all that can be known beforehand.
    `by_itself` says that nothing else runs in this process, so that it may fork.
    """
    started = time.monotonic()
    recipe = with_dtype(recipe, arguments.dtype)
    quiet = arguments.quiet and not arguments.dry_run
    if not problems:
        say(table(recipe), quiet)
    found = _find(recipe, arguments, problems, other_inputs)
    with loading_first(() if arguments.dry_run else [pair.folder for pair in found.values()]):
        # It loads torch, which takes its time; what is above does not wait for it.
        from merging.runs.head_start import head_start

        output = Path(arguments.output)
        check = lambda: refuse(overwrite_problems(output))  # noqa: E731 - what appeared meanwhile
        folder = staged(output, overwrite=arguments.overwrite, tell=say, check=check)
        with head_start(recipe, found, arguments, folder, by_itself and not problems) as start:
            plan, shards = _made(recipe, found, arguments, made_by, problems, start)
    if not arguments.dry_run:
        _say_made(plan, len(shards), time.monotonic() - started, arguments)


def _made(
    recipe: Recipe,
    found: Mapping[str, Found],
    arguments: argparse.Namespace,
    made_by: Mapping[str, str],
    problems: list[str],
    start: "HeadStart",
) -> tuple["Plan", "Shards"]:
    """Plan and check a recipe's model, and make it, unless that is all that is asked for."""
    # These load transformers, which takes its time too: a head start makes use of it.
    from merging.runs.cards import model_card
    from merging.runs.reporting import Reporting
    from merging.runs.shards import shards_of
    from merging.runs.writing import save

    quiet = arguments.quiet and not arguments.dry_run
    models, plan, device = _plan(recipe, found, arguments, problems)
    files = _files(models[0].folder, plan.words, arguments)
    _say_left_out(models[0].folder, plan.words, arguments.quiet)
    output = Path(arguments.output)
    refuse(problems or space_problems(output, plan.nbytes + sum(map(_size, files.values()))))
    shards = shards_of(plan.tensors, arguments.max_shard_size)
    _say_plan(plan, len(shards), arguments.verbose, quiet)
    progress = not quiet and sys.stderr is not None and sys.stderr.isatty()
    reporting = Reporting(recipe, plan, arguments.report, warn=say)
    with reporting.staged(lambda text: say(text, quiet)):
        if arguments.dry_run:
            reporting.measure(device, arguments.threads, progress)
        else:
            card = model_card(
                output.resolve().name, models, recipe, plan.notes, made_by, reporting.picture
            )
            save(plan, shards, files, arguments, device, card, reporting, start, progress)
    return plan, shards


def _say_plan(plan: "Plan", shards: int, verbose: bool, quiet: bool) -> None:
    from merging.plans.plan import lines, summary

    say(summary(plan, shards, LIBRARIES), quiet)
    if verbose:
        say(lines(plan))


def _say_made(plan: "Plan", shards: int, seconds: float, arguments: argparse.Namespace) -> None:
    from merging.plans.plan import gigabytes

    say(
        f"{arguments.output}: {plan.parameters:,} parameters in {shards} "
        f"shard{'s' * (shards != 1)}, {seconds:.1f} s, peak memory {gigabytes(peak_memory())}",
        arguments.quiet,
    )
    say_path(arguments.output)


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _say_left_out(donor: Path, words: "Words", quiet: bool) -> None:
    for folder in dict.fromkeys((donor, words.owner.folder, words.owner.tokenizer)):
        if left_out := links_left_out(folder):
            say(f"left out: {some(left_out)} of {folder}: links to outside", quiet)


def _find(
    recipe: Recipe, arguments: argparse.Namespace, problems: list[str], other_inputs: Sequence[Path]
) -> dict[str, Found]:
    """Find the models and check the output; nothing is loaded for a mistyped path."""
    usable = not problems
    found = find_models(recipe.models, arguments.cache_dir, problems)
    inputs = [path for pair in found.values() for path in pair if path is not None]
    output = Path(arguments.output)
    problems += output_problems(output, [*inputs, *other_inputs], arguments.overwrite)
    problems += report_problems(arguments.report, output, inputs, arguments.overwrite)
    problems += shard_size_problems(arguments.max_shard_size)
    if not usable or len(found) < len(recipe.models):
        refuse(problems)
    return found


def _plan(
    recipe: Recipe, found: Mapping[str, Found], arguments: argparse.Namespace, problems: list[str]
) -> tuple[Sequence["Checkpoint"], "Plan", "torch.device"]:
    """Open the models and plan; Problems are those of before too, if there is no plan."""
    import torch

    from merging.plans.planner import plan_model
    from merging.runs.computing import choose_device

    device = torch.device("cpu")
    with collecting(problems):
        device = choose_device(arguments.cuda)
    sizes = SIZES[:1] if recipe.is_stack else SIZES
    models = open_models(found, sizes, arguments, problems)
    try:
        plan = plan_model(recipe, models, arguments.trust_remote_code)
    except Problems as error:
        raise Problems(*problems, *error.problems) from error
    return list(models.values()), plan, device


def check_generation_config(folder: Path) -> None:
    """Refuse a model's generation_config.json that transformers cannot load: it is copied."""
    if (file := folder / GENERATION_CONFIG).is_file():
        from transformers import GenerationConfig

        read_json(str(folder), file)
        with reading(folder, GENERATION_CONFIG):
            GenerationConfig.from_pretrained(folder, local_files_only=True)


def _files(donor: Path, words: "Words", arguments: argparse.Namespace) -> dict[str, Path | bytes]:
    """Return the files to copy or to write: the donor's, and those of the tokenizer's owner."""
    owner = words.owner.folder
    check_generation_config(owner)
    copied = getattr(arguments, "copy_tokenizer", True)
    files: dict[str, Path | bytes] = {
        **files_of_a_model(donor, words.owner.tokenizer if copied else None)
    }
    if owner != donor:
        files.pop(GENERATION_CONFIG, None)  # it speaks of token ids
        of_owner = files_of_a_model(owner, None)
        if GENERATION_CONFIG in of_owner:
            files[GENERATION_CONFIG] = of_owner[GENERATION_CONFIG]
    for name in words.left_out:
        files.pop(name, None)
    files = {**files, **words.files} if copied else files
    for name, file in files.items():
        if isinstance(file, Path):
            with reading(file.parent, name):
                check_readable(file)
    return files
