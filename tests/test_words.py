"""Whose words an output has: tokenizers chosen or united, chat templates, ends of turns."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import Make, fails, loads_clean, rewrite, stack_file, stored, word_level
from oracles import linear_oracle, slerp_oracle, ties_oracle, ulps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

import bakllama
import main
from merging.models.vocabulary_rows import own_weights
from merging.recipes.declarations import OPTIONAL, ORIGIN, Method
from merging.recipes.methods import METHODS
from merging.recipes.stack_files import read_stack
from merging.runs.merge import make as make_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHAT = [{"role": "user", "content": "The cat sat.\nDid it?"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = ["the cat sat on the mat", "a cat and a dog sat there", "On the mat 123 dogs, 456 cats!"]
TEXTS = [*LINES, "<|im_start|>user\nthe cat<|im_end|>\n", "x <|tool|> y", "été — ünïcode", "\n\n 7"]


# -------------------------------------------------------------------- makers


def llama_like() -> Tokenizer:
    """Byte-level BPE with merges, splits at a pattern, and reserved special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer)
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(3)]
    tokenizer.add_special_tokens(names)
    return tokenizer


def qwen_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|end_of_text|>"])
    return tokenizer


def _train_bpe(tokenizer: Tokenizer) -> None:
    from tokenizers.trainers import BpeTrainer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainer)


def unigram() -> Tokenizer:
    pieces = ["<unk>", "<s>", "<|end_of_text|>", "▁", "▁the", "▁cat", "▁sat", "▁on", "▁mat", "s"]
    pieces += sorted({*"".join(LINES), *"<|>_\n"} - {" "})
    scores = [(piece, -float(i + 1)) for i, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "<|end_of_text|>"])
    return tokenizer


KINDS = {"llama": llama_like, "qwen": qwen_like, "unigram": unigram}
END = "<|end_of_text|>"


def added(*tokens: str, special: bool = True) -> list[AddedToken]:
    return [AddedToken(token, special=special, normalized=False) for token in tokens]


def save_model(
    make: Make,
    folder: Path,
    seed: int,
    tokenizer: Tokenizer,
    *,
    rows: int | None = None,
    arch: str = "llama",
    eos: str = END,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Save a tiny model with random values and a tokenizer, as fine-tunes are published."""
    rows = rows or tokenizer.get_vocab_size()
    end = tokenizer.token_to_id(eos)
    ids = {"eos_token_id": end, "bos_token_id": None, "pad_token_id": None}
    shutil.copytree(make(arch, seed, dtype, vocab_size=rows, num_hidden_layers=2, **ids), folder)
    wrapped = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **settings)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    generation = {"eos_token_id": end, "temperature": 0.5 + seed / 10, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def family(make: Make, folder: Path, kind: str, **settings: Any) -> list[str]:
    """Save a base, a chat model with two tokens more, and another with one; of padded rows."""
    chat, tool = KINDS[kind](), KINDS[kind]()
    chat.add_tokens(added("<|im_start|>", "<|im_end|>"))
    tool.add_tokens(added("<|tool|>", special=False))
    size = KINDS[kind]().get_vocab_size()
    save_model(make, folder / "base", 0, KINDS[kind](), rows=size + 1, **settings)
    extra = {"eos": "<|im_end|>", "template": CHATML}
    save_model(make, folder / "chat", 1, chat, rows=size + 4, **extra, **settings)
    save_model(make, folder / "tool", 2, tool, rows=size + 3, **settings)
    return [str(folder / name) for name in ("base", "chat", "tool")]


# -------------------------------------------------------------------- oracle


def ids_of(folder: str | Path) -> dict[str, int]:
    return dict(tf.AutoTokenizer.from_pretrained(folder).get_vocab())


class Rows:
    """A model's rows by token, or by number where they have none."""

    def __init__(self, folder: str, name: str) -> None:
        tensors, self.ids = stored(Path(folder)), ids_of(folder)
        self.values = tensors[name if name in tensors else EMBEDDING]
        self.taken = {*self.ids.values()}

    def of(self, token: str | None, number: int) -> Tensor | None:
        place = number if token is None else self.ids.get(token, -1)
        is_other = token is None and place in self.taken
        return self.values[place] if 0 <= place < len(self.values) and not is_other else None


def expected(
    method: str, output: Path, names: Sequence[str], weights: Sequence[float], name: str
) -> tuple[Tensor, list[bool]]:
    """Compute all rows: those of the base by the method, the others one by one as a mean.

    And say which are which. Where the base has no row, no model changes anything.
    """
    token_of = {number: token for token, number in ids_of(output).items()}
    count = json.loads((output / "config.json").read_text())["vocab_size"]
    models = [Rows(folder, name) for folder in names]
    found = [[rows.of(token_of.get(i), i) for rows in models] for i in range(count)]
    zero = torch.zeros_like(models[0].values[0])
    shared = [
        [zero if base is None else base if row is None else row for row in (base, *others)]
        for base, *others in found
    ]
    base, *others = (torch.stack(rows) for rows in zip(*shared, strict=True))
    if method == "ties":
        result = ties_oracle(base, others, weights, [0.4] * len(others), True, False)
    elif method == "dare_ties":  # of density 1, which drops nothing
        result = ties_oracle(base, others, weights, [1.0] * len(others), False, False)
    elif method == "slerp":
        result = slerp_oracle(base, others[0], 0.3)
    else:
        result = linear_oracle([base, *others], [1, *weights], True)
    for i, (of_base, *of_others) in enumerate(found):
        pairs = [(r, w) for r, w in zip(of_others, weights, strict=True) if r is not None]
        if of_base is None and pairs:
            result[i] = linear_oracle(*zip(*pairs, strict=True), True)
    nobody = [i for i, rows in enumerate(found) if all(row is None for row in rows)]
    result[nobody] = result[[i for i in range(count) if i not in nobody]].mean(0)
    return result, [row[0] is not None for row in found]


def command(method: str, output: Path, names: Sequence[str]) -> list[str]:
    base, *others = names
    if method == "slerp":
        options = [
            "--method",
            "slerp",
            "--base-model",
            base,
            "--merge",
            others[0],
            "--weight",
            "0.3",
        ]
        return [str(output), *options]
    merges = [
        ["--merge", name, "--weight", str(w)] for name, w in zip(others, (1, 0.5), strict=False)
    ]
    if method in ("ties", "dare_ties"):
        density = "0.4" if method == "ties" else "1"
        start = ["--method", method, "--base-model", base, "--density", density]
    else:
        start = ["--method", method, "--merge", base, "--weight", "1"]
    return [str(output), *start, *(word for merge in merges for word in merge)]


# -------------------------------------------------------------------- rows


CASES = [
    *(
        (kind, method, False)
        for kind in KINDS
        for method in ("ties", "linear", "slerp", "dare_ties")
    ),
    *(("qwen", method, True) for method in ("ties", "linear")),
]


@pytest.mark.parametrize("choice", ["chat", "union"])
@pytest.mark.parametrize(("kind", "method", "tied"), CASES)
def test_every_row_of_a_choice(
    kind: str, method: str, tied: bool, choice: str, make: Make, tmp_path: Path, output: Path
) -> None:
    names = family(make, tmp_path, kind, arch="llama-tied" if tied else "llama")
    names = names[:2] if method == "slerp" else names
    chosen = names[1] if choice == "chat" else choice
    assert main.main([*command(method, output, names), "--tokenizer", chosen]) == 0
    model, tokenizer = loads_clean(output), tf.AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) <= model.config.vocab_size
    for name in (EMBEDDING, HEAD)[: 1 if tied else 2]:
        oracle, shared = expected(method, output, names, (1, 0.5)[: len(names) - 1], name)
        result = stored(output)[name]
        assert result.shape == oracle.shape and not all(shared)
        torch.testing.assert_close(result.double(), oracle, rtol=1e-5, atol=1e-7)
        apart = [i for i, is_shared in enumerate(shared) if not is_shared]
        assert ulps(result[apart], oracle[apart]).max() <= 0.51
    for token in ("<|im_start|>", "<|im_end|>", "<|tool|>"):
        owner = names[2 if token == "<|tool|>" else 1] if len(names) > 2 else names[1]
        if (place := ids_of(output).get(token)) is not None:  # exactly as its one model has it
            theirs = stored(Path(owner))[EMBEDDING][ids_of(owner)[token]]
            assert torch.equal(stored(output)[EMBEDDING][place], theirs)
    assert_talks_like(output, names[1], exactly=choice == "chat")


def assert_talks_like(output: Path, chat: str, exactly: bool) -> None:
    """Check that an output encodes, renders and ends a chat as the chat model does."""
    own, other = (tf.AutoTokenizer.from_pretrained(folder) for folder in (output, chat))
    asked = {"add_generation_prompt": True}
    rendered = [t.apply_chat_template(CHAT, tokenize=False, **asked) for t in (own, other)]
    assert rendered[0] == rendered[1]
    for text in [*TEXTS, rendered[0]]:
        pieces = [t.convert_ids_to_tokens(t(text)["input_ids"]) for t in (own, other)]
        if exactly or "<|tool|>" not in text:
            assert pieces[0] == pieces[1]
            assert own.decode(own(text)["input_ids"]) == other.decode(other(text)["input_ids"])
    model = tf.AutoModelForCausalLM.from_pretrained(output)
    end = own.convert_tokens_to_ids("<|im_end|>")

    def three_then_end(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, end if ids.shape[1] == start + 3 else 5] = 1e9
        return scores

    inputs = own.apply_chat_template(CHAT, return_tensors="pt", return_dict=True, **asked)
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        found = model.generate(**inputs, logits_processor=[three_then_end], max_new_tokens=9)
    assert found[0, start:].tolist() == [5, 5, 5, end]


def aligned_by_hand(folder: Path, names: Sequence[str], output: Path) -> list[str]:
    """Save the models with the output's tokenizer and rows; zeros where the first has none."""
    token_of = {number: token for token, number in ids_of(output).items()}
    config = json.loads((output / "config.json").read_text())
    made = []
    for number, name in enumerate(names):
        tensors = stored(Path(name))
        for key in (EMBEDDING, HEAD):
            pair = [Rows(names[0], key), Rows(name, key)]
            rows = []
            for i in range(config["vocab_size"]):
                base, own = (model.of(token_of.get(i), i) for model in pair)
                zero = torch.zeros(config["hidden_size"])
                rows.append(zero if base is None else base if own is None else own)
            tensors[key] = torch.stack(rows)
        made.append(str(rewrite(Path(name), folder / str(number), tensors)))
        (folder / str(number) / "config.json").write_text(json.dumps(config))
        shutil.copy(output / "tokenizer.json", folder / str(number))
    return made


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method(method: Method, make: Make, tmp_path: Path, output: Path) -> None:
    """Rows of the base are what it makes of matched models; tokens of one model are as it has them.

    The weighted mean of rows that two models have is that of `own_weights`, above.
    """
    names = family(make, tmp_path, "unigram")
    names = names[: 2 if method.models[1] == 1 else 3]

    def run(target: Path, models: Sequence[str], *options: str) -> None:
        given = [str(target), "--method", method.name, *options]
        for parameter in method.parameters:
            if parameter.default is None and not parameter.per_model:
                given += [parameter.option, "0.3"]
        has_base = method.base in (ORIGIN, OPTIONAL)
        given += ["--base-model", models[0]] if has_base else []
        for i, model in enumerate(
            models[has_base : 2 if method.models[1] == 2 and not has_base else 3]
        ):
            given += ["--merge", model]
            for parameter in method.parameters:
                if parameter.per_model and parameter.default is None:
                    given += [parameter.option, str((0.5, 0.4, 0.7)[i])]
        assert main.main(given) == 0

    run(output, names, "--tokenizer", "union")
    run(tmp_path / "by-hand", aligned_by_hand(tmp_path / "made", names, output))
    found, oracle = stored(output), stored(tmp_path / "by-hand")
    assert found.keys() == oracle.keys()
    for name in found.keys() - {EMBEDDING, HEAD}:
        assert torch.equal(found[name], oracle[name]), name
    ids, own = ids_of(output), [Rows(name, EMBEDDING) for name in names]
    for token, number in ids.items():
        if (row := own[0].of(token, number)) is None:
            row = next(r for rows in own[1:] if (r := rows.of(token, number)) is not None)
            assert torch.equal(found[EMBEDDING][number], row)
        else:
            assert torch.equal(found[EMBEDDING][number], oracle[EMBEDDING][number])
    assert any(own[0].of(token, number) is None for token, number in ids.items())


def test_files_of_a_chosen_model_are_copied_byte_for_byte(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = family(make, tmp_path, "llama")
    assert main.main([*command("ties", output, names), "--tokenizer", names[1]]) == 0
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / file).read_bytes() == Path(names[1], file).read_bytes()
    file = "generation_config.json"
    assert (output / file).read_bytes() == Path(names[1], file).read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config["eos_token_id"] == ids_of(names[1])["<|im_end|>"]
    text = capsys.readouterr().err
    assert f"tokenizer: that of {names[1]}\n" in text
    assert f"chat template: that of {names[1]}\n" in text
    assert "2 tokens that" in text and "are the weighted mean of the models that have them" in text
    assert f"warning: chat tokens of {names[2]} are dropped: '<|tool|>';" in text


def test_what_a_chat_needs_is_told_when_it_is_dropped(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its template is not taken: the base's tokenizer would cut its markers in pieces."""
    names = family(make, tmp_path, "llama")
    assert main.main([*command("ties", output, names), "--dry-run"]) == 0
    text = capsys.readouterr().err
    assert (
        f"warning: chat tokens of {names[1]} are dropped: '<|im_start|>', '<|im_end|>'; "
        f"--tokenizer union keeps them, --tokenizer {names[1]} takes its tokenizer\n"
    ) in text
    assert f"chat template: none; that of {names[1]} needs '<|im_start|>', '<|im_end|>'" in text
    assert main.main(command("ties", output, names)) == 0
    assert not (output / "chat_template.jinja").exists()
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / file).read_bytes() == Path(names[0], file).read_bytes()


def test_plain_words_of_a_template_are_dropped_by_name(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = llama_like()
    chat.add_tokens(added("Q:", "elsewhere"))
    base = str(save_model(make, tmp_path / "base", 0, llama_like()))
    other = str(save_model(make, tmp_path / "chat", 1, chat, template="Q: {{ messages[0] }}"))
    assert main.main([*command("linear", output, [base, other]), "--dry-run"]) == 0
    assert f"chat tokens of {other} are dropped: 'Q:'; --tokenizer" in capsys.readouterr().err


# -------------------------------------------------------------------- unions


def test_a_union_keeps_ids_flags_and_order(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [
        AddedToken("<a>", special=True, normalized=False, lstrip=True),
        AddedToken("<b>", special=False, normalized=True, rstrip=True),
        AddedToken("<c>", special=False, normalized=False, single_word=True),
    ]
    one, two = llama_like(), llama_like()
    one.add_tokens([tokens[1]])
    two.add_tokens([tokens[0], tokens[1], tokens[2]])
    size = llama_like().get_vocab_size()
    names = [
        str(save_model(make, tmp_path / name, i, tokenizer))
        for i, (name, tokenizer) in enumerate(zip("xyz", (llama_like(), one, two), strict=True))
    ]
    listed = {str(size - 1): {"content": "<|reserved_special_token_2|>", "special": True}}
    config = Path(names[0], "tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"added_tokens_decoder": listed}))
    Path(names[0], "added_tokens.json").write_text("{}")
    assert main.main([*command("linear", output, names), "--tokenizer", "union"]) == 0
    found = Tokenizer.from_file(str(output / "tokenizer.json"))
    assert found.get_vocab() == ids_of(names[0]) | {"<b>": size, "<a>": size + 1, "<c>": size + 2}
    flags = found.get_added_tokens_decoder()
    assert [flags[size + i] for i in range(3)] == [tokens[1], tokens[0], tokens[2]]
    listed = json.loads((output / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    loaded = tf.AutoTokenizer.from_pretrained(output).added_tokens_decoder
    for i in range(3):
        assert AddedToken(**listed[str(size + i)]) == flags[size + i] == loaded[size + i]
    assert json.loads((output / "added_tokens.json").read_text())["<c>"] == size + 2
    assert loads_clean(output).config.vocab_size == size + 3
    text = capsys.readouterr().err
    assert f"tokenizer: 1 of {names[1]} ('<b>' {size})\n" in text
    assert f"tokenizer: 2 of {names[2]} ('<a>' {size + 1}, '<c>' {size + 2})\n" in text


def test_a_union_of_one_tokenizer_is_that_tokenizer(
    make: Make, tmp_path: Path, output: Path
) -> None:
    names = [str(save_model(make, tmp_path / n, i, qwen_like())) for i, n in enumerate("xyz")]
    assert main.main([*command("ties", output, names), "--tokenizer", "union"]) == 0
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / file).read_bytes() == Path(names[0], file).read_bytes()


def test_rows_are_padded_to_a_multiple(make: Make, tmp_path: Path, output: Path) -> None:
    """Those that no model has are the mean, so that none of their logits is ever the largest."""
    names = family(make, tmp_path, "unigram")
    options = ["--tokenizer", "union", "--pad-to-multiple-of", "16"]
    assert main.main([*command("ties", output, names), *options]) == 0
    size = KINDS["unigram"]().get_vocab_size() + 3
    rows = -(-size // 16) * 16
    assert rows > size + 1
    assert loads_clean(output).config.vocab_size == rows
    for name in (EMBEDDING, HEAD):
        result = stored(output)[name]
        assert result.shape[0] == rows
        mean = result[: size + 1].double().mean(0)  # the last of these is padding of a model
        assert ulps(result[rows - 1], mean).max() <= 0.51
        oracle, _ = expected("ties", output, names, (1, 0.5), name)
        torch.testing.assert_close(result.double(), oracle, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("choice", ["base", "chat"])
def test_padding_of_one_models_tokenizer(
    choice: str, make: Make, tmp_path: Path, output: Path
) -> None:
    names = family(make, tmp_path, "qwen")
    chosen = "base" if choice == "base" else names[1]
    options = ["--tokenizer", chosen, "--pad-to-multiple-of", "64"]
    assert main.main([*command("linear", output, names), *options]) == 0
    assert loads_clean(output).config.vocab_size % 64 == 0
    oracle, _ = expected("linear", output, names, (1, 0.5), HEAD)
    torch.testing.assert_close(stored(output)[HEAD].double(), oracle, rtol=1e-5, atol=1e-7)


def test_tokens_that_only_the_configuration_names_keep_their_ids(
    make: Make, tmp_path: Path, output: Path
) -> None:
    """transformers appends them on loading: what a union adds comes after them."""
    names = family(make, tmp_path, "qwen")
    config = Path(names[0], "tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "[PAD]"}))
    before = ids_of(names[0])
    assert "[PAD]" not in Tokenizer.from_file(f"{names[0]}/tokenizer.json").get_vocab()
    assert main.main([*command("linear", output, names), "--tokenizer", "union"]) == 0
    after = ids_of(output)
    assert {token: after[token] for token in before} == before
    assert sorted(after.values()) == list(range(len(before) + 3))
    assert loads_clean(output).config.vocab_size == len(before) + 3


def test_a_union_with_a_sentencepiece_model(make: Make, tmp_path: Path, output: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    names = family(make, tmp_path, "unigram", arch="llama")
    base = Path(names[0])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(base / "tokenizer"),
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
    )
    (base / "tokenizer.vocab").unlink()
    before = ids_of(base)
    assert main.main([*command("linear", output, names), "--tokenizer", "union"]) == 0
    after = ids_of(output)
    assert {token: after[token] for token in before} == before
    assert {"<|im_start|>", "<|im_end|>", "<|tool|>"} <= after.keys()
    oracle, _ = expected("linear", output, names, (1, 0.5), EMBEDDING)
    torch.testing.assert_close(stored(output)[EMBEDDING].double(), oracle, rtol=1e-5, atol=1e-7)


def test_a_tokenizer_with_gaps_takes_no_tokens(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"<unk>": 0, END: 1, "a": 2, "b": 7}
    chat = word_level(["<unk>", END, "a"])
    chat.add_tokens(added("<x>", "<y>", "<z>", "<w>"))
    gaps = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    base = str(save_model(make, tmp_path / "base", 0, gaps, rows=8))
    other = str(save_model(make, tmp_path / "chat", 1, chat))
    given = [*command("linear", output, [base, other]), "--tokenizer", "union"]
    assert "whose ids have gaps (<w> would get another's)" in fails(capsys, *given)


def test_a_union_needs_a_tokenizer(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = family(make, tmp_path, "qwen")
    Path(names[0], "tokenizer.json").unlink()
    given = [*command("linear", output, names), "--tokenizer", "union"]
    assert "has no tokenizer to add tokens to" in fails(capsys, *given)


def test_a_chosen_model_needs_a_tokenizer(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = family(make, tmp_path, "qwen")
    for file in Path(names[1]).glob("*token*"):
        file.unlink()
    given = [*command("linear", output, names), "--tokenizer", names[1]]
    assert f"--tokenizer {names[1]}: there is no tokenizer in" in fails(capsys, *given)
    assert not output.exists()


def test_tokens_that_no_model_has_a_row_of(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = family(make, tmp_path, "llama")
    tokenizer = llama_like()
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(added("<x1>", "<x2>"))  # without a row each
    short = str(save_model(make, tmp_path / "short", 3, tokenizer, rows=size))
    given = [*command("linear", output, [short, names[1]]), "--tokenizer", "union"]
    assert main.main(given) == 0
    said = capsys.readouterr().err
    assert f"2 tokens that {short} lacks ('<|im_end|>', '<|im_start|>') are the weighted" in said
    assert "2 new rows of padding are the mean of the others" in said
    result = stored(output)[EMBEDDING]
    assert len(result) == size + 4
    mean = result[[*range(size), size + 2, size + 3]].double().mean(0)
    torch.testing.assert_close(result[size].double(), mean, rtol=1e-5, atol=1e-7)


def test_models_without_a_tokenizer_are_taken_to_have_that_of_their_size(
    make: Make, tmp_path: Path, output: Path
) -> None:
    names = family(make, tmp_path, "qwen")
    bare = shutil.copytree(names[0], tmp_path / "bare")
    for file in Path(bare).glob("tokenizer*"):
        file.unlink()
    given = [*command("linear", output, [names[0], names[1], str(bare)]), "--tokenizer", "union"]
    assert main.main(given) == 0
    shutil.copy(f"{names[0]}/tokenizer.json", bare)
    assert main.main([*given, "--overwrite"]) == 0
    oracle, _ = expected("linear", output, [names[0], names[1], str(bare)], (1, 0.5), HEAD)
    torch.testing.assert_close(stored(output)[HEAD].double(), oracle, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("choice", ["union", "tool"])
def test_layers_of_several_models_with_the_words_of_all(
    choice: str, make: Make, tmp_path: Path, output: Path
) -> None:
    """Of a model in the middle too, that brings neither embedding nor head."""
    names = family(make, tmp_path, "qwen")
    slices = [f"{{model: {name}, start: 0, end: 1}}" for name in (names[0], names[2], names[1])]
    file = stack_file(tmp_path, f"layer_slices: [{', '.join(slices)}]\n")
    arguments = bakllama.build_parser().parse_args([file, str(output)])
    recipe = read_stack(Path(file))
    chosen = names[2] if choice == "tool" else choice
    wishes = {"tokenizer": chosen, "chat_template": "auto"}
    make_model(replace(recipe, **wishes), arguments, {}, [])
    token_of, config = {n: t for t, n in ids_of(output).items()}, loads_clean(output).config
    assert token_of.keys() <= {*range(config.vocab_size)}
    for name, source in ((EMBEDDING, names[0]), (HEAD, names[1])):
        models = [Rows(folder, name) for folder in (source, *names)]
        for number, row in enumerate(stored(output)[name]):
            found = [m.of(token_of.get(number), number) for m in models]
            having = [theirs for theirs in found if theirs is not None]
            if found[0] is None and found[1] is None:  # the mean of the others
                having = [linear_oracle(having, [1.0] * len(having), True).float()]
            assert torch.equal(row, having[0])
    expected_tokens = {"<|tool|>"} | (
        {"<|im_start|>", "<|im_end|>"} if choice == "union" else set()
    )
    if choice == "union":  # in the order of the slices
        last = sorted(token_of)[-3:]
        assert [token_of[i] for i in last] == ["<|tool|>", "<|im_start|>", "<|im_end|>"]
    assert expected_tokens == {*token_of.values()} & {"<|im_start|>", "<|im_end|>", "<|tool|>"}


# -------------------------------------------------------------------- odd tokens


def test_a_reserved_token_that_was_renamed(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_model(make, tmp_path / "base", 0, llama_like()))
    text = llama_like().to_str().replace("<|reserved_special_token_0|>", "<|im_start|>")
    text = text.replace("<|reserved_special_token_1|>", "<|im_end|>")
    renamed = Tokenizer.from_str(text)
    chat = str(save_model(make, tmp_path / "chat", 1, renamed, eos="<|im_end|>", template=CHATML))
    given = command("linear", output, [base, chat])
    assert main.main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"2 of these stand in rows that {base} names otherwise" in said
    assert "'<|im_start|>' as '<|reserved_special_token_0|>'" in said
    assert f"--tokenizer {chat} takes its tokenizer" in said
    place = renamed.token_to_id("<|im_start|>")
    theirs = stored(Path(chat))[EMBEDDING][place]
    assert main.main([*given, "--tokenizer", chat]) == 0
    assert torch.equal(stored(output)[EMBEDDING][place], theirs)
    assert_talks_like(output, chat, exactly=True)
    assert main.main([*given, "--tokenizer", "union", "--overwrite"]) == 0
    ids = ids_of(output)
    assert ids["<|reserved_special_token_0|>"] == place
    assert torch.equal(stored(output)[EMBEDDING][ids["<|im_start|>"]], theirs)
    own = stored(Path(base))[EMBEDDING][place]
    assert torch.equal(stored(output)[EMBEDDING][place], own)
    assert_talks_like(output, chat, exactly=True)


def test_swapped_ids_are_told_and_matched(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = qwen_like(), qwen_like()
    one.add_tokens(added("<|im_start|>", "<|im_end|>"))
    two.add_tokens(added("<|im_end|>", "<|im_start|>"))
    names = [
        str(save_model(make, tmp_path / n, i, t))
        for i, (n, t) in enumerate(zip("xy", (one, two), strict=True))
    ]
    assert main.main([*command("linear", output, names), "--tokenizer", names[1]]) == 0
    oracle, shared = expected("linear", output, names, (1,), EMBEDDING)
    assert all(shared)
    assert ulps(stored(output)[EMBEDDING], oracle).max() <= 0.51
    said = capsys.readouterr().err
    assert f"2 tokens of {names[0]} have other ids there ('<|im_end|>', '<|im_start|>')" in said


@pytest.mark.parametrize("first", [True, False])
def test_special_in_one_and_plain_in_the_other(
    first: bool, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = [qwen_like(), qwen_like()]
    for tokenizer, special in zip(tokenizers, (first, not first), strict=True):
        tokenizer.add_tokens(added("<|im_end|>", special=special))
    names = [str(save_model(make, tmp_path / n, i, tokenizers[i])) for i, n in enumerate("xy")]
    for choice in ("base", "union", names[1]):
        options = ["--tokenizer", choice, "--overwrite"]
        assert main.main([*command("linear", output, names), *options]) == 0
        special = (choice == names[1]) != first
        here, there = ("plain", "special") if special else ("special", "plain")
        other, owner = names if choice == names[1] else names[::-1]
        said = capsys.readouterr().err
        assert f"1 tokens are {here} in {other} and {there} in {owner} ('<|im_end|>')" in said
        tokenizer = tf.AutoTokenizer.from_pretrained(output)
        decoded = tokenizer.decode(tokenizer("a<|im_end|>")["input_ids"], skip_special_tokens=True)
        assert decoded == ("a" if special else "a<|im_end|>")
        oracle, shared = expected("linear", output, names, (1,), EMBEDDING)
        assert all(shared) and ulps(stored(output)[EMBEDDING], oracle).max() <= 0.51


def test_a_piece_of_words_that_is_special_elsewhere_becomes_so_in_a_union(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END, "<|im_end|>"]
    plain = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marked = Tokenizer.from_str(plain.to_str())
    marked.add_special_tokens(["<|im_end|>"])
    names = [
        str(save_model(make, tmp_path / n, i, t))
        for i, (n, t) in enumerate(zip("xy", (plain, marked), strict=True))
    ]
    assert main.main([*command("linear", output, names), "--tokenizer", "union"]) == 0
    assert "warning: '<|im_end|>': pieces of words in" in capsys.readouterr().err
    assert ids_of(output) == ids_of(names[0])
    encoded = tf.AutoTokenizer.from_pretrained(output)("<|im_end|>")["input_ids"]
    assert encoded == [tokens.index("<|im_end|>")]


@pytest.mark.parametrize(
    ("weights", "having", "expected_weights"),
    [
        ([0.3, 0.5], [1, 2], (0.3, 0.5)),  # of three operands, the base first
        ([0.3, 0.5], [2], (0.5,)),
        ([1.0, -0.5, 0.0], [0, 1], (1.0, 0.0)),
        ([1.0, -0.5, 0.0], [1, 2], (1.0, 1.0)),
        ([0.3, 0.5], [1, 4], (0.3, 0.0)),  # another model, which is no operand
        ([0.3, 0.5], [3, 4], (1.0, 1.0)),
        (None, [1, 2], (1.0, 1.0)),
    ],
)
def test_weights_of_rows_apart(
    weights: list[float] | None, having: list[int], expected_weights: tuple[float, ...]
) -> None:
    assert own_weights(weights, having, 3) == expected_weights


def test_biases_have_an_entry_a_token_too(make: Make, tmp_path: Path, output: Path) -> None:
    names = []
    tokenizers = [qwen_like(), qwen_like()]
    tokenizers[1].add_tokens(added("<|im_end|>"))
    for seed, tokenizer in enumerate(tokenizers):
        rows = tokenizer.get_vocab_size()
        torch.manual_seed(seed)
        config = tf.PhiConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        network = tf.PhiForCausalLM(config)
        torch.nn.init.normal_(network.lm_head.bias)
        names.append(str(tmp_path / str(seed)))
        network.save_pretrained(names[-1])
        tokenizer.save(f"{names[-1]}/tokenizer.json")
    assert main.main([*command("ties", output, names), "--tokenizer", "union"]) == 0
    result, own, other = (stored(Path(f))["lm_head.bias"] for f in (output, *names))
    assert result.shape == (tokenizers[1].get_vocab_size(),)
    assert result[-1] == other[-1]
    base = torch.cat([own, torch.zeros(1)])
    changed = torch.cat([other[:-1], torch.zeros(1)])
    oracle = ties_oracle(base, [changed], [1], [0.4], True, False)
    torch.testing.assert_close(result[:-1].double(), oracle[:-1], rtol=1e-6, atol=1e-7)
    loads_clean(output)


# -------------------------------------------------------------------- chat templates


def template_of(folder: Path) -> object:
    return tf.AutoTokenizer.from_pretrained(folder).chat_template


def three(make: Make, folder: Path, *templates: str | None) -> list[str]:
    """Save a base without a turn's end and fine-tunes with it, all of one vocabulary."""
    names = []
    for i, template in enumerate(templates):
        tokenizer = qwen_like()
        tokenizer.add_tokens(added("<|im_start|>", "<|im_end|>"))
        eos = "<|im_end|>" if template else END
        names.append(
            str(save_model(make, folder / str(i), i, tokenizer, template=template, eos=eos))
        )
    return names


OTHER = "{{ '<|im_start|>' + messages[0]['content'] + eos_token }}"


@pytest.mark.parametrize(
    ("templates", "options", "taken", "said"),
    [
        ((None, CHATML, None), [], CHATML, "that of {1}, as {0} has none"),
        ((None, CHATML, CHATML), [], CHATML, "that of {1}, {2}, as {0} has none"),
        ((None, CHATML, OTHER), [], None, "none; {0} has none, and those of {1}, {2} differ"),
        ((OTHER, CHATML, CHATML), [], OTHER, "that of {0}"),
        ((None, CHATML, None), ["donor"], None, ""),
        ((None, CHATML, OTHER), ["{1}"], CHATML, "that of {1}"),
        ((OTHER, CHATML, None), ["{1}"], CHATML, "that of {1}"),
        ((OTHER, CHATML, None), ["donor"], OTHER, ""),
        ((None, None, None), [], None, ""),
    ],
)
def test_whose_template(
    templates: Sequence[str | None],
    options: Sequence[str],
    taken: str | None,
    said: str,
    make: Make,
    tmp_path: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = three(make, tmp_path, *templates)
    given = [word for option in options for word in ("--chat-template", option.format(*names))]
    assert main.main([*command("ties", output, names), *given]) == 0
    assert template_of(output) == taken
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("chat template")]
    assert len(lines) == bool(said)
    assert not said or lines[0].startswith(f"chat template: {said.format(*names)}")
    generation = json.loads((output / "generation_config.json").read_text())
    ids = ids_of(output)
    if taken == CHATML:
        own = [] if templates[0] else [ids[END]]
        ends = [ids["<|im_end|>"], *own]
        assert generation["eos_token_id"] in (ends, ends[0])
        assert generation["temperature"] == 0.5
    else:
        file = "generation_config.json"
        assert (output / file).read_bytes() == Path(names[0], file).read_bytes()
    assert (output / "tokenizer.json").read_bytes() == Path(names[0], "tokenizer.json").read_bytes()


def test_a_template_of_another_says_what_its_roles_are(
    make: Make, tmp_path: Path, output: Path
) -> None:
    """Its `eos_token` is the end of its own turns, not what the donor calls so."""
    names = three(make, tmp_path, None, OTHER, None)
    assert main.main(command("ties", output, names)) == 0
    rendered = [
        tf.AutoTokenizer.from_pretrained(f).apply_chat_template(CHAT, tokenize=False)
        for f in (output, names[1])
    ]
    assert rendered[0] == rendered[1] == f"<|im_start|>{CHAT[0]['content']}<|im_end|>"


def in_configuration(folder: str, value: object) -> None:
    """Put templates where older versions of transformers have them."""
    Path(folder, "chat_template.jinja").unlink(missing_ok=True)
    config = Path(folder, "tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": value}))


def test_templates_by_name_in_the_configuration(make: Make, tmp_path: Path, output: Path) -> None:
    """All of the one model come, all of the other go, wherever they are."""
    names = three(make, tmp_path, OTHER, CHATML, None)
    listed = {"default": CHATML, "tool_use": "tools: " + CHATML, "../rag": "no name of a file"}
    in_configuration(names[0], OTHER)
    in_configuration(names[1], [{"name": n, "template": t} for n, t in listed.items()])
    Path(names[0], "additional_chat_templates").mkdir()
    Path(names[0], "additional_chat_templates", "own.jinja").write_text("gone")
    Path(names[0], "chat_template.json").write_text(json.dumps({"chat_template": "gone"}))
    given = ["--chat-template", names[1]]
    assert main.main([*command("ties", output, names), *given]) == 0
    assert template_of(output) == {n: t for n, t in listed.items() if n != "../rag"}
    assert not (output / "chat_template.json").exists()
    assert "chat_template" not in json.loads((output / "tokenizer_config.json").read_text())
    files = sorted(path.name for path in (output / "additional_chat_templates").iterdir())
    assert files == ["tool_use.jinja"]


def test_a_template_from_a_file(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = three(make, tmp_path, None, CHATML, OTHER)
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}<|nobody|>")
    given = [*command("ties", output, names), "--overwrite", "--chat-template"]
    assert main.main([*given, str(file)]) == 0
    assert template_of(output) == file.read_text()
    said = capsys.readouterr().err
    assert (
        "warning: the chat template needs '<|nobody|>', which are no tokens of the output" in said
    )
    before = Path(names[0], "generation_config.json").read_bytes()
    assert (output / "generation_config.json").read_bytes() == before
    file.write_text(CHATML)  # which is one of a model, whose turns end so
    assert main.main([*given, str(file)]) == 0
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids_of(names[1])[t] for t in ("<|im_end|>", END)]


def test_a_template_is_held_against_the_tokens_of_models_with_one_tokenizer(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *_ = family(make, tmp_path, "qwen")
    other = str(shutil.copytree(base, tmp_path / "other"))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}<|end_of_text|><|nobody|>")
    given = [*command("linear", output, [base, other]), "--chat-template", str(file)]
    assert main.main(given) == 0
    warning = "warning: the chat template needs '<|nobody|>', which are no tokens of the output"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokenizer", "none"], "expected base, union, or a model that is merged: {0}, {1}, {2}"),
        (["--chat-template", "none"], "expected auto, donor, a model that is merged"),
        (["--chat-template", "{2}"], "{2} has no chat template"),
        (["--tokenizer", "{1}", "--chat-template", "donor"], "{0} has no chat template"),
        (["--no-copy-tokenizer", "--tokenizer", "union"], "what --no-copy-tokenizer leaves out"),
        (["--no-copy-tokenizer", "--chat-template", "{1}"], "what --no-copy-tokenizer leaves out"),
    ],
)
def test_what_cannot_be_had(
    options: Sequence[str],
    said: str,
    make: Make,
    tmp_path: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = three(make, tmp_path, None, CHATML, None)
    given = [option.format(*names) for option in options]
    assert said.format(*names) in fails(capsys, *command("ties", output, names), *given)


@pytest.mark.parametrize("text", ["{% for x in %}", "{% if a %}{{ b }}", "{{ a }", "{% own %}"])
def test_a_template_that_cannot_be_read_is_refused(
    text: str, make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = three(make, tmp_path, None, None, None)
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    given = command("ties", output, names)
    found = fails(capsys, *given, "--chat-template", str(file))
    assert f"--chat-template: {file} is no template: Template" in found
    assert "--chat-template: its text is no template: T" in fails(
        capsys, *given, "--chat-template", text
    )
    file.write_text("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}")
    with file.open("a") as stream:
        stream.write("{% endfor %}")  # what transformers adds to the language
    assert main.main([*given, "--chat-template", str(file)]) == 0


@pytest.mark.parametrize("number", ["0", "x", "-8", "1000000"])
def test_a_multiple_that_is_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["out", "--merge", "a", f"--pad-to-multiple-of={number}"])
    assert "--pad-to-multiple-of" in capsys.readouterr().err


def test_without_a_tokenizer_nothing_of_it_is_written(
    make: Make, tmp_path: Path, output: Path
) -> None:
    names = three(make, tmp_path, None, CHATML, None)
    assert main.main([*command("ties", output, names), "--no-copy-tokenizer"]) == 0
    assert not [p.name for p in output.iterdir() if "token" in p.name or "chat" in p.name]
    before = Path(names[0], "generation_config.json").read_bytes()
    assert (output / "generation_config.json").read_bytes() == before


def test_ends_without_a_generation_config(make: Make, tmp_path: Path, output: Path) -> None:
    """They are written into the one that transformers makes of the config."""
    names = three(make, tmp_path, None, CHATML, None)
    for name in names:
        Path(name, "generation_config.json").unlink()
    assert main.main(command("ties", output, names)) == 0
    generation = json.loads((output / "generation_config.json").read_text())
    ids = ids_of(output)
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids[END]]
    assert main.main([*command("ties", output, names), "--tokenizer", names[1], "--overwrite"]) == 0
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ids["<|im_end|>"]
