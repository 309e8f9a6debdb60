"""Match vocabularies by token: which row of a model's embedding is which row of the donor's."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from merging.models.checkpoints import Checkpoint
from merging.models.structure import Structure
from merging.models.tensors import MISSING, LazyTensor, with_rows
from merging.problems import Problems, collecting, first_line, refuse, some
from merging.recipes.user_files import check_readable, read_text

# Changes a tensor of a model, by its stored name, to have the rows of the donor's of that role.
Matcher = Callable[[Checkpoint, str, LazyTensor], LazyTensor]

# Files from which transformers can build a tokenizer when there is no tokenizer.json.
VOCABULARY_FILES = (
    "tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model source.spm "
    "tekken.json qwen.tiktoken tiktoken.model"
).split()


class Vocabulary(NamedTuple):
    """The rows of a model's embedding, and the token of each; tokens is None without tokenizer."""

    model: str
    rows: int
    tokens: Mapping[str, int] | None


def read_tokens(folder: Path, trust_remote_code: bool = False) -> dict[str, int] | None:
    """Return a tokenizer's tokens with their ids, added and special ones too; None if it has none.

    Raises Problems if the tokenizer's files cannot be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            check_readable(folder / "tokenizer.json")
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokens = _with_added(folder, tokenizer.get_vocab(with_added_tokens=True))
            if _special_tokens(folder) <= tokens.keys():
                return tokens
        elif not any((folder / name).is_file() for name in VOCABULARY_FILES):
            return None
        from transformers import AutoTokenizer  # slower, but knows every kind of file

        tokens = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        ).get_vocab()
        _check_complete(folder, tokens)
        return dict(tokens)
    except (KeyboardInterrupt, Problems):
        raise
    except BaseException as error:  # tokenizers raises plain Exceptions, and panics of its own
        raise Problems(
            f"{folder}: its tokenizer cannot be read ({first_line(error)}); repair it, or remove "
            "its files to match rows by number"
        ) from error


def _special_tokens(folder: Path) -> set[str]:
    """Return the tokens that a tokenizer's configuration names by role."""
    named: set[str] = set()
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if file.is_file():
            for key, value in json.loads(read_text(file)).items():
                if key.endswith("_token") or key.endswith("special_tokens"):
                    values = value if isinstance(value, list) else [value]
                    contents = [v.get("content") if isinstance(v, dict) else v for v in values]
                    named |= {content for content in contents if isinstance(content, str)}
    return named


def _check_complete(folder: Path, tokens: Mapping[str, int]) -> None:
    """Refuse a tokenizer that transformers made without the vocabulary file that is there."""
    if (folder / "vocab.json").is_file():
        expected = len(json.loads(read_text(folder / "vocab.json")))
    elif (folder / "vocab.txt").is_file():
        expected = len(read_text(folder / "vocab.txt").splitlines())
    else:
        return
    if len(tokens) < expected / 2:
        raise ValueError(f"transformers gives {len(tokens)} tokens, its vocabulary has {expected}")


def _with_added(folder: Path, tokens: dict[str, int]) -> dict[str, int]:
    """Add the tokens that tokenizer_config.json or added_tokens.json adds to tokenizer.json's."""
    added: dict[str, int] = {}
    config, extra = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.is_file():
        entries = json.loads(read_text(config)).get("added_tokens_decoder") or {}
        added |= {entry["content"]: int(number) for number, entry in entries.items()}
    if extra.is_file():
        added |= {t: int(number) for t, number in json.loads(read_text(extra)).items()}
    taken = set(tokens.values())
    new = {t: number for t, number in added.items() if t not in tokens and number not in taken}
    return tokens | new


def match(donor: Vocabulary, model: Vocabulary) -> list[int] | None:
    """Return for each of the donor's rows the model's row of the same token, or MISSING.

    Rows without a token (padding) match by number where both have them. None if the rows are the
    same, one for one. Without tokenizers, vocabularies of one size match by number; raises
    Problems if they differ in size.
    """
    if donor.tokens is None or model.tokens is None:
        if donor.rows == model.rows:
            return None
        nameless = donor.model if donor.tokens is None else model.model
        raise Problems(
            f"{model.model}: its vocabulary has {model.rows} rows, that of {donor.model} "
            f"{donor.rows}, and {nameless} has no tokenizer to match them by; add its tokenizer's "
            "files, or give both the same rows with transformers' resize_token_embeddings"
        )
    if donor.rows == model.rows and donor.tokens == model.tokens:
        return None
    token_of = {number: token for token, number in donor.tokens.items()}
    taken = set(model.tokens.values())

    def row(number: int) -> int:
        token = token_of.get(number)
        if token is not None:
            found = model.tokens.get(token, MISSING)  # type: ignore[union-attr]
        else:
            found = MISSING if number in taken else number
        return found if found < model.rows else MISSING

    rows = [row(number) for number in range(donor.rows)]
    same = donor.rows == model.rows and rows == list(range(donor.rows))
    return None if same else rows


def report(
    donor: Vocabulary, models: Mapping[str, Vocabulary], rows: Mapping[str, list[int] | None]
) -> list[str]:
    """Return lines that say how many rows all models share, which not, and what is dropped."""
    lines = []
    nameless = [v.model for v in (donor, *models.values()) if v.tokens is None]
    if nameless:
        lines.append(
            f"warning: no tokenizer in {some(set(nameless))}; vocabularies match by row number"
        )
    if not any(rows.values()):
        return lines
    token_of = {number: token for token, number in (donor.tokens or {}).items()}
    fewer = sorted({i for found in rows.values() for i, row in enumerate(found or ()) if row < 0})
    line = f"vocabulary: {donor.rows} rows, {donor.rows - len(fewer)} shared by all models"
    if fewer:
        named = [repr(token_of.get(number, f"row {number}")) for number in fewer[:5]]
        line += f"; {len(fewer)} from fewer models ({', '.join(named)}{', ...' * (len(fewer) > 5)})"
    lines.append(line)
    for name, vocabulary in models.items():
        dropped = sorted((vocabulary.tokens or {}).keys() - (donor.tokens or {}).keys())
        if dropped:
            listed = some(map(repr, dropped))
            lines.append(f"vocabulary: {len(dropped)} tokens of {name} are dropped ({listed})")
    return lines


def match_vocabularies(
    structure: Structure, donor: Checkpoint, *models: Checkpoint, trust: bool = False
) -> tuple[Matcher, list[str]]:
    """Match the vocabularies of models with the donor's, by token.

    Returns what matches the rows of their tensors with the donor's, and lines for the user. Raises
    Problems.
    """
    as_it_is: Matcher = lambda model, name, given: model.tensors[name]  # noqa: E731
    embedding = structure.embedding_name(donor.tensors)
    if embedding is None:
        return as_it_is, []
    problems: list[str] = []
    vocabularies: dict[Checkpoint, Vocabulary] = {}
    for checkpoint in dict.fromkeys((donor, *models)):
        if embedding in checkpoint.tensors:  # else it is reported as missing
            with collecting(problems):
                tokens = read_tokens(checkpoint.folder, trust)
                size = checkpoint.tensors[embedding].shape[0]
                vocabularies[checkpoint] = Vocabulary(checkpoint.name, size, tokens)
    refuse(problems)
    matches: dict[Checkpoint, list[int] | None] = {}
    for checkpoint, vocabulary in vocabularies.items():
        with collecting(problems):
            matches[checkpoint] = match(vocabularies[donor], vocabulary)
    refuse(problems)
    named = {checkpoint.name: found for checkpoint, found in vocabularies.items()}
    notes = report(vocabularies[donor], named, {c.name: rows for c, rows in matches.items()})
    if not any(matches.values()):
        return as_it_is, notes
    dims = structure.vocabulary_dims({n for c in matches for n in c.tensors})

    def matched(model: Checkpoint, name: str, given: LazyTensor) -> LazyTensor:
        tensor, rows = model.tensors[name], matches.get(model)
        if rows is None or name not in dims:
            return tensor
        wanted = given.shape[dims[name]]
        if wanted > len(rows):
            return tensor  # a difference of shapes, reported as such
        return with_rows(tensor, dims[name], rows[:wanted], given)

    return matched, notes
