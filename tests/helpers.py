"""Readers, runs and makers that tests share; readers do not go through the code under test."""

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from architectures import OTHER_CLASSES
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import main

Make = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def every_device() -> list[str]:
    """Return every device that this PyTorch can compute on."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    return devices


# -------------------------------------------------------------------- reading


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


def visible(folder: Path) -> list[str]:
    """Return the names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -------------------------------------------------------------------- running

# Each with the libraries loaded already.
PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
PROCESSES.set_forkserver_preload(
    "main merging.plans.planner merging.runs.cards merging.runs.writing "
    "transformers.models.mixtral.modeling_mixtral transformers.conversion_mapping".split()
)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run main.py, expect exit status 2, and return its message."""
    assert main.main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def linear(output: Path, *models: Path, options: tuple[str, ...] = ()) -> int:
    """Run main.py on models, by default to average them, and return its exit status."""
    merges = [text for model in models for text in ("--merge", str(model))]
    return main.main([str(output), "--method", "linear", "--weight", "1", *merges, *options])


def ties_command(output: Path, inputs: list[str], *options: str) -> list[str]:
    """Return the arguments of a merge of a base and two models into several shards."""
    base, a, b = inputs
    merges = ["--merge", a, "--merge", b, "--density", "0.5", "--max-shard-size", "100KB"]
    return [str(output), "--base-model", base, *merges, "--quiet", "--no-model-card", *options]


def stack_file(tmp_path: Path, text: str) -> str:
    """Write the YAML of a stack, and return its path."""
    config = tmp_path / "stack.yml"
    config.write_text(text)
    return str(config)


# -------------------------------------------------------------------- making


def rewrite(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Copy a checkpoint with other tensors, in one file."""
    shutil.copytree(source, target)
    for file in target.glob("model*.safetensors*"):
        file.unlink()
    values = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    return target


def make_adapter(
    base: Path, folder: Path, seed: int = 0, rows: int | None = None, **settings: Any
) -> Path:
    """Save an adapter of random values, and the merged model that peft makes of it.

    With `rows`, the base is given so many tokens before.
    """
    torch.manual_seed(seed)
    dtype = tf.AutoConfig.from_pretrained(base).dtype
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        model.resize_token_embeddings(rows)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(folder / "adapter")
    base_again = tf.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        base_again.resize_token_embeddings(rows)
    merged = peft.PeftModel.from_pretrained(base_again, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "merged", save_original_format=True)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder / "merged")
    return folder / "adapter"


def cached(
    made: Path,
    cache: Path,
    repo: str,
    commit: str = COMMIT,
    revision: str = "main",
    card: str | None = None,
) -> Path:
    """Lay a model out as the Hub's library caches it, and return its snapshot."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for each in (snapshot, folder / "blobs", folder / "refs"):
        each.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    files = {file.name: file.read_bytes() for file in made.iterdir()}
    if card is not None:
        files["README.md"] = card.encode()
    for name, content in files.items():
        blob = folder / "blobs" / f"{commit[:8]}-{name}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def make_other(name: str, seed: int, folder: Path) -> dict[str, Tensor]:
    """Save a tiny model of another class, of random values, and return its tensors."""
    cls, config = OTHER_CLASSES[name]
    network = cls(type(config).from_dict(config.to_dict())).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for buffer in network.buffers():
            if not buffer.is_floating_point():
                buffer.add_(seed)
    network.save_pretrained(folder)
    return stored(folder)


def word_level(tokens: Sequence[str]) -> Tokenizer:
    """Return a tokenizer of these words, numbered in this order."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
