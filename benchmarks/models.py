"""Make checkpoints of random weights, of the shapes of real models, to time merges with.

    python benchmarks/models.py 1.1b ./bench-models

writes base, a and b: two models that differ a little from the base, in bfloat16.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048}
SIZES: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(  # to see whether a benchmark starts
        **(_LLAMA | {"vocab_size": 500}),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "0.1b": LlamaConfig(
        **_LLAMA,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
    ),
    "1.1b": LlamaConfig(
        **_LLAMA,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "3b": LlamaConfig(
        **_LLAMA,
        hidden_size=3200,
        intermediate_size=8640,
        num_hidden_layers=26,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "many-experts": MixtralConfig(  # 40,000 small tensors
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=52,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=256,
    ),
}


def make(size: str, folder: Path, seeds: int = 2) -> None:
    """Write folder/base, folder/a, folder/b, ... unless they exist."""
    names = ["base", *"abcdefgh"[:seeds]]
    if all((folder / name / "config.json").exists() for name in names):
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SIZES[size], dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="5GB")
    base = [parameter.detach().clone() for parameter in model.parameters()]
    for seed, name in enumerate(names[1:], 1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, origin in zip(model.parameters(), base, strict=True):
                change = torch.randn(origin.shape, generator=generator) * 0.002
                parameter.copy_(origin.float() + change)
        model.save_pretrained(folder / name, max_shard_size="5GB")


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the pages of all files below a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(arguments.size, arguments.folder)


if __name__ == "__main__":
    main()
