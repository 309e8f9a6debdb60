"""Both scripts on every causal class of transformers, against oracles of their own.

ALL_TESTS=1 python -m pytest tests/test_every_class.py

Without the variable, some thirty of the causal classes are tried. The option
--junitxml=FILE keeps what each class came to: its property `refused` is the message of a refusal.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from every_class import (
    CAUSAL,
    LAYERS,
    build,
    loaded,
    runs_on,
    stored,
)
from torch import Tensor, nn

import bakllama
import main

# One class at least of each form in which a config speaks of layers.
FORMS = """BambaForCausalLM BartForCausalLM BltForCausalLM CpmAntForCausalLM DiffLlamaForCausalLM
    Dots3NoteForCausalLM Ernie4_5_MoeForCausalLM FalconH1ForCausalLM Gemma4ForCausalLM
    Gemma4UnifiedForCausalLM GitForCausalLM GPTNeoForCausalLM GPTNeoXJapaneseForCausalLM
    JambaForCausalLM LongcatFlashForCausalLM ProphetNetForCausalLM Qwen3MoeForCausalLM
    Zamba2ForCausalLM ZambaForCausalLM ZayaForCausalLM xLSTMForCausalLM""".split()
CHOSEN = CAUSAL if os.environ.get("ALL_TESTS") else sorted({*FORMS, *CAUSAL[::20]})

# Classes that are not causal, with configs that differ from layer to layer.
OTHERS = ("DiffusionGemmaForBlockDiffusion", "EmbeddingGemma2TextModel", "NeoMMEForMaskedLM")

# Of each layer of a stack, the model and the layer there. Seven of four: no period of two survives.
STACK = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]

# Decoders that may refuse this stack, and what the refusal has to say of the cause.
PARTS = "several parts"
REFUSED = {
    "BltForCausalLM": f"{PARTS}|decoder_config",
    "DoryForCausalLM": "n_(input|recurrent|output)_layers",
    "FuyuForCausalLM": PARTS,
    "GPTNeoXJapaneseForCausalLM": "dense_bias|last layer",
    "Gemma4ForCausalLM": "embed_tokens_per_layer",
    "Gemma3ForConditionalGeneration": PARTS,
    "Gemma3nForCausalLM": "num_kv_shared_layers|embed_tokens_per_layer",
    "Gemma4AssistantForCausalLM": f"{PARTS}|num_kv_shared_layers",
    "Gemma4ForConditionalGeneration": PARTS,
    "Gemma4UnifiedAssistantForCausalLM": f"{PARTS}|num_kv_shared_layers",
    "Gemma4UnifiedForConditionalGeneration": PARTS,
    "GitForCausalLM": PARTS,
    "GotOcr2ForConditionalGeneration": PARTS,
    "HrmTextForCausalLM": "[HL]_module|[HL]_cycles",
    "Inkling2ForCausalLM": "n_layers_per_attn_res_block",
    "Inkling2LoopForCausalLM": "n_layers_per_attn_res_block|loop_layer_index",
    "JambaForCausalLM": "(attn|expert)_layer_(period|offset)",
    "MossTranscribeDiarizeForConditionalGeneration": PARTS,
    "Phi4MultimodalForCausalLM": PARTS,
    "Qwen4ExpForCausalLM": "ngram_embedding.weight of shape",  # whose size hangs on the number
    "XLMWithLMHeadModel": "transformer.attentions",
    "Zamba2ForCausalLM": "shared_transformer",
    "ZambaForCausalLM": "shared_transf",
}

# What no refusal may be: a list of tensors that transformers could not place.
SYMPTOMS = "misses|has no place for|cannot be built from"

# Decoders that do not run on tokens alone: they read the keys and values of another model.
NOT_RUN = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a maker of tiny checkpoints: made("LlamaForCausalLM", 1). Each is made once."""
    folders: dict[tuple[str, int], Path] = {}

    def maker(name: str, seed: int) -> Path:
        if (name, seed) not in folders:
            folders[name, seed] = tmp_path_factory.mktemp(name) / str(seed)
            build(name, seed).save_pretrained(folders[name, seed])
        return folders[name, seed]

    return maker


# -------------------------------------------------------------------- merges


def assert_rounded(result: Tensor, oracle: Tensor, largest: Tensor, where: Tensor | None) -> None:
    """Fail unless the result is within 0.51 units in the last place of the oracle.

    `largest` are the magnitudes that float32 arithmetic dealt with; only entries `where` count.
    """
    eps = torch.finfo(result.dtype).eps
    unit = eps * 2.0 ** oracle.abs().clamp_min(1e-30).log2().floor()
    wrong = (result.double() - oracle).abs() > 0.51 * unit + 2e-7 * largest
    if where is not None:
        wrong &= where
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} entries differ"


def linear_oracle(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)


def ties_oracle(
    base: Tensor, tensors: list[Tensor], weights: list[float], density: float
) -> tuple[Tensor, Tensor]:
    """Return the merge in float64, and where it does not hang on a comparison of near equals."""
    votes, clear = [], torch.ones_like(base, dtype=torch.bool)
    for tensor, weight in zip(tensors, weights, strict=True):
        delta = tensor - base
        k = max(1, int(density * delta.numel()))
        threshold = delta.abs().flatten().sort(descending=True).values[k - 1]
        clear &= ((delta.abs() - threshold).abs() > 1e-6 * threshold) | (delta.abs() == threshold)
        votes.append(weight * torch.where(delta.abs() >= threshold, delta, 0.0))
    total = sum(votes)
    clear &= (total.abs() > 1e-6 * sum(v.abs() for v in votes)) | (total == 0)
    elected = torch.where(total >= 0, 1.0, -1.0)
    agreeing = [v * elected > 0 for v in votes]
    merged = sum(torch.where(a, v, 0.0) for a, v in zip(agreeing, votes, strict=True))
    counted = sum(w * a.double() for w, a in zip(weights, agreeing, strict=True))
    return base + merged / torch.where(counted == 0, 1.0, counted), clear


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("name", [*CHOSEN, *OTHERS])
def test_merge(name: str, method: str, made: Made, tmp_path: Path) -> None:
    base, a, b = (made(name, seed) for seed in range(3))
    weights, density, output = [0.75, 0.5], 0.4, tmp_path / "merged"
    arguments = [str(output), "--method", method, "--base-model", str(base)]
    for folder, weight in zip((a, b), weights, strict=True):
        arguments += ["--merge", str(folder), "--weight", str(weight)]
    if method == "ties":
        arguments += ["--density", str(density)]
    assert main.main(arguments) == 0

    merged, of_base, *of_models = (stored(folder) for folder in (output, base, a, b))
    assert merged.keys() == of_base.keys()
    for tensor, result in merged.items():
        origin = of_base[tensor]
        assert result.dtype == origin.dtype
        if not origin.is_floating_point() or not origin.numel():
            assert torch.equal(result, origin), tensor
            continue
        tensors = [of_model[tensor].double() for of_model in of_models]
        largest = sum(t.abs() for t in (origin.double(), *tensors))
        if method == "linear":
            assert_rounded(result, linear_oracle(tensors, weights), largest, None)
        else:
            oracle, clear = ties_oracle(origin.double(), tensors, weights, density)
            assert_rounded(result, oracle, largest, clear)
    assert loaded(name, output)[1] == loaded(name, base)[1]


# -------------------------------------------------------------------- stacks


def layer_lists(stacked: nn.Module, source: nn.Module) -> list[str]:
    """Return the names of the lists of modules that a stack has made longer."""
    of_source = dict(source.named_modules())
    return [
        name
        for name, module in stacked.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == len(STACK)
        and len(of_source[name]) == LAYERS
    ]


def kinds(module: nn.Module) -> dict[str, Any]:
    """Return what each module in a layer is and is set to, but for the layer's own number."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found[name] = type(part).__name__
        for key, value in vars(part).items():
            if isinstance(value, bool | int | float | str) and not re.search(
                r"idx|index|layer_id|layer_number|num_hidden_layers|^_|^training$|^store_full_length",
                key,
            ):
                found[f"{name}.{key}"] = value
    return found


def places(model: nn.Module, lists: list[str], inputs: dict[str, Any]) -> dict[str, int]:
    """Run a model; tell which modules run before the first layer (0) and after the last (1)."""
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    for hook in hooks:
        hook.remove()
    layers = [n for n, name in enumerate(order) if name.startswith(tuple(f"{p}." for p in lists))]
    before, after = set(order[: layers[0]]), set(order[layers[-1] :])
    inside = {order[n] for n in range(layers[0], layers[-1])}
    return {n: 0 for n in before - after - inside} | {n: 1 for n in after - before - inside}


def assert_layers(stacked: nn.Module, sources: list[nn.Module], lists: list[str]) -> set[str]:
    """Fail unless each layer holds its source's tensors; return what else differs."""
    different: set[str] = set()
    for prefix in lists:
        for number, (model, layer) in enumerate(STACK):
            result = stacked.get_submodule(prefix)[number]
            source = sources[model].get_submodule(prefix)[layer]
            wanted = source.state_dict()
            assert result.state_dict().keys() == wanted.keys(), f"{prefix}.{number}"
            for tensor, value in result.state_dict().items():
                assert torch.equal(value, wanted[tensor]), f"{prefix}.{number}.{tensor}"
            found, expected = kinds(result), kinds(source)
            different |= {
                f"{key}={found.get(key)!r}, in the source {expected.get(key)!r}"
                for key in found.keys() | expected.keys()
                if found.get(key) != expected.get(key)
            }
    return different


def packed(value: Tensor, sources: list[Tensor]) -> bool:
    """Whether a tensor has one block of each layer, and they are those of the chosen layers."""
    dim = next(d for d, size in enumerate(value.shape) if size != sources[0].shape[d])
    assert value.shape[dim] * LAYERS == sources[0].shape[dim] * len(STACK)
    blocks = [source.chunk(LAYERS, dim) for source in sources]
    return torch.equal(value, torch.cat([blocks[model][layer] for model, layer in STACK], dim))


def assert_others(
    stacked: nn.Module, sources: list[nn.Module], lists: list[str], place: dict[str, int]
) -> None:
    """Fail unless the tensors outside the layers come from the right models."""
    states = [source.state_dict() for source in sources]
    tied = set(getattr(stacked, "all_tied_weights_keys", None) or {})
    for name, value in stacked.state_dict().items():
        if name.startswith(tuple(f"{prefix}." for prefix in lists)):
            continue
        of_sources = [state[name] for state in states]
        if value.shape != of_sources[0].shape:
            assert packed(value, of_sources), name
            continue
        equal = [torch.equal(value, of_source) for of_source in of_sources]
        module = name.rpartition(".")[0]
        if module in place and name not in tied:
            assert equal[place[module]], f"{name} comes from model {equal.index(True)}"
        else:
            assert any(equal), name


def assert_config(stacked: tf.PretrainedConfig, sources: list[tf.PretrainedConfig]) -> None:
    """Fail unless all that a config says of each layer follows the chosen layers."""
    texts = [config.get_text_config(decoder=True) for config in (stacked, *sources)]
    result, parts = texts[0], texts[1:]
    depth = "num_decoder_layers" if hasattr(result, "num_decoder_layers") else "num_hidden_layers"
    before, after = getattr(parts[0], depth), getattr(result, depth)
    assert after * LAYERS == before * len(STACK)  # LongcatFlash has two of its layers in each
    for key, value in parts[0].to_dict().items():
        kind = isinstance(value, list) and len(value) == LAYERS and isinstance(value[0], str)
        if kind or key in ("no_rope_layers", "num_attention_heads_per_layer", "layer_rope_theta"):
            assert result.to_dict()[key] == [parts[m].to_dict()[key][i] for m, i in STACK], key
    overrides = parts[0].to_dict().get("per_layer_config") or {}
    for key in {key for values in overrides.values() for key in values}:
        found = [getattr(layer, key) for layer in result.per_layer_config]
        assert found == [getattr(parts[m].per_layer_config[i], key) for m, i in STACK], key


@pytest.mark.parametrize("name", CHOSEN)
def test_stack(
    name: str,
    made: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    folders, output = [made(name, seed) for seed in range(2)], tmp_path / "stacked"
    recipe = tmp_path / "stack.yml"
    recipe.write_text(f"""
layer_slices:
  - {{model: {folders[0]}, start: 0, end: 4}}
  - {{model: {folders[1]}, start: 1, end: 4}}
""")
    capsys.readouterr()
    status = bakllama.main([str(recipe), str(output)])
    said = capsys.readouterr().err
    if status != 0:
        record_property("refused", said)
        assert status == 2
        assert not output.exists()
        problem = said.partition("error:")[2]
        assert name in REFUSED, problem
        assert re.search(REFUSED[name], problem), problem
        assert not re.search(SYMPTOMS, problem), problem
        return

    model, report = loaded(name, output)
    sources, reports = zip(*(loaded(name, folder) for folder in folders), strict=True)
    assert report == reports[0]
    lists = layer_lists(model, sources[0])
    assert lists, "no list of modules has become longer"
    different = assert_layers(model, list(sources), lists)
    place = {} if name in NOT_RUN else places(model, lists, runs_on(model))
    assert_others(model, list(sources), lists, place)
    assert_config(model.config, [source.config for source in sources])
    if different:
        record_property("different", sorted(different))
        assert "differently" in said, different


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DiffLlamaForCausalLM", {}),  # lambda_init is a function of the layer's number
        ("MiniCPM3ForCausalLM", {}),  # residuals are scaled by the depth
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_stack_that_computes_differently(
    name: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe = tmp_path / "model", tmp_path / "stack.yml"
    build(name, **changes).save_pretrained(folder)
    recipe.write_text(f"layer_slices: [{{model: {folder}, start: 1, end: 4}}]\n")
    assert bakllama.main([str(recipe), str(tmp_path / "stacked")]) == 0
    assert "differently" in capsys.readouterr().err


def test_stack_that_computes_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, recipe = tmp_path / "model", tmp_path / "stack.yml"
    build("GPT2LMHeadModel").save_pretrained(folder)
    recipe.write_text(f"layer_slices: [{{model: {folder}, start: 1, end: 4}}]\n")
    assert bakllama.main([str(recipe), str(tmp_path / "stacked")]) == 0
    assert "differently" not in capsys.readouterr().err


def write_stack(folder: Path, *slices: tuple[Path, int, int]) -> str:
    entries = [f"{{model: {model}, start: {start}, end: {end}}}" for model, start, end in slices]
    (folder / "stack.yml").write_text(f"layer_slices: [{', '.join(entries)}]\n")
    return str(folder / "stack.yml")


def test_a_cycle_of_kinds_is_written_in_full(made: Made, tmp_path: Path) -> None:
    a, b = (made("RecurrentGemmaForCausalLM", seed) for seed in range(2))
    recipe = write_stack(tmp_path, (a, 0, 3), (b, 1, 4))
    assert bakllama.main([recipe, str(tmp_path / "out")]) == 0
    model, _ = loaded("RecurrentGemmaForCausalLM", tmp_path / "out")
    kinds_of = tf.AutoConfig.from_pretrained(a).layers_block_type
    expected = [kinds_of[i] for i in (0, 1, 2, 1, 2, 3)]
    assert list(model.config.layers_block_type) == expected


@pytest.mark.parametrize(
    ("name", "key", "length"),
    [
        ("FalconH1ForCausalLM", "ssm_multipliers", 5),
        ("FalconH1ForCausalLM", "mlp_multipliers", 2),
        ("Mamba2ForCausalLM", "time_step_limit", 2),
    ],
)
def test_a_list_that_is_as_long_as_the_depth_by_chance(
    name: str, key: str, length: int, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model = build(name, num_hidden_layers=length)
    values = list(getattr(model.config, key))
    assert len(values) == length
    model.save_pretrained(folder)
    recipe = write_stack(tmp_path, (folder, 0, 2), (folder, 1, 2))
    assert bakllama.main([recipe, str(tmp_path / "out")]) == 0
    config = loaded(name, tmp_path / "out")[0].config
    assert (list(getattr(config, key)), config.num_hidden_layers) == (values, 3)


def test_a_config_whose_file_counts_otherwise(made: Made, tmp_path: Path) -> None:
    """Dory's counts attention and feed-forward blocks, two a layer, of three kinds of layers."""
    a, b = (made("DoryForCausalLM", seed) for seed in range(2))
    recipe = write_stack(tmp_path, (a, 0, 3), (b, 1, 4))
    assert bakllama.main([recipe, str(tmp_path / "out")]) == 0
    model, report = loaded("DoryForCausalLM", tmp_path / "out")
    assert report == loaded("DoryForCausalLM", a)[1]
    config = model.config
    assert [config.n_input_layers, config.n_recurrent_layers, config.n_output_layers] == [1, 4, 1]
    kinds_of = tf.AutoConfig.from_pretrained(a).layer_types
    assert config.layer_types == [kinds_of[i] for i in (0, 1, 2, 1, 2, 3)]
    assert torch.isfinite(model(**runs_on(model)).logits).all()


def test_layers_of_another_model_type_are_called_so(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen, llama = made("Qwen2ForCausalLM", 0), made("LlamaForCausalLM", 0)
    recipe = write_stack(tmp_path, (qwen, 0, 2), (llama, 0, 2))
    assert bakllama.main([recipe, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{llama}: a llama model, whose layers lack self_attn.k_proj.bias" in said
    assert f"{qwen} is a qwen2 model" in said


def test_positions_are_those_of_the_embedding(tmp_path: Path) -> None:
    build("GPT2LMHeadModel", 0).save_pretrained(tmp_path / "short")
    build("GPT2LMHeadModel", 1, n_positions=80).save_pretrained(tmp_path / "long")
    recipe = write_stack(tmp_path, (tmp_path / "short", 0, 2))
    with open(recipe, "a") as file:
        file.write(f"embedding_source: {tmp_path / 'long'}\n")
    assert bakllama.main([recipe, str(tmp_path / "out")]) == 0
    model, _ = loaded("GPT2LMHeadModel", tmp_path / "out")
    assert model.config.n_positions == 80
    assert torch.equal(
        model.transformer.wpe.weight, stored(tmp_path / "long")["transformer.wpe.weight"]
    )


def test_a_stack_that_loads_but_cannot_compute_is_refused(made: Made) -> None:
    from merging.models.trial import tried
    from merging.plans.same_layers import running_problems

    source, output = (build("LlamaForCausalLM", seed).to("meta") for seed in range(2))
    ways = tried(source).ways
    assert len(ways) == 2
    assert running_problems(output, ways) == ([], [])
    del output.model.layers[1].mlp
    problems, _ = running_problems(output, ways)
    assert len(problems) == 1 and "cannot compute: AttributeError" in problems[0]


def test_a_stack_that_cannot_generate_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache takes its length from an attention layer, of which this stack has none."""
    recipe = write_stack(tmp_path, (made("BambaForCausalLM", 0), 0, 1))
    assert bakllama.main([recipe, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "cannot compute with a cache, as to generate text: " in said


def test_single_layers_are_compared_with_the_donors(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, changes in enumerate(({}, {"rms_norm_eps": 0.125})):
        model = build("Gemma4UnifiedForCausalLM", seed, **changes)
        model.save_pretrained(tmp_path / str(seed))
    arguments = ["--base-model", str(tmp_path / "0"), "--merge", str(tmp_path / "1"), "--dry-run"]
    assert main.main([str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().err
    assert "rms_norm_eps is 0.125" in said and "per_layer_config" not in said
