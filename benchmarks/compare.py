"""Time whole merges against mergekit and against the floor, in turn, and print a table of ratios.

    python benchmarks/compare.py --size 1.1b --folder ./bench --mergekit path/to/mergekit-yaml

The floor imports torch and transformers, reads every page of the inputs, and writes one output.
Each round runs every program once, so that a machine whose speed drifts is fair to all; ratios are
of one round, and the table has their medians. Mergekit needs an environment of its own:
`python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5`. `--cold` drops the inputs
from the page cache before each run. A job has the name of its method (`--jobs dare_ties della`), or
is a `stack`; `--size tiny --rounds 1` shows in a few minutes that all of them start.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from models import SIZES, drop_from_cache, make

ROOT = Path(__file__).resolve().parent.parent
FLOOR = """
import sys, torch
import transformers.modeling_utils
from safetensors import safe_open
for folder in sys.argv[2:]:
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            tensor.view(-1).view(torch.int16)[::2048].sum()
with open(f"{sys.argv[2]}/model.safetensors", "rb") as source, open(sys.argv[1], "wb") as target:
    while block := source.read(1 << 24):
        target.write(block)
"""


class Run(NamedTuple):
    seconds: float
    gigabytes: float  # peak resident memory, mapped files included


class Job(NamedTuple):
    """A merge, in the words of both programs."""

    method: str
    takes_base: bool = True
    weights: tuple[float, ...] = (0.5, 0.3)  # of a and b; none: the method has no use for them
    numbers: dict[str, float] = {}  # of each model
    shared: dict[str, float] = {}  # of all models, as mergekit calls them

    def ours(self, base: str, models: list[str]) -> list[str]:
        """Return the command of main.py, without the output."""
        words = ["--method", self.method] + ["--base-model", base] * self.takes_base
        for i, model in enumerate(models):
            words += ["--merge", model]
            words += ["--weight", str(self.weights[i])] if self.weights else []
        for name, value in (self.numbers | self.shared).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def mergekits(self, base: str, models: list[str]) -> str:
        """Return the same as YAML, which is JSON too."""
        rows = []
        for i, model in enumerate(models):
            weight = {"weight": self.weights[i]} if self.weights else {}
            rows.append({"model": model, "parameters": weight | self.numbers})
        origin = {"base_model": base} if self.takes_base else {}
        config = {"merge_method": self.method, "models": rows, "parameters": self.shared}
        return json.dumps(config | origin | {"dtype": "bfloat16"})


JOBS = {
    job.method: job
    for job in (
        Job("linear", takes_base=False),
        Job("task_arithmetic"),
        Job("nuslerp"),
        Job("multislerp"),
        Job("karcher", takes_base=False, weights=()),
        Job("model_stock", weights=()),
        Job("ties", numbers={"density": 0.5}),
        Job("dare_ties", numbers={"density": 0.5}),
        Job("della", numbers={"density": 0.5, "epsilon": 0.15}),
        Job("breadcrumbs_ties", numbers={"density": 0.5, "gamma": 0.01}),
        Job("sce", weights=(), shared={"select_topk": 0.5}),
    )
}


def merge_commands(job: str, folder: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Return the commands of a job that merges whole models."""
    base, a, b = (str(folder / name) for name in ("base", "a", "b"))
    if job == "slerp":
        words = ["--method", "slerp", "--base-model", a, "--merge", b, "--weight", "0.5"]
        models = f"[{{model: {a}}}, {{model: {b}}}]"
        text = f"merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.5}}\nmodels: {models}\n"
        text += "dtype: bfloat16\n"
    else:
        words, text = JOBS[job].ours(base, [a, b]), JOBS[job].mergekits(base, [a, b])
    inputs = [a, b, base] if job != "slerp" and JOBS[job].takes_base else [a, b]
    return _programs([str(ROOT / "main.py"), "{out}", *words], inputs, text, folder, job, mergekit)


def stack_commands(size: str, folder: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Return the commands of a stack of layers of both models."""
    a, b = (str(folder / name) for name in ("a", "b"))
    depth = SIZES[size].num_hidden_layers
    cut, skip = round(depth * 16 / 22), round(depth * 6 / 22)
    stack = folder / "stack.yml"
    stack.write_text(
        f"layer_slices: [{{model: {a}, start: 0, end: {cut}}}, "
        f"{{model: {b}, start: {skip}, end: {depth}}}]\n"
    )
    text = (
        "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
        f"  - sources: [{{model: {a}, layer_range: [0, {cut}]}}]\n"
        f"  - sources: [{{model: {b}, layer_range: [{skip}, {depth}]}}]\n"
    )
    ours = [str(ROOT / "bakllama.py"), str(stack), "{out}"]
    return _programs(ours, [a, b], text, folder, "stack", mergekit)


def _programs(
    ours: list[str], inputs: list[str], text: str, folder: Path, job: str, mergekit: str | None
) -> dict[str, list[str]]:
    """Return the command of each program for a job; {out} stands for the output."""
    python = sys.executable
    programs = {"ours": [python, *ours], "floor": [python, "-c", FLOOR, "{out}", *inputs]}
    if mergekit:
        config = folder / f"mergekit-{job}.yml"
        config.write_text(text)
        programs["mergekit"] = [mergekit, str(config), "{out}"]
    return programs


def run(command: list[str], out: Path) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    os.sync()  # or the next program waits for what the last one left to be written
    words = [word.replace("{out}", str(out)) for word in command]
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{text.decode()}")
    return Run(seconds, usage.ru_maxrss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--folder", type=Path, default=Path("bench"))
    parser.add_argument(
        "--jobs",
        nargs="+",
        choices=[*JOBS, "slerp", "stack"],
        default=["linear", "slerp", "ties", "stack"],
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / arguments.size
    make(arguments.size, folder)
    print(
        "| job | ours | floor | mergekit | mergekit / ours | ours / floor | memory ours, mergekit |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for job in arguments.jobs:
        if job == "stack":
            programs = stack_commands(arguments.size, folder, arguments.mergekit)
        else:
            programs = merge_commands(job, folder, arguments.mergekit)
        runs: dict[str, list[Run]] = {name: [] for name in programs}
        for _ in range(arguments.rounds):
            for name, command in programs.items():
                if arguments.cold:
                    drop_from_cache(folder)
                runs[name].append(run(command, folder / "out"))
        print(row(job, runs), flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)


def row(job: str, runs: dict[str, list[Run]]) -> str:
    def median(name: str) -> str:
        return f"{statistics.median(r.seconds for r in runs[name]):.1f} s" if name in runs else "-"

    def ratio(one: str, other: str) -> str:
        if one not in runs:
            return "-"
        pairs = zip(runs[one], runs[other], strict=True)
        return f"{statistics.median(x.seconds / y.seconds for x, y in pairs):.1f}x"

    memory = [
        f"{max(r.gigabytes for r in runs[name]):.1f}"
        for name in ("ours", "mergekit")
        if name in runs
    ]
    cells = [job, median("ours"), median("floor"), median("mergekit")]
    cells += [ratio("mergekit", "ours"), ratio("ours", "floor"), ", ".join(memory) + " GB"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
