"""Both scripts end to end, on tiny checkpoints of many architectures."""

from pathlib import Path

import pytest
import torch
from architectures import DECODERS
from conftest import Make, loads_clean, stored
from test_merge_methods import ties_oracle

import bakllama
import main

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers", "mlp_layer_types")


def generates(folder: Path) -> None:
    model = loads_clean(folder)
    tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 3
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("name", DECODERS)
def test_ties(name: str, make: Make, output: Path) -> None:
    base, a, b = (make(name, seed) for seed in range(3))
    arguments = [str(output), "--base-model", str(base), "--density", "0.4"]
    assert main.main([*arguments, "--merge", str(a), "--merge", str(b)]) == 0

    merged, of_base, of_a, of_b = (stored(folder) for folder in (output, base, a, b))
    assert merged.keys() == of_base.keys()
    for tensor in sorted(merged, key=lambda n: merged[n].numel())[::3]:
        oracle = ties_oracle(
            of_base[tensor], [of_a[tensor], of_b[tensor]], [1, 1], [0.4, 0.4], True, False
        )
        assert merged[tensor].dtype == torch.bfloat16
        torch.testing.assert_close(merged[tensor].double(), oracle, rtol=0.51 * 2**-7, atol=1e-7)
    generates(output)


@pytest.mark.parametrize("name", DECODERS)
def test_stack(name: str, make: Make, output: Path, tmp_path: Path) -> None:
    folders = {seed: make(name, seed) for seed in range(2)}
    chosen = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4), (1, 5)]
    config = tmp_path / "stack.yml"
    config.write_text(f"""
layer_slices:
  - {{model: {folders[0]}, start: 0, end: 4}}
  - {{model: {folders[1]}, start: 2, end: 6}}
""")
    assert bakllama.main([str(config), str(output)]) == 0

    stacked, sources = stored(output), {seed: stored(folders[seed]) for seed in folders}
    prefix = next(n for n in stacked if ".0." in n).split(".0.")[0]
    expected = {}
    for number, (seed, layer) in enumerate(chosen):
        for tensor, value in sources[seed].items():
            if tensor.startswith(f"{prefix}.{layer}."):
                expected[tensor.replace(f"{prefix}.{layer}.", f"{prefix}.{number}.", 1)] = value
    for seed, markers in ((0, ("emb", "wte", "wpe")), (1, ("norm", "ln_f", "head", "embed_out"))):
        for tensor, value in sources[seed].items():
            outside = not tensor.startswith(f"{prefix}.")
            is_head = any(marker in tensor for marker in ("norm", "ln_f", "head", "embed_out"))
            if outside and any(m in tensor for m in markers) and is_head == (seed == 1):
                expected[tensor] = value
    assert stacked.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(stacked[tensor], value), tensor

    model = loads_clean(output)
    donor = type(DECODERS[name]).from_pretrained(folders[0])
    assert model.config.num_hidden_layers == 8
    for key in PER_LAYER:
        entries = getattr(donor, key, None)
        if key == "mlp_only_layers" and entries is not None:
            wanted = [n for n, (_, layer) in enumerate(chosen) if layer in entries]
            assert getattr(model.config, key) == wanted
        elif isinstance(entries, list):
            assert getattr(model.config, key) == [entries[layer] for _, layer in chosen]
    generates(output)
