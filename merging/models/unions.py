"""The union of tokenizers: the donor's, and every token that the others added to theirs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from merging.models.checkpoints import Checkpoint
from merging.models.folders import as_json, read_json
from merging.models.tokens import FLAGS, Tokens, backend
from merging.problems import Problems, some


class Union(NamedTuple):
    """The tokens of a union, the files that are its own, and the new tokens of each model."""

    tokens: Tokens
    files: Mapping[str, bytes] = {}
    new: Mapping[str, Sequence[str]] = {}
    promoted: Sequence[str] = ()  # pieces of the donor's vocabulary that are special in another


def unite(
    donor: Checkpoint,
    others: Sequence[Checkpoint],
    tokens: Mapping[Checkpoint, Tokens | None],
    rows: Mapping[Checkpoint, int],
    trust: bool = False,
) -> Union:
    """Add to the donor's tokenizer what others added to theirs, in the order of the models.

    The ids of the donor stay. `rows` says how many each model has: only tokens that have one are
    added. A piece of the donor's vocabulary that is a special token elsewhere becomes one, at its
    id. Raises Problems.
    """
    own = tokens[donor]
    if own is None:
        raise Problems(f"--tokenizer union: {donor.name} has no tokenizer to add tokens to")
    new: dict[str, AddedToken] = {}
    promoted: dict[str, AddedToken] = {}
    of_models: dict[str, list[str]] = {}
    for other in others:
        found = tokens[other] or Tokens({})
        for content in sorted(found.added.keys() & found.ids.keys(), key=found.ids.__getitem__):
            flags = found.added[content]
            if content not in own.ids and content not in new and found.ids[content] < rows[other]:
                new[content] = flags
                of_models.setdefault(other.name, []).append(content)
            elif content in own.ids and content not in own.added and flags.special:
                promoted.setdefault(content, flags)
    if not new and not promoted:
        return Union(own)
    tokenizer = backend(donor.tokenizer, trust)
    for flags in (*promoted.values(), *new.values()):
        (tokenizer.add_special_tokens if flags.special else tokenizer.add_tokens)([flags])
    ids = tokenizer.get_vocab(with_added_tokens=True)
    _check_ids(donor, own, ids, new)
    added = dict(own.added) | {content: flags for content, flags in (promoted | new).items()}
    files = _files(donor, tokenizer, ids, promoted | new)
    return Union(Tokens(ids, added), files, of_models, list(promoted))


def _check_ids(
    donor: Checkpoint, own: Tokens, ids: Mapping[str, int], new: Mapping[str, AddedToken]
) -> None:
    """Refuse a tokenizer that has gaps in its numbers: the library puts new tokens there, or on."""
    moved = [token for token, number in own.ids.items() if ids.get(token) != number]
    taken = {*own.ids.values()}
    twice = [token for token in new if ids[token] in taken]
    if moved or twice:
        raise Problems(
            f"{donor.name}: no token can be added to its tokenizer, whose ids have gaps "
            f"({some(moved or twice)} would get another's); name another by --tokenizer MODEL"
        )


def _files(
    donor: Checkpoint,
    tokenizer: Tokenizer,
    ids: Mapping[str, int],
    changed: Mapping[str, AddedToken],
) -> dict[str, bytes]:
    """Return the donor's tokenizer files in which tokens are listed, with the new ones."""
    files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    config = donor.tokenizer / "tokenizer_config.json"
    content = read_json(donor.name, config) if config.is_file() else {}
    if isinstance(listed := content.get("added_tokens_decoder"), dict):
        for token, flags in changed.items():
            listed[str(ids[token])] = {"content": token} | {k: getattr(flags, k) for k in FLAGS}
        files[config.name] = as_json(content)
    added = donor.tokenizer / "added_tokens.json"
    if added.is_file():
        more = {token: ids[token] for token in changed}
        files[added.name] = as_json(read_json(donor.name, added) | more)
    return files
