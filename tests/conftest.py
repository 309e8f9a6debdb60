"""Tiny checkpoints, made on demand, and places to write to."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import DECODERS
from helpers import Make, contents, every_device

# Of these files, one test in so many runs by default, and all with ALL_TESTS=1: see test_fuzz.py.
SAMPLED = {"test_hostile_inputs": 8, "test_hub_protocol": 3, "test_emulated_device": 3}

# Workers share the processors: one thread each, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
tf.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("ALL_TESTS"):
        return
    numbers: Counter[str] = Counter()
    left_out = []
    for item in items:
        numbers[item.path.stem] += 1
        if (numbers[item.path.stem] - 1) % SAMPLED.get(item.path.stem, 1):
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(params=every_device())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a maker of tiny checkpoints: make("llama", seed=1). Each is made once; do not change.

    Every parameter is random, norms and biases too, so that no tensor equals another by default.
    """
    made: dict[tuple[object, ...], Path] = {}

    def maker(
        name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: object
    ) -> Path:
        key = (name, seed, dtype, repr(changes))
        if key not in made:
            config = type(DECODERS[name]).from_dict(DECODERS[name].to_dict() | changes)
            model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            made[key] = tmp_path_factory.mktemp("made") / f"{name}-{seed}"
            model.save_pretrained(made[key])
            (made[key] / "tokenizer_config.json").write_text(f'{{"made": "{name} {seed}"}}\n')
        return made[key]

    return maker


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Give a name to write to, and check afterwards that nothing hidden was left beside it."""
    yield tmp_path / "out" / "model"
    parent = tmp_path / "out"
    left = [p.name for p in parent.iterdir() if p.name != "model"] if parent.exists() else []
    assert left == []


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and modification times of all files below a folder."""
    return {
        name: (content, (folder / name).stat().st_mtime_ns)
        for name, content in contents(folder).items()
    }


@pytest.fixture
def inputs(make: Make, tmp_path: Path) -> Iterator[list[str]]:
    """Give copies of a base and two models, and check that nothing touches them."""
    names = ["base", "a", "b"]
    folder = tmp_path / "inputs"
    for seed, name in enumerate(names):
        shutil.copytree(make("mixtral", seed), folder / name)
    before = state(folder)
    yield [str(folder / name) for name in names]
    assert state(folder) == before
