"""Match vocabularies by token: which row of a model's embedding is which row of the output's."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from merging.models.checkpoints import Checkpoint
from merging.models.structure import Structure
from merging.models.tensors import MISSING
from merging.models.vocabulary_rows import Matcher, Rows
from merging.models.vocabulary_sizes import vocabulary_dims, vocabulary_sizes
from merging.problems import Problems, collecting, refuse

# Files with the tokens of one side of a translation, where it has its own, by the key of its size.
SIDES = {
    "src_vocab_size": "vocab-src.json",
    "tgt_vocab_size": "vocab-tgt.json",
    "decoder_vocab_size": "target_vocab.json",
}
PART_OF_THEM = ("vocab_size_per_layer_input", "unpadded_vocab_size")  # the first rows of all

Ids = Mapping[str, int]  # of tokens


class Vocabulary(NamedTuple):
    """The rows of a model's embedding, and the token of each; tokens is None without tokenizer."""

    model: str
    rows: int
    tokens: Ids | None


class Wanted(NamedTuple):
    """The vocabulary that an output is to have: whose, with which tokens, how much larger."""

    owner: Checkpoint
    tokens: Mapping[str, Ids | None]  # by the file of a side; of a union, those it adds too
    added: Ids = {}  # of a union: what the owner lacks
    multiple: int = 1  # what the number of rows must be a multiple of


class Match(NamedTuple):
    """How the rows of a vocabulary are matched with the wanted ones."""

    wanted: Vocabulary
    models: Mapping[Checkpoint, Vocabulary]
    rows: dict[Checkpoint, Rows]


class Matching(NamedTuple):
    """All that follows from matching: the matcher, sizes of the config, matches, lines to tell."""

    matcher: Matcher
    sizes: Mapping[str, int] = {}
    matches: Mapping[str, Match] = {}
    notes: tuple[str, ...] = ()


def match(wanted: Vocabulary, model: Vocabulary) -> Rows:
    """Return for each of the wanted rows the model's row of the same token, or MISSING.

    Rows without a token (padding) match by number where both have them. None if the rows are the
    same, one for one. Without tokenizers, vocabularies of one size match by number; raises
    Problems if they differ in size.
    """
    if wanted.tokens is None or model.tokens is None:
        if wanted.rows == model.rows:
            return None
        nameless = wanted.model if wanted.tokens is None else model.model
        raise Problems(
            f"{model.model}: its vocabulary has {model.rows} rows, that of {wanted.model} "
            f"{wanted.rows}, and {nameless} has no tokenizer to match them by; add its tokenizer's "
            "files, or give both the same rows with transformers' resize_token_embeddings"
        )
    if wanted.rows == model.rows and wanted.tokens == model.tokens:
        return None
    token_of = {number: token for token, number in wanted.tokens.items()}
    taken = set(model.tokens.values())

    def row(number: int) -> int:
        token = token_of.get(number)
        if token is not None:
            found = model.tokens.get(token, MISSING)  # type: ignore[union-attr]
        else:
            found = MISSING if number in taken else number
        return found if found < model.rows else MISSING

    rows = [row(number) for number in range(wanted.rows)]
    same = wanted.rows == model.rows and rows == list(range(wanted.rows))
    return None if same else rows


def match_vocabularies(
    structure: Structure,
    everyone: Sequence[Checkpoint],
    tokens: Mapping[tuple[Checkpoint, str], Ids | None],
    wanted: Wanted,
) -> Matching:
    """Match the vocabularies of models, the donor first, with the one that is wanted, by token.

    Raises Problems.
    """
    donor, sizes = everyone[0], vocabulary_sizes(everyone[0].config)
    needed = needed_sizes(sizes, wanted)
    differ = any(
        found is not None and tokens[donor, side] not in (None, found)
        for (_, side), found in tokens.items()
    )
    if not differ and needed == sizes and _same_shapes(everyone):
        return Matching(Matcher(everyone, {}, {}, {}))
    groups = vocabulary_dims(structure, {n: 0 for c in everyone for n in c.tensors})
    notes: list[str] = []
    if differ or wanted.added:
        _check_groups(structure, donor, groups)
        others = vocabulary_sizes(structure.config, of_tokens=False)
        notes += [f"warning: rows of {key} are no tokens; they match by number" for key in others]
    matches = _match_groups(everyone, groups, tokens, wanted, needed)
    places = {name: (key, dim) for key, dims in groups.items() for name, dim in dims.items()}
    rows = {(c, key): found for key, m in matches.items() for c, found in m.rows.items()}
    growth = {key: m.wanted.rows - m.models[donor].rows for key, m in matches.items()}
    return Matching(Matcher(everyone, places, rows, growth), needed, matches, tuple(notes))


def needed_sizes(sizes: Mapping[str, int], wanted: Wanted) -> dict[str, int]:
    """Return the vocabulary sizes of the output's config: the owner's, made larger if need be."""
    of_owner = vocabulary_sizes(wanted.owner.config)
    found = {key: of_owner.get(key, size) for key, size in sizes.items()}
    last = max(wanted.added.values(), default=-1)
    needed = {}
    for key, size in found.items():
        whole = found.get(re.sub("_per_layer_input$|unpadded_", "", key), size)
        if key.endswith(PART_OF_THEM[0]) and size != whole:
            needed[key] = size  # later tokens have none of that
            continue
        needed[key] = max(size, last + 1)
        if not key.endswith(PART_OF_THEM[1]) or size == whole:
            needed[key] += -needed[key] % wanted.multiple
    return needed


def sides_of(structure: Structure) -> dict[str, str]:
    """Return the file with the tokens of each vocabulary, by its key; "" if the tokenizer's."""
    return {key: SIDES.get(key, "") for key in vocabulary_sizes(structure.config)} or {"": ""}


def _same_shapes(everyone: Sequence[Checkpoint]) -> bool:
    of_donor = everyone[0].tensors
    return all(
        tensor.shape == of_donor[name].shape
        for checkpoint in everyone
        for name, tensor in checkpoint.tensors.items()
        if name in of_donor
    )


def _match_groups(
    everyone: Sequence[Checkpoint],
    groups: Mapping[str, Mapping[str, int]],
    tokens: Mapping[tuple[Checkpoint, str], Ids | None],
    wanted: Wanted,
    needed: Mapping[str, int],
) -> dict[str, Match]:
    """Match the rows of each vocabulary, by its key."""
    matches: dict[str, Match] = {}
    problems: list[str] = []
    for key, dims in groups.items():
        side = SIDES.get(key, "")
        counts = {c: max(sized) for c in everyone if (sized := _rows(c, dims))}
        if everyone[0] not in counts or wanted.owner not in counts:
            continue  # it is reported as missing
        found = {
            c: Vocabulary(c.name, rows, _tokens(c, side, counts, tokens, wanted.owner))
            for c, rows in counts.items()
        }
        of_config = vocabulary_sizes(wanted.owner.config).get(key, needed[key])
        grown = needed[key] - of_config
        if grown and counts[wanted.owner] != of_config:
            problems.append(
                f"{wanted.owner.name}: has {counts[wanted.owner]} rows, its config.json says {key} "
                f"{of_config}; what the rows beyond are is not known, so that none can be added"
            )
            continue
        rows = counts[wanted.owner] + grown
        aim = Vocabulary(wanted.owner.name, rows, wanted.tokens[side])
        matches[key] = Match(aim, found, {})
        for checkpoint, vocabulary in found.items():
            with collecting(problems):
                matches[key].rows[checkpoint] = match(aim, vocabulary)
    refuse(problems)
    return matches


def _tokens(
    model: Checkpoint,
    side: str,
    counts: Mapping[Checkpoint, int],
    tokens: Mapping[tuple[Checkpoint, str], Ids | None],
    owner: Checkpoint,
) -> Ids | None:
    """Return a model's tokens; if it has no tokenizer, those of one with as many rows."""
    donor = next(iter(counts))
    for checkpoint in (model, donor, owner):
        found = tokens[checkpoint, side]
        if found is not None and counts[checkpoint] == counts[model]:
            return found
    return None


def _rows(checkpoint: Checkpoint, dims: Mapping[str, int]) -> list[int]:
    """Return how many entries each tensor of a vocabulary has."""
    shapes = {name: checkpoint.tensors[name].shape for name in dims if name in checkpoint.tensors}
    return [shape[dims[name]] for name, shape in shapes.items() if len(shape) > dims[name]]


def _check_groups(
    structure: Structure, donor: Checkpoint, groups: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse vocabularies whose rows the tokenizers cannot name, where tokenizers differ."""
    others = vocabulary_sizes(structure.config, of_tokens=False)
    embedding = structure.embedding_name(donor.tensors)
    if embedding is not None and not any(embedding in dims for dims in groups.values()):
        if donor.tensors[embedding].shape[0] not in {
            n + i for n in others.values() for i in (0, 1)
        }:
            raise Problems(
                f"{donor.name}: the tokenizers differ, and no vocabulary size of config.json tells "
                f"which tensors have the rows of {embedding}; give all models one tokenizer"
            )
    sizes, sides = vocabulary_sizes(structure.config), sides_of(structure)
    of_side: dict[str, dict[str, int]] = {}
    for key in groups:
        if not key.endswith(PART_OF_THEM):
            side = sides[key] if (donor.tokenizer / sides[key]).is_file() else ""
            of_side.setdefault(side, {})[key] = sizes[key]
    refuse(
        f"{donor.name}: the tokenizers differ, and one tokenizer cannot name the rows of "
        f"vocabularies of several sizes ({', '.join(f'{k} {n}' for k, n in found.items())}); "
        "give all models the same tokenizer"
        for found in of_side.values()
        if len({*found.values()}) > 1
    )
