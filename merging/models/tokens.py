"""The tokens of a folder's tokenizer, whatever kinds of files it has, with their ids."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from merging.models.checkpoints import Checkpoint
from merging.problems import Problems, collecting, first_line, reading, refuse
from merging.recipes.user_files import LARGEST, check_readable, read_text

# Files from which transformers can build a tokenizer when there is no tokenizer.json.
VOCABULARY_FILES = (
    "tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model source.spm "
    "tekken.json qwen.tiktoken tiktoken.model"
).split()
TOKENIZER_FILES = re.compile(r"token|vocab|merges|\.model$|\.spm$|tekken|\.py$")
LIBRARIES = ("sentencepiece", "protobuf")  # that transformers asks for when it needs them
ROLES = tuple(f"{role}_token" for role in "bos eos unk sep pad cls mask".split())
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Tokens(NamedTuple):
    """A tokenizer's tokens with their ids, and those that are no pieces of words, with flags."""

    ids: Mapping[str, int]
    added: Mapping[str, AddedToken] = {}


def read_tokens(folder: Path, trust_remote_code: bool = False, side: str = "") -> Tokens | None:
    """Return a tokenizer's tokens, added and special ones too; None if it has none.

    `side` is the file of one language's tokens, if the folder has it. Raises Problems if the
    tokenizer's files cannot be read.
    """
    try:
        if side and (folder / side).is_file():
            entries = json.loads(read_text(folder / side))
            return Tokens({token: int(number) for token, number in entries.items()})
        tokenizer = _open(folder, trust_remote_code)
        if tokenizer is None:
            return None
        if isinstance(tokenizer, Tokenizer):
            ids = tokenizer.get_vocab(with_added_tokens=True)
            return Tokens(ids, _added(folder, tokenizer))
        _check_complete(folder, tokenizer.get_vocab())
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        return Tokens(dict(tokenizer.get_vocab()), added)
    except (KeyboardInterrupt, Problems):
        raise
    except BaseException as error:  # tokenizers raises plain Exceptions, and panics of its own
        raise Problems(_unreadable(folder, error)) from error


def backend(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Return a folder's tokenizer as one of the tokenizers library. Raises Problems."""
    try:
        tokenizer = _open(folder, trust_remote_code)
        found = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
        return Tokenizer.from_str(found.to_str())
    except (KeyboardInterrupt, Problems):
        raise
    except BaseException as error:
        raise Problems(
            f"{folder}: tokens can be added to no tokenizer but one of the tokenizers library "
            f"({first_line(error)}); save it as tokenizer.json"
        ) from error


def _open(folder: Path, trust_remote_code: bool) -> Any:
    """Open a tokenizer by the tokenizers library, if that sees all tokens, or by transformers."""
    if (folder / "tokenizer.json").is_file():
        check_readable(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if _declared_tokens(folder) <= tokenizer.get_vocab(with_added_tokens=True).keys():
            return tokenizer
    elif not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer  # slower, but knows every kind of file

    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )


def _added(folder: Path, tokenizer: Tokenizer) -> dict[str, AddedToken]:
    """Return the added tokens, with the flags of tokenizer_config.json, as transformers does.

    Those that have a role, such as the end of a text, are special.
    """
    found = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    declared = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for entry in declared.values():
        flags = {key: bool(entry[key]) for key in FLAGS if key in entry}
        found[entry["content"]] = AddedToken(entry["content"], **flags)
    for content in roles(folder).values():
        found.setdefault(content, AddedToken(content, special=True)).special = True
    return found


def roles(folder: Path) -> dict[str, str]:
    """Return the tokens that a tokenizer's files name by role (bos_token, eos_token, ...)."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        with reading(folder, f"{name} is not readable JSON"):
            entries = _read(folder / name)
        for key, value in entries.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key in ROLES and isinstance(content, str):
                found[key] = content
    return found


def _unreadable(folder: Path, error: BaseException) -> str:
    """Say why a tokenizer cannot be read: a library may be missing."""
    missing = [name for name in LIBRARIES if not _is_installed(name)]
    cause, mend = first_line(error), "repair it"
    if missing and not (folder / "tokenizer.json").is_file():
        cause, mend = f"without {' and '.join(missing)}", f"pip install {' '.join(missing)}"
    return (
        f"{folder}: its tokenizer cannot be read ({cause}); {mend}, or remove its files to match "
        "rows by number"
    )


def has_tokenizer(folder: Path, side: str = "") -> bool:
    """Whether a folder has files from which transformers can build a tokenizer."""
    names = ("tokenizer.json", *VOCABULARY_FILES, *filter(None, [side]))
    return any((folder / name).is_file() for name in names)


def _is_installed(library: str) -> bool:
    try:
        return bool(version(library))
    except PackageNotFoundError:
        return False


def _fingerprint(checkpoint: Checkpoint) -> bytes:
    """Return what tells apart the files of tokenizers, and the model types that read them."""
    digest = hashlib.sha256(checkpoint.config.model_type.encode())
    for file in sorted(checkpoint.tokenizer.iterdir()):
        if TOKENIZER_FILES.search(file.name) and file.is_file():
            with reading(checkpoint.name, file.name):
                size = file.stat().st_size
                digest.update(f"{file.name} {size} ".encode())
                digest.update(file.read_bytes() if size <= LARGEST else str(file).encode())
    return digest.digest()


def _declared_tokens(folder: Path) -> set[str]:
    """Return the tokens that files beside tokenizer.json declare, or name by role."""
    named: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = _read(folder / name)
        for entry in (content.get("added_tokens_decoder") or {}).values():
            named.add(entry["content"])
        for key, value in content.items():
            if not key.endswith(("_token", "special_tokens")):
                continue
            by_name = isinstance(value, dict) and "content" not in value
            values = list(value.values()) if by_name else value
            values = values if isinstance(values, list) else [values]
            contents = [v.get("content") if isinstance(v, dict) else v for v in values]
            named |= {content for content in contents if isinstance(content, str)}
    return named | _read(folder / "added_tokens.json").keys()


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON file's content; nothing if there is no such file."""
    return dict(json.loads(read_text(file))) if file.is_file() else {}


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


def read_all_tokens(
    everyone: Sequence[Checkpoint], sides: Set[str], trust: bool
) -> dict[tuple[Checkpoint, str], Tokens | None]:
    """Read the tokens of checkpoints; files that are the same in all of them need no reading."""
    prints = {checkpoint: _fingerprint(checkpoint) for checkpoint in everyone}
    known: dict[tuple[bytes, str], Tokens | None] = {}
    problems: list[str] = []
    for checkpoint in everyone:
        for side in sides:
            if (prints[checkpoint], side) not in known:
                with collecting(problems):
                    known[prints[checkpoint], side] = (
                        read_tokens(checkpoint.tokenizer, trust, side)
                        if len({*prints.values()}) > 1
                        else Tokens({})
                        if has_tokenizer(checkpoint.tokenizer, side)
                        else None
                    )
    refuse(problems)
    return {(c, side): known[prints[c], side] for c in everyone for side in sides}
