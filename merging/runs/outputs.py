"""Check the place of an output before anything is written. Loads no torch."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from merging.models.folders import foreign_files, is_model
from merging.problems import some
from merging.recipes.user_files import read_start
from merging.runs.staging import siblings

# How reports begin, by the ending of their names.
REPORT_MARKS = {".html": b"<title>Merge report</title>", ".json": b'"format": "merge report"'}


def output_problems(output: Path, inputs: Iterable[Path], overwrite: bool) -> list[str]:
    """Return what speaks against writing a model to this directory.

    Inputs are the folders of models, and other files that are read.
    """
    if problem := _name_problem(str(output)):
        return [f"{str(output)[:200]}: {problem}"]
    try:
        target = output.resolve(strict=output.is_symlink() and not output.exists())
    except (OSError, RuntimeError, ValueError) as error:
        return [f"{output}: cannot be resolved: {error}"]
    if target.parent == target:
        return [f"{output}: the root directory cannot be an output"]
    problems = [*_input_problems(output, target, inputs)]
    if _is_mount(target):
        problems.append(f"{output}: a mount point, which cannot be replaced; name a folder in it")
    elif output.exists() and not output.is_dir():
        problems.append(f"{output}: the output is a file; name a directory")
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            problems.append(f"{output}: not empty; name another directory, or use --overwrite")
        elif not is_model(output):
            problems.append(f"{output}: not a model, so --overwrite does not replace it")
        else:
            problems += overwrite_problems(output)
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        problems.append(f"{output}: {existing} is a file, so nothing can be written below it")
    elif not os.access(existing, os.W_OK):
        problems.append(f"{output}: {existing} cannot be written to")
    if len(os.fsencode(siblings(target)[1].name)) > 255:
        problems.append(f"{output}: the name is too long; use at most 240 characters")
    return problems


def _input_problems(output: Path, target: Path, inputs: Iterable[Path]) -> Iterator[str]:
    """Say which inputs the output would touch."""
    for given in inputs:
        source = Path(os.path.realpath(given))
        if (
            source in (target, *siblings(target))
            or target in source.parents
            or source in target.parents
        ):
            yield f"{output}: the output is, contains or lies in the input {given}; name another"
        elif source.is_dir():
            real = {file.name: Path(os.path.realpath(file)) for file in source.iterdir()}
            linked = [name for name, path in real.items() if target in path.parents]
            if linked:
                yield f"{output}: holds files that {given} links to: {some(linked)}"


def report_problems(
    reports: Iterable[str], output: Path, inputs: Iterable[Path], overwrite: bool
) -> list[str]:
    """Return what speaks against writing reports to these files."""
    problems = []
    seen: set[Path] = set()
    named = [path for path in (output, *inputs) if not _name_problem(str(path))]
    folders = [Path(os.path.realpath(path)) for path in named]
    for name in reports:
        if problem := _name_problem(name):
            problems.append(f"--report {name[:200]}: {problem}")
            continue
        file, parent = Path(name), Path(os.path.realpath(Path(name).parent))
        target = parent / file.name
        if problem := _report_problem(file, overwrite):
            problems.append(f"--report {name}: {problem}")
        elif target in seen:
            problems.append(f"--report {name}: given twice; name another file")
        elif any(folder in (target, *target.parents) for folder in folders):
            problems.append(f"--report {name}: lies in a model; name a file elsewhere")
        elif any(target in folder.parents for folder in folders):
            problems.append(f"--report {name}: is to be a folder of the output; name another file")
        seen.add(target)
    return problems


def _report_problem(file: Path, overwrite: bool) -> str:
    """Say why a report cannot be written to a file; nothing if it can."""
    if file.suffix.lower() not in REPORT_MARKS:
        return f"expected a name that ends in {' or '.join(REPORT_MARKS)}"
    if not file.parent.is_dir():
        return f"{file.parent} is no directory"
    if not os.access(file.parent, os.W_OK):
        return f"{file.parent} cannot be written to"
    hidden, _ = siblings(file)
    if (size := len(os.fsencode(hidden.name))) > 255:
        return f"the name is too long by {size - 255} bytes"
    if hidden.is_dir() and not hidden.is_symlink():
        return f"{hidden} is in the way; move it, or name another file"
    if not os.path.lexists(file):
        return ""
    if not overwrite:
        return "exists; name another file, or use --overwrite"
    try:
        is_report = REPORT_MARKS[file.suffix.lower()] in read_start(file)
    except (OSError, ValueError):
        is_report = False
    return "" if is_report else "no report of a merge, so --overwrite does not replace it"


def _name_problem(name: str) -> str:
    """Say what is wrong with a path as such; nothing if it can be."""
    parts = Path(name).parts
    try:
        size = len(name.encode("utf-8"))
        longest = max((len(part.encode()) for part in parts), default=0)
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if "\0" in name:
        return "the name has a null byte in it"
    if len(parts) > 200:
        return f"the path has {len(parts)} parts, expected at most 200"
    return "the path is too long" if size > 3500 or longest > 255 else ""


def overwrite_problems(output: Path) -> list[str]:
    """Return a problem if a folder holds what --overwrite would lose, as no model has it."""
    foreign = foreign_files(output) if output.is_dir() else []
    if not foreign:
        return []
    remedy = "move it away, or name another output"
    return [f"{output}: --overwrite replaces a model, but there is {some(foreign)}; {remedy}"]


def _is_mount(target: Path) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        return str(target) in [line.split()[4] for line in mounts.splitlines()]
    except OSError:  # not Linux
        return os.path.ismount(target)


def space_problems(output: Path, needed: int) -> list[str]:
    """Return a problem if the disk of the output has less than `needed` bytes free."""
    target = output.resolve()
    existing = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return []
    return [
        f"{output}: needs {needed / 1e9:.2f} GB of disk, {existing} has {free / 1e9:.2f} GB free"
    ]
