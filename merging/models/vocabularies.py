"""Match vocabularies by token: which row of a model's embedding is which row of the donor's."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from merging.models.checkpoints import Checkpoint
from merging.models.structure import Structure
from merging.models.tensors import MISSING, LazyTensor, with_rows
from merging.models.tokens import read_all_tokens
from merging.models.vocabulary_sizes import vocabulary_dims, vocabulary_sizes
from merging.problems import Problems, collecting, refuse, some

# Changes a tensor of a model, by its stored name, to have the rows of the donor's of that role.
Matcher = Callable[[Checkpoint, str, LazyTensor], LazyTensor]

# Files with the tokens of one side of a translation, where it has its own, by the key of its size.
SIDES = {
    "src_vocab_size": "vocab-src.json",
    "tgt_vocab_size": "vocab-tgt.json",
    "decoder_vocab_size": "target_vocab.json",
}
PART_OF_THEM = ("vocab_size_per_layer_input", "unpadded_vocab_size")  # the first rows of all


class Vocabulary(NamedTuple):
    """The rows of a model's embedding, and the token of each; tokens is None without tokenizer."""

    model: str
    rows: int
    tokens: Mapping[str, int] | None


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
    if not any(rows.values()):
        return []
    token_of = {number: token for token, number in (donor.tokens or {}).items()}
    fewer = sorted({i for found in rows.values() for i, row in enumerate(found or ()) if row < 0})
    line = f"vocabulary: {donor.rows} rows, {donor.rows - len(fewer)} shared by all models"
    if fewer:
        named = [repr(token_of.get(number, f"row {number}")) for number in fewer[:5]]
        line += f"; {len(fewer)} from fewer models ({', '.join(named)}{', ...' * (len(fewer) > 5)})"
    lines = [line]
    for name, vocabulary in models.items():
        tokens = vocabulary.tokens or {}
        dropped = sorted(tokens.keys() - (donor.tokens or {}).keys())
        if dropped:
            listed = some(map(repr, dropped))
            lines.append(f"vocabulary: {len(dropped)} tokens of {name} are dropped ({listed})")
        pairs = [(token, token_of.get(tokens[token])) for token in dropped]
        renamed = [f"{old!r} as {new!r}" for old, new in pairs if new and new not in tokens]
        if renamed:
            lines.append(
                f"vocabulary: {len(renamed)} of these stand in rows that {donor.model} names "
                f"otherwise ({some(renamed)}); if they are one token renamed, name it alike in "
                "both tokenizers to merge its row"
            )
    return lines


def match_vocabularies(
    structure: Structure, donor: Checkpoint, *models: Checkpoint, trust: bool = False
) -> tuple[Matcher, list[str]]:
    """Match the vocabularies of models with the donor's, by token.

    Returns what matches the rows of their tensors with the donor's, and lines for the user. Raises
    Problems.
    """
    as_it_is: Matcher = lambda model, name, given: model.tensors[name]  # noqa: E731
    sizes, everyone = vocabulary_sizes(structure), list(dict.fromkeys((donor, *models)))
    embedding = structure.embedding_name(donor.tensors)
    has_rows = any({*sizes.values()} & {*t.shape} for t in donor.tensors.values())
    if embedding is None and not has_rows:
        return as_it_is, []
    sides = {key: SIDES.get(key, "") for key in sizes} or {"": ""}
    tokens = read_all_tokens(everyone, {*sides.values()}, trust)
    notes = []
    if nameless := {c.name for (c, _), found in tokens.items() if found is None}:
        notes.append(f"warning: no tokenizer in {some(nameless)}; vocabularies match by row number")
    differ = any(
        found is not None and tokens[donor, side] not in (None, found)
        for (_, side), found in tokens.items()
    )
    if not differ and all(
        tensor.shape == donor.tensors[name].shape
        for checkpoint in everyone
        for name, tensor in checkpoint.tensors.items()
        if name in donor.tensors
    ):
        return as_it_is, notes
    groups = vocabulary_dims(structure, {n: 0 for c in everyone for n in c.tensors})
    if differ:
        others = vocabulary_sizes(structure, of_tokens=False)
        _check_groups(structure, donor, groups, embedding, sides)
        notes += [f"warning: rows of {key} are no tokens; they match by number" for key in others]
    of_keys = {key: {c: tokens[c, sides[key]] for c in everyone} for key in groups}
    matches, lines = _match_groups(donor, groups, of_keys)
    return _matcher(donor, groups, matches), notes + lines


def _match_groups(
    donor: Checkpoint,
    groups: Mapping[str, Mapping[str, int]],
    tokens: Mapping[str, Mapping[Checkpoint, Mapping[str, int] | None]],
) -> tuple[dict[tuple[Checkpoint, str], list[int] | None], list[str]]:
    """Match the rows of each vocabulary; return them by model and key, and lines for the user."""
    matches: dict[tuple[Checkpoint, str], list[int] | None] = {}
    problems: list[str] = []
    notes: list[str] = []
    for key, dims in groups.items():
        found = {
            checkpoint: Vocabulary(checkpoint.name, max(rows), named)
            for checkpoint, named in tokens[key].items()
            if (rows := _rows(checkpoint, dims))
        }
        if donor not in found:
            continue  # it is reported as missing
        of_key: dict[str, list[int] | None] = {}
        for checkpoint, vocabulary in found.items():
            with collecting(problems):
                of_key[checkpoint.name] = match(found[donor], vocabulary)
                matches[checkpoint, key] = of_key[checkpoint.name]
        notes += report(found[donor], {c.name: v for c, v in found.items()}, of_key)
    refuse(problems)
    return matches, list(dict.fromkeys(notes))


def _rows(checkpoint: Checkpoint, dims: Mapping[str, int]) -> list[int]:
    """Return how many entries each tensor of a vocabulary has."""
    shapes = {name: checkpoint.tensors[name].shape for name in dims if name in checkpoint.tensors}
    return [shape[dims[name]] for name, shape in shapes.items() if len(shape) > dims[name]]


def _check_groups(
    structure: Structure,
    donor: Checkpoint,
    groups: Mapping[str, Mapping[str, int]],
    embedding: str | None,
    sides: Mapping[str, str],
) -> None:
    """Refuse vocabularies whose rows the tokenizers cannot name, where tokenizers differ."""
    others = vocabulary_sizes(structure, of_tokens=False)
    if embedding is not None and not any(embedding in dims for dims in groups.values()):
        if donor.tensors[embedding].shape[0] not in {
            n + i for n in others.values() for i in (0, 1)
        }:
            raise Problems(
                f"{donor.name}: the tokenizers differ, and no vocabulary size of config.json tells "
                f"which tensors have the rows of {embedding}; give all models one tokenizer"
            )
    sizes = vocabulary_sizes(structure)
    of_side: dict[str, dict[str, int]] = {}
    for key in groups:
        if not key.endswith(PART_OF_THEM):
            side = sides[key] if (donor.folder / sides[key]).is_file() else ""
            of_side.setdefault(side, {})[key] = sizes[key]
    refuse(
        f"{donor.name}: the tokenizers differ, and one tokenizer cannot name the rows of "
        f"vocabularies of several sizes ({', '.join(f'{k} {n}' for k, n in found.items())}); "
        "give all models the same tokenizer"
        for found in of_side.values()
        if len({*found.values()}) > 1
    )


def _matcher(
    donor: Checkpoint,
    groups: Mapping[str, Mapping[str, int]],
    matches: Mapping[tuple[Checkpoint, str], list[int] | None],
) -> Matcher:
    """Return what gives tensors the donor's rows, where they are others."""
    places = {name: (key, dim) for key, dims in groups.items() for name, dim in dims.items()}

    def matched(model: Checkpoint, name: str, given: LazyTensor) -> LazyTensor:
        tensor = model.tensors[name]
        key, dim = places.get(name, ("", 0))
        rows = matches.get((model, key))
        if rows is None or len(tensor.shape) <= dim or len(given.shape) <= dim:
            return tensor
        if given is tensor and model is not donor:  # the donor has none of that name
            if MISSING in rows:
                raise Problems(
                    f"{model.name}: {name} lacks {rows.count(MISSING)} of the {len(rows)} rows of "
                    f"{donor.name}'s vocabulary, which has no such tensor to take them from"
                )
            return with_rows(tensor, dim, rows, tensor)
        wanted = given.shape[dim]
        if wanted > len(rows):
            return tensor  # a difference of shapes, reported as such
        return with_rows(tensor, dim, rows[:wanted], given)

    return matched
