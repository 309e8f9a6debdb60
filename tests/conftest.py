"""Tiny checkpoints, made on demand, and readers that do not go through the code under test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import DECODERS
from safetensors.torch import load_file

tf.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()

Make = Callable[..., Path]


def every_device() -> list[str]:
    """Return every device that this PyTorch can compute on."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    return devices


@pytest.fixture(params=every_device())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def loads_clean(folder: Path, auto: type = tf.AutoModelForCausalLM) -> tf.PreTrainedModel:
    """Load a checkpoint, and fail if transformers finds anything missing or left over."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by name."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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
