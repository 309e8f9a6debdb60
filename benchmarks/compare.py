"""Time whole merges against mergekit and against the floor, in turn, and print a table of ratios.

    python benchmarks/compare.py --size 1.1b --folder ./bench --mergekit path/to/mergekit-yaml

The floor imports torch and transformers, reads every page of the inputs, and writes one output.
Each round runs every program once, so that a machine whose speed drifts is fair to all; ratios are
of one round, and the table has their medians. Mergekit needs an environment of its own:
`python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5`. `--cold` drops the inputs
from the page cache before each run.
"""

import argparse
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


def mergekit_config(job: str, folder: Path) -> str:
    base, a, b = (folder / name for name in ("base", "a", "b"))
    both = f"models: [{{model: {a}, parameters: {{weight: 0.5, density: 0.5}}}}, "
    both += f"{{model: {b}, parameters: {{weight: 0.3, density: 0.5}}}}]\ndtype: bfloat16\n"
    return {
        "linear": f"merge_method: linear\n{both}",
        "ties": f"merge_method: ties\nbase_model: {base}\n{both}",
        "slerp": f"merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.5}}\n"
        f"models: [{{model: {a}}}, {{model: {b}}}]\ndtype: bfloat16\n",
        "stack": "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
        f"  - sources: [{{model: {a}, layer_range: [0, DEPTH16]}}]\n"
        f"  - sources: [{{model: {b}, layer_range: [DEPTH6, DEPTH22]}}]\n",
    }[job]


def commands(job: str, size: str, folder: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Return the command of each program for a job; {out} stands for the output."""
    base, a, b = (str(folder / name) for name in ("base", "a", "b"))
    depth = SIZES[size].num_hidden_layers
    cut, skip = round(depth * 16 / 22), round(depth * 6 / 22)
    stack = folder / "stack.yml"
    stack.write_text(
        f"layer_slices: [{{model: {a}, start: 0, end: {cut}}}, "
        f"{{model: {b}, start: {skip}, end: {depth}}}]\n"
    )
    python, merges = sys.executable, ["--merge", a, "--weight", "0.5", "--merge", b, "--weight"]
    script = str(ROOT / "main.py")
    found = {
        "linear": [python, script, "{out}", "--method", "linear", *merges, "0.3"],
        "slerp": [python, script, "{out}", "--method", "slerp", "--base-model", a, "--merge", b]
        + ["--weight", "0.5"],
        "ties": [python, script, "{out}", "--base-model", base, *merges, "0.3", "--density", "0.5"],
        "stack": [python, str(ROOT / "bakllama.py"), str(stack), "{out}"],
    }
    inputs = [a, b, base] if job == "ties" else [a, b]
    programs = {"ours": found[job], "floor": [python, "-c", FLOOR, "{out}", *inputs]}
    if mergekit:
        config = folder / f"mergekit-{job}.yml"
        text = mergekit_config(job, folder)
        for marker, number in (("DEPTH16", cut), ("DEPTH6", skip), ("DEPTH22", depth)):
            text = text.replace(marker, str(number))
        config.write_text(text)
        programs["mergekit"] = [mergekit, str(config), "{out}"]
    return programs


def run(command: list[str], out: Path) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
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
    parser.add_argument("--jobs", nargs="+", default=["linear", "slerp", "ties", "stack"])
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
        programs = commands(job, arguments.size, folder, arguments.mergekit)
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
