"""The words of an output: whose tokenizer it has, and what its files and config say of that."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from merging.models.chat_templates import (
    Chat,
    Template,
    choose_template,
    read_template,
    template_files,
)
from merging.models.checkpoints import Checkpoint, text_config
from merging.models.folders import GENERATION_CONFIG, as_json, read_json
from merging.models.structure import Structure
from merging.models.tokens import Tokens, has_tokenizer, read_all_tokens, read_tokens
from merging.models.unions import Union, unite
from merging.models.vocabularies import Matching, Wanted, match_vocabularies, sides_of
from merging.models.vocabulary_reports import lost_markers, other_kinds, row_lines
from merging.models.vocabulary_rows import Matcher
from merging.models.vocabulary_sizes import config_parts, vocabulary_sizes
from merging.problems import Problems, collecting, some
from merging.recipes.recipe import Recipe

IDS = re.compile(r"_token_ids?$|_token_index$|(^|_)suppress_tokens$")  # of tokens, in a config
AllTokens = Mapping[tuple[Checkpoint, str], Tokens | None]


@dataclass(frozen=True)
class Words:
    """What follows of the choice of a tokenizer and a chat template."""

    match: Matcher
    owner: Checkpoint  # whose tokenizer files and generation config the output has
    files: Mapping[str, bytes]  # but for these, which are written anew
    left_out: Sequence[str]  # and for these
    values: Mapping[str, Any]  # of the config, by key
    end_ids: Sequence[int]  # of the tokens that end a turn; none: as the owner says
    notes: Sequence[str]


def settle_words(
    structure: Structure, everyone: Sequence[Checkpoint], recipe: Recipe, trust: bool = False
) -> Words:
    """Choose the words of an output of models, the donor first. Raises Problems."""
    everyone = list(dict.fromkeys(everyone))
    donor = everyone[0]
    sides = {*sides_of(structure).values()} if _has_tokens(structure, donor) else set()
    owner = _owner(recipe, everyone, sides)
    tokens = read_all_tokens(everyone, sides, trust)
    texts = {model: tokens.get((model, "")) for model in everyone}
    notes = []
    if nameless := {c.name for (c, _), found in tokens.items() if found is None}:
        notes.append(f"warning: no tokenizer in {some(nameless)}; vocabularies match by row number")
    output = texts[owner]
    union = (
        _union(structure, everyone, texts, sides, trust) if recipe.tokenizer == "union" else None
    )
    if union is not None:
        output = union.tokens
        notes += _union_lines(union, donor)
    elif recipe.tokenizer is not None and output is not None:
        notes.append(f"tokenizer: that of {owner.name}")
    matching = _matching(structure, everyone, tokens, _wanted(owner, tokens, union, recipe))
    notes += matching.notes
    notes += dict.fromkeys(n for m in matching.matches.values() for n in row_lines(m, donor))
    if recipe.chat_template not in ("auto", "donor") and output == Tokens({}):
        with collecting([]):  # all tokenizers are the same, and so were not read
            output = read_tokens(owner.tokenizer, trust)
    templates = {model: found for model in everyone if (found := read_template(model))}
    chat = choose_template(recipe.chat_template, everyone, owner, templates, texts, output)
    if recipe.embedding_source is None:  # a merge, whose command has options for it
        notes += _token_lines(owner, templates, texts, output, union is not None)
    ends, lines = _ends(chat, owner, texts, output)
    files, left_out = _files(union, chat, owner, ends)
    values = _ids(structure.config, owner) if owner is not donor else {}
    sizes = vocabulary_sizes(donor.config)
    values |= {key: size for key, size in matching.sizes.items() if size != sizes[key]}
    notes += [*chat.notes, *lines]
    return Words(matching.matcher, owner, files, left_out, values, ends, notes)


def _files(
    union: Union | None, chat: Chat, owner: Checkpoint, ends: Sequence[int]
) -> tuple[dict[str, bytes], Sequence[str]]:
    """Return the files that are written anew, and which of the owner's are left out."""
    files: dict[str, bytes] = {} if union is None else dict(union.files)
    left_out: Sequence[str] = ()
    if chat.template is not None and chat.template.owner is not owner:
        more, left_out = template_files(chat.template, owner, files)
        files |= more
    if ends and (owner.folder / GENERATION_CONFIG).is_file():
        content = read_json(owner.name, owner.folder / GENERATION_CONFIG)
        files[GENERATION_CONFIG] = as_json(content | {"eos_token_id": ends})
    return files, left_out


def _owner(recipe: Recipe, everyone: Sequence[Checkpoint], sides: Set[str]) -> Checkpoint:
    """Return whose tokenizer the output has, or starts from.

    Raises Problems if it has none, and others have one.
    """
    if recipe.tokenizer in (None, "base", "union"):
        return everyone[0]
    owner = next(model for model in everyone if model.name == recipe.tokenizer)
    having = {m for m in everyone for side in {"", *sides} if has_tokenizer(m.tokenizer, side)}
    if having and owner not in having:
        raise Problems(f"--tokenizer {owner.name}: there is no tokenizer in {owner.tokenizer}")
    return owner


def _has_tokens(structure: Structure, donor: Checkpoint) -> bool:
    sizes = {*vocabulary_sizes(structure.config).values()}
    has_rows = any(sizes & {*tensor.shape} for tensor in donor.tensors.values())
    return has_rows or structure.embedding_name(donor.tensors) is not None


def _union(
    structure: Structure,
    everyone: Sequence[Checkpoint],
    texts: Mapping[Checkpoint, Tokens | None],
    sides: Set[str],
    trust: bool,
) -> Union:
    apart = {s for s in sides if s and any((c.tokenizer / s).is_file() for c in everyone)}
    if apart or not sides:
        raise Problems(
            f"--tokenizer union: {structure.cls.__name__} has no tokens, or several vocabularies "
            f"({some(apart) or 'none'}); name one of the models"
        )
    rows = {model: _rows(structure, model) for model in everyone}
    return unite(everyone[0], everyone[1:], texts, rows, trust)


def _rows(structure: Structure, model: Checkpoint) -> int:
    """Return how many rows the embedding of a model has."""
    embedding = structure.embedding_name(model.tensors)
    if embedding is not None:
        return model.tensors[embedding].shape[0]
    return max(vocabulary_sizes(model.config).values(), default=0)


def _wanted(owner: Checkpoint, tokens: AllTokens, union: Union | None, recipe: Recipe) -> Wanted:
    named = {side: tokens[owner, side] for model, side in tokens if model is owner}
    ids = {side: None if found is None else found.ids for side, found in named.items()}
    multiple = recipe.pad_to_multiple_of or 1
    if union is None:
        return Wanted(owner, ids, multiple=multiple)
    added = {token: union.tokens.ids[token] for new in union.new.values() for token in new}
    return Wanted(owner, dict.fromkeys(ids, union.tokens.ids), added, multiple)


def _matching(
    structure: Structure, everyone: Sequence[Checkpoint], tokens: AllTokens, wanted: Wanted
) -> Matching:
    ids = {key: None if found is None else found.ids for key, found in tokens.items()}
    return match_vocabularies(structure, everyone, ids, wanted)


def _union_lines(union: Union, donor: Checkpoint) -> list[str]:
    lines = [f"tokenizer: that of {donor.name}, with the tokens that others added to theirs"]
    for name, added in union.new.items():
        ids = [union.tokens.ids[token] for token in added]
        listed = ", ".join(f"{token!r} {i}" for token, i in zip(added[:5], ids, strict=False))
        lines.append(f"tokenizer: {len(added)} of {name} ({listed}{', ...' * (len(added) > 5)})")
    if union.promoted:
        lines.append(
            f"warning: {some(map(repr, union.promoted))}: pieces of words in {donor.name}, special "
            "tokens in others and in the output"
        )
    return lines


def _token_lines(
    owner: Checkpoint,
    templates: Mapping[Checkpoint, Template],
    texts: Mapping[Checkpoint, Tokens | None],
    output: Tokens | None,
    is_union: bool,
) -> list[str]:
    """Return warnings of tokens that are dropped, and of those that are of another kind."""
    known = {model: found for model, found in texts.items() if found is not None}
    if output is None:
        return []
    lines = []
    for model, found in known.items():
        text = templates[model].whole if model in templates else ""
        lines += lost_markers(model, found, output, text, is_union)
    return [*lines, *other_kinds(known, output, owner.name)]


def _ids(config: PretrainedConfig, owner: Checkpoint) -> dict[str, Any]:
    """Return the ids of tokens in the config of a tokenizer's owner, by keys that both have."""
    labels = {label for label, _ in config_parts(config)}
    return {
        label + key: value
        for label, part in config_parts(owner.config)
        if label in labels
        for key, value in part.to_dict().items()
        if IDS.search(key)
    }


def _ends(
    chat: Chat, owner: Checkpoint, texts: Mapping[Checkpoint, Tokens | None], output: Tokens | None
) -> tuple[list[int], list[str]]:
    """Return the ids of tokens that end a text, if they are others than the owner's, and a line.

    Those of the template's owner come first, then those of the tokenizer's.
    """
    giver = None if chat.template is None else chat.template.owner
    if giver is None or giver is owner or output is None or (theirs := texts[giver]) is None:
        return [], []
    own, token_of = end_ids(owner), {number: token for token, number in theirs.ids.items()}
    found, lines = [], []
    for number in end_ids(giver):
        token = token_of.get(number)
        if theirs.ids and token not in output.ids:
            name = f"id {number}" if token is None else repr(token)
            lines.append(f"warning: {giver.name} ends at {name}, which the output does not have")
        else:
            found.append(output.ids.get(token or "", number))
    if {*found} <= {*own}:
        return [], lines
    ends, names = list(dict.fromkeys([*found, *own])), {i: t for t, i in output.ids.items()}
    listed = ", ".join(f"{names[i]!r} ({i})" if i in names else str(i) for i in ends)
    return ends, [*lines, f"generation ends at {listed}, as that of {giver.name}"]


def end_ids(model: Checkpoint) -> list[int]:
    """Return the ids of tokens at which a model's text ends, as transformers would."""
    file, found = model.folder / GENERATION_CONFIG, None
    if file.is_file():
        found = read_json(model.name, file).get("eos_token_id")
    if found is None:
        found = getattr(text_config(model.config), "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return [number for number in listed if isinstance(number, int)]
