"""Rows follow their tokens in every family of models that has tokens, wherever it has them.

ALL_TESTS=1 python -m pytest tests/test_vocabulary_families.py

Without the variable, one family of each kind is tried.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from every_class import VOCABULARY, build, randomised, stored, tiny_config, tokenizer
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

import main

_SHORT = {"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3)}

# Families of models with tokens that are no plain decoders, and what makes their configs small.
FAMILIES: dict[str, dict[str, Any]] = {
    "AltCLIPModel": {},
    "BartForConditionalGeneration": {},
    "BertForMaskedLM": {},
    "BlenderbotForConditionalGeneration": {},
    "BlipModel": {},
    "CLIPModel": {},
    "CLIPSegModel": {},
    "ElectraForMaskedLM": {},
    "FSMTForConditionalGeneration": {},
    "HubertForCTC": _SHORT,
    "Inkling2ForCausalLM": {},
    "LlavaForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "MBartForConditionalGeneration": {},
    "MarianMTModel": {},
    "MoonshineForConditionalGeneration": {},
    "MusicgenForConditionalGeneration": {
        "audio_encoder": {"num_filters": 4, "num_lstm_layers": 1, "codebook_size": 64},
        "decoder": {"vocab_size": 61},
    },
    "Owlv2Model": {},
    "ParakeetForCTC": {},
    "PegasusForConditionalGeneration": {},
    "ProphetNetForConditionalGeneration": {},
    "SEWForCTC": _SHORT,
    "SeamlessM4TForSpeechToText": {},
    "SeamlessM4TForTextToText": {},
    "SeamlessM4Tv2ForTextToText": {},
    "SiglipModel": {},
    "Speech2TextForConditionalGeneration": {},
    "T5ForConditionalGeneration": {},
    "T5GemmaForConditionalGeneration": {},
    "T5Gemma2ForConditionalGeneration": {},
    "UniSpeechForCTC": _SHORT,
    "Wav2Vec2BertForCTC": {"vocab_size": VOCABULARY},
    "Wav2Vec2ConformerForCTC": _SHORT | {"vocab_size": VOCABULARY},
    "Wav2Vec2ForCTC": _SHORT,
    "WavLMForCTC": _SHORT,
    "WhisperForConditionalGeneration": {},
}

SAMPLE = """BartForConditionalGeneration CLIPModel MarianMTModel
    ProphetNetForConditionalGeneration SeamlessM4TForTextToText T5GemmaForConditionalGeneration
    Wav2Vec2ForCTC""".split()
CHOSEN = FAMILIES if os.environ.get("ALL_TESTS") else SAMPLE


def permuted(tensors: dict[str, Tensor], rows: dict[int, Tensor]) -> dict[str, Tensor]:
    """Move the rows of every tensor with one entry a token: row i goes to rows[size][i].

    The sizes of vocabularies are numbers that no other dimension has.
    """

    def moved(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size in rows:
                return torch.empty_like(tensor).index_copy_(dim, rows[size], tensor)
        return tensor

    return {name: moved(tensor) for name, tensor in tensors.items()}


def shuffled(size: int, seed: int = 0) -> Tensor:
    """Return new ids of tokens, all different, those of the special ones as they were."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.arange(4), 4 + torch.randperm(size - 4, generator=generator)])


def assert_given_back(folder: Path, rows: dict[int, Tensor]) -> None:
    """Fail unless a merge that takes all from a copy with permuted rows gives back the original.

    `folder` has the `original` and the `copy`, each with its own tokenizer.
    """
    original, copy = stored(folder / "original"), folder / "copy"
    tensors = permuted(original, rows)
    assert any(not torch.equal(tensors[name], value) for name, value in original.items())
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    arguments = [str(folder / "merged"), "--base-model", str(folder / "original")]
    arguments += ["--method", "linear", "--merge", str(copy), "--weight", "1"]
    assert main.main(arguments) == 0
    merged = stored(folder / "merged")
    assert merged.keys() == original.keys()
    wrong = [name for name, value in original.items() if not torch.equal(merged[name], value)]
    assert wrong == [], "these have other tokens' rows"


def save_twice(model: tf.PreTrainedModel, folder: Path) -> None:
    """Save a model as `original` and as `copy`, whose tensors are to be replaced."""
    model.save_pretrained(folder / "original")
    shutil.copytree(folder / "original", folder / "copy")


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_follow_tokens(name: str, tmp_path: Path) -> None:
    save_twice(build(name, **FAMILIES[name]), tmp_path)
    ids = shuffled(VOCABULARY)
    tokenizer(range(VOCABULARY)).save(str(tmp_path / "original" / "tokenizer.json"))
    tokenizer(ids.tolist()).save(str(tmp_path / "copy" / "tokenizer.json"))
    assert_given_back(tmp_path, {VOCABULARY: ids})


def test_rows_of_both_halves(tmp_path: Path) -> None:
    """An EncoderDecoderModel has two embeddings, and two configs that say how large they are."""
    halves = [tiny_config(tf.BertConfig), tiny_config(tf.BertConfig, is_decoder=True)]
    halves[1].add_cross_attention = True
    config = tf.EncoderDecoderConfig(encoder=halves[0].to_dict(), decoder=halves[1].to_dict())
    save_twice(randomised(tf.EncoderDecoderModel(config)), tmp_path)
    ids = shuffled(VOCABULARY)
    tokenizer(range(VOCABULARY)).save(str(tmp_path / "original" / "tokenizer.json"))
    tokenizer(ids.tolist()).save(str(tmp_path / "copy" / "tokenizer.json"))
    assert_given_back(tmp_path, {VOCABULARY: ids})


def test_rows_of_source_and_target(tmp_path: Path) -> None:
    """FSMT has a vocabulary for each language, in files and of a size of its own."""
    sizes = {"src": VOCABULARY, "tgt": VOCABULARY - 8}
    changes = {f"{side}_vocab_size": size for side, size in sizes.items()}
    save_twice(build("FSMTForConditionalGeneration", langs=["en", "de"], **changes), tmp_path)
    rows = {size: shuffled(size) for size in sizes.values()}
    settings = {"langs": ["en", "de"], "tokenizer_class": "FSMTTokenizer", "do_lower_case": False}
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    for folder in (tmp_path / "original", tmp_path / "copy"):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        for side, size in sizes.items():
            tokens = special + [f"{side}{n}</w>" for n in range(size - len(special))]
            ids = range(size) if folder.name == "original" else rows[size].tolist()
            vocabulary = dict(zip(tokens, ids, strict=True))
            (folder / f"vocab-{side}.json").write_text(json.dumps(vocabulary))
    assert_given_back(tmp_path, rows)


def write_tokens(folder: Path, tokens: list[str], ids: list[int], **settings: str) -> None:
    """Write the files of a tokenizer that has a vocab.json and no tokenizer.json."""
    vocabulary = dict(zip(tokens, ids, strict=True))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))


def test_rows_of_speech_by_the_files_of_its_tokenizer(tmp_path: Path) -> None:
    save_twice(build("Wav2Vec2ForCTC", **_SHORT), tmp_path)
    ids = shuffled(VOCABULARY)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *map(chr, range(0x4E00, 0x4E00 + 92))]
    for name, order in (("original", range(VOCABULARY)), ("copy", ids.tolist())):
        settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": "|"}
        write_tokens(tmp_path / name, tokens, list(order), **settings)
    assert_given_back(tmp_path, {VOCABULARY: ids})


def test_rows_of_a_translation_by_the_files_of_its_tokenizer(tmp_path: Path) -> None:
    """Marian has two models of pieces, and one vocabulary that numbers those of both."""
    (tmp_path / "text").write_text("\n".join(f"words{n % 37} and some thing" for n in range(300)))
    options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "pieces"), **options
    )
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    own = [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]
    tokens = ["</s>", "<unk>", *own]
    tokens += [*(f"▁x{n}" for n in range(VOCABULARY - 1 - len(tokens))), "<pad>"]
    last = VOCABULARY - 1
    changes = {"pad_token_id": last, "decoder_start_token_id": last, "eos_token_id": 0}
    save_twice(build("MarianMTModel", **changes), tmp_path)
    ids = torch.cat([shuffled(last), torch.tensor([last])])
    for name, order in (("original", range(VOCABULARY)), ("copy", ids.tolist())):
        for side in ("source.spm", "target.spm"):
            shutil.copy(tmp_path / "pieces.model", tmp_path / name / side)
        write_tokens(tmp_path / name, tokens, list(order), tokenizer_class="MarianTokenizer")
    assert_given_back(tmp_path, {VOCABULARY: ids})


def test_codes_of_sound_match_by_number_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "MusicgenForConditionalGeneration"
    save_twice(build(name, **FAMILIES[name]), tmp_path)
    ids = shuffled(VOCABULARY)
    tokenizer(range(VOCABULARY)).save(str(tmp_path / "original" / "tokenizer.json"))
    tokenizer(ids.tolist()).save(str(tmp_path / "copy" / "tokenizer.json"))
    assert_given_back(tmp_path, {VOCABULARY: ids})
    assert "rows of decoder.vocab_size are no tokens" in capsys.readouterr().err


def test_one_tokenizer_for_vocabularies_of_two_sizes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = [tiny_config(tf.BertConfig), tiny_config(tf.BertConfig, is_decoder=True)]
    halves[1].add_cross_attention, halves[1].vocab_size = True, 113
    config = tf.EncoderDecoderConfig(encoder=halves[0].to_dict(), decoder=halves[1].to_dict())
    save_twice(randomised(tf.EncoderDecoderModel(config)), tmp_path)
    models = [str(tmp_path / name) for name in ("original", "copy")]
    merge = ["--method", "linear", "--weight", "1", "--merge", models[0], "--merge", models[1]]
    for folder, ids in zip(models, (range(VOCABULARY), shuffled(VOCABULARY).tolist()), strict=True):
        tokenizer(ids).save(f"{folder}/tokenizer.json")
    assert main.main([str(tmp_path / "merged"), *merge]) == 2
    said = capsys.readouterr().err
    assert "encoder.vocab_size 97, decoder.vocab_size 113" in said
    shutil.copy(f"{models[0]}/tokenizer.json", models[1])
    assert main.main([str(tmp_path / "merged"), *merge]) == 0


def test_rows_beyond_those_of_tokens_match_by_number(tmp_path: Path) -> None:
    """CpmAnt has those of its prompts in the same tensor."""
    model = build("CpmAntForCausalLM", prompt_length=4, prompt_types=3)
    save_twice(model, tmp_path)
    rows = VOCABULARY + 4 * 3
    ids = torch.cat([shuffled(VOCABULARY), torch.arange(VOCABULARY, rows)])
    tokenizer(range(VOCABULARY)).save(str(tmp_path / "original" / "tokenizer.json"))
    tokenizer(ids[:VOCABULARY].tolist()).save(str(tmp_path / "copy" / "tokenizer.json"))
    assert_given_back(tmp_path, {VOCABULARY: ids[:VOCABULARY], rows: ids})
