"""What is told of vocabularies before work starts: rows shared, apart and dropped, by token."""

import re
from collections.abc import Iterable, Mapping

from merging.models.checkpoints import Checkpoint
from merging.models.tokens import Tokens
from merging.models.vocabularies import Match, Vocabulary
from merging.problems import printable, some

MOST_NAMED = 50  # tokens in a line
# Tokens that mark the turns of a chat, as their makers call them.
TURN_MARKER = re.compile(
    r"[<\[{]\S*(im_start|im_end|im_sep|turn|header|eot|eom|inst|user|assistant|system|human|bot|role"
    r"|message|channel|think|tool|end_of|start_of|begin_of|\|end\|)\S*[>\]}]",
    re.IGNORECASE,
)


def row_lines(match: Match, donor: Checkpoint) -> list[str]:
    """Return lines that say how many rows all models share, and what becomes of the others."""
    if not any(match.rows.values()):
        return []
    token_of = {number: token for token, number in (match.wanted.tokens or {}).items()}
    fewer = sorted({i for rows in match.rows.values() for i, r in enumerate(rows or ()) if r < 0})
    count = match.wanted.rows
    line = f"vocabulary: {count} rows, {count - len(fewer)} shared by all models"
    if fewer:
        named = [repr(token_of.get(number, f"row {number}")) for number in fewer[:5]]
        line += f"; {len(fewer)} from fewer models ({', '.join(named)}{', ...' * (len(fewer) > 5)})"
    lines = [line]
    apart = [i for i, row in enumerate(match.rows[donor] or ()) if row < 0]
    nobody = [i for i in apart if all(_is_missing(rows, i) for rows in match.rows.values())]
    if named := [repr(token_of[i]) for i in sorted({*apart} - {*nobody}) if i in token_of]:
        lines.append(
            f"vocabulary: {len(named)} tokens that {donor.name} lacks ({some(named)}) are the "
            "weighted mean of the models that have them"
        )
    if nobody:
        lines.append(f"vocabulary: {len(nobody)} new rows of padding are the mean of the others")
    for model, vocabulary in match.models.items():
        lines += _model_lines(match, token_of, vocabulary, match.rows.get(model))
    return lines


def _is_missing(rows: list[int] | None, i: int) -> bool:
    return rows is not None and rows[i] < 0


def _model_lines(
    match: Match, token_of: Mapping[int, str], model: Vocabulary, rows: list[int] | None
) -> list[str]:
    """Return lines on the tokens of a model that are moved, dropped, or renamed."""
    lines = []
    tokens = model.tokens or {}
    moved = [
        token_of[i] for i, row in enumerate(rows or ()) if row not in (-1, i) and i in token_of
    ]
    if moved:
        listed = some(map(repr, moved))
        lines.append(
            f"vocabulary: {len(moved)} tokens of {model.model} have other ids there ({listed}); "
            "their rows are matched by token"
        )
    dropped = sorted(tokens.keys() - (match.wanted.tokens or {}).keys())
    if dropped:
        listed = some(map(repr, dropped))
        lines.append(f"vocabulary: {len(dropped)} tokens of {model.model} are dropped ({listed})")
    pairs = [(token, token_of.get(tokens[token])) for token in dropped]
    renamed = [f"{old!r} as {new!r}" for old, new in pairs if new and new not in tokens]
    if renamed:
        lines.append(
            f"vocabulary: {len(renamed)} of these stand in rows that {match.wanted.model} names "
            f"otherwise ({some(renamed)}); if they are one token renamed, name it alike in "
            "both tokenizers to merge its row"
        )
    return lines


def lost_markers(
    model: Checkpoint, tokens: Tokens, output: Tokens, template: str, is_union: bool
) -> list[str]:
    """Warn of a model's tokens for turns that an output lacks, all by name, and how to keep them.

    Those that look like it, and those of its added tokens that its chat template writes.
    """
    dropped = [token for token in tokens.ids if token not in output.ids]
    lost = [
        token
        for token in sorted(dropped, key=tokens.ids.__getitem__)
        if TURN_MARKER.fullmatch(token) or (token in tokens.added and token in template)
    ]
    if not lost:
        return []
    remedy = f"--tokenizer {model.name} takes its tokenizer"
    remedy = remedy if is_union else f"--tokenizer union keeps them, {remedy}"
    named = ", ".join(printable(repr(token)) for token in lost[:MOST_NAMED])
    named += f" and {len(lost) - MOST_NAMED} more" * (len(lost) > MOST_NAMED)
    return [f"warning: chat tokens of {model.name} are dropped: {named}; {remedy}"]


def other_kinds(models: Mapping[Checkpoint, Tokens], output: Tokens, owner: str) -> Iterable[str]:
    """Warn of tokens that are special in one model and plain in another, which is the output's."""
    for model, tokens in models.items():
        for special in (True, False):
            other = [
                token
                for token in (tokens.added if special else output.added)
                if token in tokens.ids
                and token in output.ids
                and _is_special(tokens, token) == special != _is_special(output, token)
            ]
            if other:
                here, there = ("special", "plain") if special else ("plain", "special")
                shown = "shown in" if special else "left out of"
                yield (
                    f"warning: {len(other)} tokens are {here} in {model.name} and {there} in "
                    f"{owner} ({some(map(repr, other))}); they are {there} in the output, and so "
                    f"{shown} decoded text without special tokens"
                )


def _is_special(tokens: Tokens, token: str) -> bool:
    return token in tokens.added and bool(tokens.added[token].special)
