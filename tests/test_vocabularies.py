"""Vocabularies that differ: rows are merged by token, whatever their numbers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as tf
from helpers import (
    Make,
    fails,
    loads_clean,
    make_other,
    rewrite,
    stack_file,
    stored,
    word_level,
)
from oracles import linear_oracle, slerp_oracle, ties_oracle, ulps
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

import bakllama
import main
from merging.models import tokens as tokens_of_models
from merging.models import vocabularies
from merging.models.tokens import read_tokens

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


METHODS = {
    "ties": ["--density", "0.4"],
    "linear": ["--method", "linear", "--weight", "0.5"],
    "slerp": ["--method", "slerp", "--weight", "0.3"],
}


def byte_level(tokens: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(tokens: Sequence[str]) -> Tokenizer:
    """A unigram model with the ▁ of SentencePiece."""
    scores = [(token, -float(i)) for i, token in enumerate(tokens)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


KINDS = {"words": word_level, "bytes": byte_level, "sentencepiece": sentencepiece}


TOKENS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(90))]  # 93, padded to 96 rows


def model(
    make: Make,
    folder: Path,
    seed: int,
    tokens: Sequence[str],
    rows: int | None = None,
    *,
    kind: str = "words",
    tied: bool = False,
    added: Sequence[str] = (),
) -> Path:
    """Make a tiny Llama with a tokenizer of these tokens, and embedding rows of its own."""
    rows = rows or len(tokens) + len(added)
    shutil.copytree(make("llama-tied" if tied else "llama", seed, vocab_size=rows), folder)
    tokenizer = KINDS[kind](tokens)
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def expected_rows(
    donor: dict[str, Tensor],
    other: dict[str, Tensor],
    name: str,
    donor_tokens: Sequence[str],
    tokens: Sequence[str],
) -> Tensor:
    """Gather a model's rows for the donor's tokens, one by one."""

    def tensor(values: dict[str, Tensor]) -> Tensor:
        return values[name if name in values else EMBEDDING]

    rows = tensor(donor).clone()
    for i in range(len(rows)):
        if i < len(donor_tokens):
            if donor_tokens[i] in tokens:
                rows[i] = tensor(other)[list(tokens).index(donor_tokens[i])]
        elif len(tokens) <= i < len(tensor(other)):
            rows[i] = tensor(other)[i]
    return rows


def merged_oracle(method: str, donor: Tensor, other: Tensor) -> Tensor:
    if method == "ties":
        return ties_oracle(donor, [other], [1], [0.4], True, False)
    if method == "slerp":
        return slerp_oracle(donor, other, 0.3)
    return linear_oracle([donor, other], [0.5, 0.5], True)


def merge(method: str, output: Path, donor: Path, other: Path) -> int:
    given = ["--merge", str(donor)] if method == "linear" else ["--base-model", str(donor)]
    return main.main([str(output), *given, "--merge", str(other), *METHODS[method]])


OTHERS = {  # tokens, added special tokens, rows
    "permuted": ([*TOKENS[:3], *reversed(TOKENS[3:])], [], 96),
    "more": ([*TOKENS, *(f"new{i}" for i in range(7))], [], 100),
    "fewer": (TOKENS[:80], [], 80),
    "added special tokens": (TOKENS, ["<|im_start|>", "<|im_end|>"], 95),
    "padded": (TOKENS, [], 128),
    "trimmed": (TOKENS, [], 93),
    "some of each": ([*TOKENS[40:], "other", *TOKENS[:30]], ["<|tool|>"], 90),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", OTHERS)
def test_rows_are_merged_by_token(
    case: str, method: str, tied: bool, make: Make, tmp_path: Path, output: Path
) -> None:
    tokens, added, rows = OTHERS[case]
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96, tied=tied)
    other = model(make, tmp_path / "other", 1, tokens, rows, tied=tied, added=added)
    assert merge(method, output, donor, other) == 0
    result, of_donor, of_other = stored(output), stored(donor), stored(other)
    assert result.keys() == of_donor.keys()
    for name in (EMBEDDING, HEAD)[: 1 if tied else 2]:
        rows_of_other = expected_rows(of_donor, of_other, name, TOKENS, [*tokens, *added])
        oracle = merged_oracle(method, of_donor[name], rows_of_other)
        assert result[name].shape == (96, 32)
        if method == "ties":
            torch.testing.assert_close(result[name].double(), oracle, rtol=2**-8, atol=1e-7)
        else:
            assert ulps(result[name], oracle).max() <= 0.51
    config = json.loads((output / "config.json").read_text())
    assert config["vocab_size"] == 96
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / file).read_bytes() == (donor / file).read_bytes()
    loads_clean(output)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tokenizers(kind: str, make: Make, tmp_path: Path, output: Path) -> None:
    tokens = ["<unk>", *"abcdefgh", "Ġthe", "Ċ", "▁the", "<0x0A>", "é", "Ã©", "\u200b", " "]
    shuffled = [tokens[0], *reversed(tokens[1:])]
    donor = model(make, tmp_path / "donor", 0, tokens, 20, kind=kind)
    other = model(make, tmp_path / "other", 1, shuffled, 17, kind=kind)
    assert merge("linear", output, donor, other) == 0
    rows = expected_rows(stored(donor), stored(other), EMBEDDING, tokens, shuffled)
    oracle = linear_oracle([stored(donor)[EMBEDDING], rows], [0.5, 0.5], True)
    assert ulps(stored(output)[EMBEDDING], oracle).max() <= 0.51


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_merging_after_permuting_by_hand(
    method: str, make: Make, tmp_path: Path
) -> None:
    order = torch.randperm(93, generator=torch.Generator().manual_seed(7)).tolist()
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96)
    other = model(make, tmp_path / "other", 1, [TOKENS[i] for i in order], 96)
    by_hand = tmp_path / "by-hand"
    shutil.copytree(other, by_hand)
    shutil.copyfile(donor / "tokenizer.json", by_hand / "tokenizer.json")
    tensors = stored(other)
    for name in (EMBEDDING, HEAD):
        rows = tensors[name].clone()
        for position, token in enumerate(order):
            rows[token] = tensors[name][position]
        tensors[name] = rows
    save_file(tensors, by_hand / "model.safetensors", metadata={"format": "pt"})
    assert merge(method, tmp_path / "one", donor, other) == 0
    assert merge(method, tmp_path / "two", donor, by_hand) == 0
    tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "one")
    text = tokenizer("w5 w80 w3 </s> w44", return_tensors="pt")["input_ids"]
    assert len(set(text[0].tolist())) == 5
    logits = [loads_clean(tmp_path / name)(text).logits for name in ("one", "two")]
    assert torch.equal(logits[0], logits[1])


def test_tokens_that_only_some_models_have_are_reported(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96)
    other = model(make, tmp_path / "other", 1, [*TOKENS[:90], "new"], 91)
    assert merge("ties", output, donor, other) == 0
    text = capsys.readouterr().err
    assert "vocabulary: 96 rows, 90 shared by all models; 6 from fewer models ('w87', " in text
    assert f"1 tokens of {other} are dropped ('new')" in text


def test_a_row_that_is_taken_from_the_donor_is_the_donors(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault in it is not blamed on the model that lacks the token alone."""
    names = [f"w{i}" for i in range(96)]
    tensors = stored(make("llama", 0))
    tensors[HEAD][95] = torch.nan
    donor = rewrite(make("llama", 0), tmp_path / "donor", tensors)
    other = shutil.copytree(make("llama", 1), tmp_path / "other")
    word_level(names).save(str(donor / "tokenizer.json"))
    word_level([*names[:95], "other"]).save(str(other / "tokenizer.json"))
    merge = ["--method", "linear", "--merge", other, "--weight", "1", "--base-model", donor]
    text = fails(capsys, output, *merge)
    assert f"{other}: {HEAD} (with rows of {donor}: {HEAD}) contains NaN or infinity" in text


def test_without_tokenizers_equal_sizes_warn_and_others_are_refused(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge("linear", output, make("llama", 0), make("llama", 1)) == 0
    assert "no tokenizer in" in capsys.readouterr().err
    larger = model(make, tmp_path / "larger", 1, TOKENS, 100)
    (larger / "tokenizer.json").unlink()
    assert merge("linear", tmp_path / "two", make("llama", 0), larger) == 2
    assert "resize_token_embeddings" in capsys.readouterr().err


def test_a_tensor_of_vocabulary_size_by_coincidence_is_left_alone(
    make: Make, tmp_path: Path, output: Path
) -> None:
    """Here the hidden size is the number of rows too; only embedding and head are gathered."""
    tokens, shuffled = TOKENS[:32], [*TOKENS[:3], *reversed(TOKENS[3:32])]
    donor = model(make, tmp_path / "donor", 0, tokens)
    other = model(make, tmp_path / "other", 1, shuffled)
    assert merge("linear", output, donor, other) == 0
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", EMBEDDING):
        values = stored(other)[name]
        if name == EMBEDDING:
            values = expected_rows(stored(donor), stored(other), name, tokens, shuffled)
        oracle = linear_oracle([stored(donor)[name], values], [0.5, 0.5], True)
        assert ulps(stored(output)[name], oracle).max() <= 0.51


def test_a_stack_takes_the_head_by_the_embeddings_tokens(
    make: Make, tmp_path: Path, output: Path
) -> None:
    shuffled = [*TOKENS[:3], *reversed(TOKENS[3:90]), "new"]
    a = model(make, tmp_path / "a", 0, TOKENS, 96)
    b = model(make, tmp_path / "b", 1, shuffled, 91)
    config = tmp_path / "stack.yml"
    config.write_text(
        f"layer_slices: [{{model: {b}, start: 0, end: 1}}]\n"
        f"embedding_source: {a}\nlm_head_source: {b}\n"
    )
    assert bakllama.main([str(config), str(output)]) == 0
    result = stored(output)
    assert torch.equal(result[EMBEDDING], stored(a)[EMBEDDING])
    rows = expected_rows(stored(a), stored(b), HEAD, TOKENS, shuffled)
    assert torch.equal(result[HEAD], rows)
    assert (output / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    assert loads_clean(output).config.vocab_size == 96


def test_heads_tied_in_one_model_only(make: Make, tmp_path: Path, output: Path) -> None:
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96, tied=True)
    shuffled = [*TOKENS[:3], *reversed(TOKENS[3:])]
    other = model(make, tmp_path / "other", 1, shuffled, 93)
    assert merge("linear", output, donor, other) == 0
    for name in (EMBEDDING, HEAD):
        rows = expected_rows(stored(donor), stored(other), name, TOKENS, shuffled)
        oracle = linear_oracle([stored(donor)[EMBEDDING], rows], [0.5, 0.5], True)
        assert ulps(stored(output)[name], oracle).max() <= 0.51
    assert not loads_clean(output).config.tie_word_embeddings


@pytest.mark.parametrize("name", ["t5", "bert masked", "gemma3 vision", "qwen2-vl", "gemma3n"])
def test_vocabularies_of_other_classes(
    name: str, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A permuted copy of a model, merged with it by token, is that model."""
    of_donor = make_other(name, 1, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    order = [*range(3), *reversed(range(3, 96))]
    word_level([*TOKENS, "x", "y", "z"]).save(str(tmp_path / "a" / "tokenizer.json"))
    names = [*TOKENS, "x", "y", "z"]
    word_level([names[i] for i in order]).save(str(tmp_path / "b" / "tokenizer.json"))
    permuted = {
        tensor: value[order] if value.shape[0] == 96 else value
        for tensor, value in of_donor.items()
    }
    sized = {tensor for tensor, value in of_donor.items() if value.shape[0] == 96}
    assert sized
    save_file(permuted, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    assert merge("linear", output, tmp_path / "a", tmp_path / "b") == 0
    for tensor, value in stored(output).items():
        assert torch.equal(value, of_donor[tensor]), tensor
    assert "96 shared by all models" in capsys.readouterr().err


def test_special_tokens_named_in_the_configuration_alone(
    make: Make, tmp_path: Path, output: Path
) -> None:
    """transformers appends them in the order in which they are named."""
    folders = []
    for seed, (pad, mask) in enumerate((("[PAD]", "[MASK]"), ("[MASK]", "[PAD]"))):
        folder = model(make, tmp_path / str(seed), seed, TOKENS, 96)
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        text = json.dumps(named | {"additional_special_tokens": [pad, mask]})
        (folder / "tokenizer_config.json").write_text(text)
        folders.append(folder)
    donor, other = folders
    rows = [tf.AutoTokenizer.from_pretrained(f).get_vocab()["[PAD]"] for f in folders]
    assert rows == [93, 94]
    assert merge("linear", output, donor, other) == 0
    pair = [stored(donor)[EMBEDDING][93], stored(other)[EMBEDDING][94]]
    oracle = linear_oracle(pair, [0.5, 0.5], True)
    assert ulps(stored(output)[EMBEDDING][93], oracle).max() <= 0.51


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc of Linux")
def test_a_tokenizers_file_that_cannot_be_read_is_named(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(make("llama", 1), broken)
    (broken / "tokenizer_config.json").unlink()
    (broken / "tokenizer_config.json").symlink_to("/proc/self/mem")
    text = fails(capsys, output, "--base-model", make("llama", 0), "--merge", broken)
    assert f"{broken}: tokenizer_config.json: " in text


def test_a_broken_tokenizer_is_a_clear_error(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96)
    other = model(make, tmp_path / "other", 1, TOKENS, 96)
    broken = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}
    (other / "tokenizer.json").write_text(json.dumps(broken))
    assert merge("linear", output, donor, other) == 2
    assert f"{other}: its tokenizer cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "declared"),
    [
        ("added_tokens.json", {"<y>": 100, "<x>": 97}),  # with gaps
        ("tokenizer_config.json", {"added_tokens_decoder": {"99": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<x>", "<y>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<x>"}}),
        ("special_tokens_map.json", {"pad_token": "<y>", "additional_special_tokens": ["<x>"]}),
    ],
)
def test_ids_are_those_that_transformers_gives(
    file: str, declared: dict[str, object], make: Make, tmp_path: Path
) -> None:
    folder = model(make, tmp_path / "model", 0, TOKENS, 96)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / file).write_text(json.dumps(declared if "map" in file else named | declared))
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps(declared))
    expected = tf.AutoTokenizer.from_pretrained(folder).get_vocab()
    assert expected["<x>"] >= 93
    found = read_tokens(folder)
    assert found is not None and found.ids == expected


def test_files_that_are_the_same_need_no_reading(
    make: Make, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they need a model with a larger vocabulary to be built, unless sizes differ."""
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96)
    other = model(make, tmp_path / "other", 1, TOKENS, 96)
    larger = model(make, tmp_path / "larger", 1, TOKENS, 100)
    for folder in (donor, other, larger):
        (folder / "tokenizer.json").write_text("broken")
        (folder / "tokenizer_config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(vocabularies, "vocabulary_dims", lambda *_: pytest.fail("built"))
        assert merge("linear", output, donor, other) == 0
    assert merge("linear", tmp_path / "two", donor, larger) == 0
    oracle = linear_oracle(
        [stored(donor)[EMBEDDING], stored(larger)[EMBEDDING][:96]], [0.5, 0.5], True
    )
    assert ulps(stored(tmp_path / "two")[EMBEDDING], oracle).max() <= 0.51


def sentencepiece_model(folder: Path, words: Sequence[str]) -> None:
    """Leave a folder no tokenizer but a SentencePiece model of these words."""
    spm = pytest.importorskip("sentencepiece")
    (folder / "tokenizer.json").unlink()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(list(words) * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def test_a_sentencepiece_model_alone(make: Make, tmp_path: Path, output: Path) -> None:
    pytest.importorskip("google.protobuf")
    donor = model(make, tmp_path / "donor", 0, TOKENS[:30])
    other = model(make, tmp_path / "other", 1, TOKENS[:30])
    sentencepiece_model(donor, ["the cat sat", "on a mat", "with bread"])
    sentencepiece_model(other, ["some bread", "the cats in a", "white house"])
    names = [tf.AutoTokenizer.from_pretrained(f).get_vocab() for f in (donor, other)]
    orders = [sorted(found, key=found.__getitem__) for found in names]
    assert orders[0] != orders[1]
    assert merge("linear", output, donor, other) == 0
    rows = expected_rows(stored(donor), stored(other), EMBEDDING, *orders)
    oracle = linear_oracle([stored(donor)[EMBEDDING], rows], [0.5, 0.5], True)
    assert ulps(stored(output)[EMBEDDING], oracle).max() <= 0.51


def test_a_missing_library_is_named(
    make: Make,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [model(make, tmp_path / name, 0, TOKENS, 96) for name in ("donor", "other")]
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(folder.name.encode())
    monkeypatch.setattr(tokens_of_models, "LIBRARIES", ("no-such-library",))
    assert merge("linear", output, *folders) == 2
    assert "pip install no-such-library" in capsys.readouterr().err


def test_a_renamed_row_is_told(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor = model(make, tmp_path / "donor", 0, [*TOKENS, "<|im_start|>"], 96)
    other = model(make, tmp_path / "other", 1, [*TOKENS, "<|start|>", "only here"], 96)
    assert merge("linear", output, donor, other) == 0
    text = capsys.readouterr().err
    assert f"2 tokens of {other} are dropped ('<|start|>', 'only here')" in text
    assert "1 of these stand in rows that" in text
    assert "('<|start|>' as '<|im_start|>'); if they are one token renamed" in text


def headless(folder: Path) -> Path:
    """Take the head from a model's files."""
    tensors = {name: value for name, value in stored(folder).items() if name != HEAD}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rows", [96, 93])
def test_a_stack_whose_embedding_source_has_no_head(
    rows: int, make: Make, tmp_path: Path, output: Path
) -> None:
    shuffled = [*TOKENS[:3], *reversed(TOKENS[3:])]
    a = headless(model(make, tmp_path / "a", 0, TOKENS, rows))
    b = model(make, tmp_path / "b", 1, shuffled, 96)
    text = f"layer_slices: [{{model: {b}, start: 0, end: 1}}]\n"
    text += f"embedding_source: {a}\nlm_head_source: {b}\n"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 0
    order = [shuffled.index(token) for token in TOKENS] + list(range(93, rows))
    assert torch.equal(stored(output)[HEAD], stored(b)[HEAD][order])
    assert torch.equal(stored(output)[EMBEDDING], stored(a)[EMBEDDING])
    assert loads_clean(output).config.vocab_size == rows


def test_a_stack_whose_head_lacks_rows_is_refused(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = headless(model(make, tmp_path / "a", 0, TOKENS, 93))
    b = model(make, tmp_path / "b", 1, TOKENS[:90], 90)
    text = f"layer_slices: [{{model: {b}, start: 0, end: 1}}]\n"
    text += f"embedding_source: {a}\nlm_head_source: {b}\n"
    assert bakllama.main([stack_file(tmp_path, text), str(output)]) == 2
    assert f"{HEAD} lacks 3 of the 93 rows" in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False])
def test_an_embedding_that_is_no_matrix_is_refused(
    same: bool, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor = model(make, tmp_path / "donor", 0, TOKENS, 96)
    other = model(make, tmp_path / "other", 1, TOKENS if same else TOKENS[::-1], 96)
    tensors = stored(other) | {EMBEDDING: torch.tensor(1.0, dtype=torch.bfloat16)}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert merge("linear", output, donor, other) == 2
    text = capsys.readouterr().err
    assert f"{other}: not of the donor's shapes are {EMBEDDING} (), not (96, 32)" in text
