"""Chat templates: which models have one, whose the output gets, and what that needs."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from merging.models.checkpoints import Checkpoint
from merging.models.folders import as_json, files_of_a_model, read_json
from merging.models.tokens import ROLES, Tokens, roles
from merging.problems import Problems, reading
from merging.recipes.model_names import as_path
from merging.recipes.user_files import read_text

OWN_FILE, OTHERS_FILES = "chat_template.jinja", "additional_chat_templates"
NAME = re.compile(r"[\w.-]+")
ROLE = re.compile(rf"\b({'|'.join(ROLES)})\b")
MARKED = re.compile(r"<\|[^<>|\s]+\|>")  # what can be nothing but a token, in a template's text


class Template(NamedTuple):
    """A chat template, and others that go with it by name."""

    texts: Mapping[str, str]  # the one that is taken unless another is named is "default"
    owner: Checkpoint | None = None  # None: of a file, or a text that was given

    @property
    def whole(self) -> str:
        return "\n".join(self.texts.values())


def read_template(model: Checkpoint) -> Template | None:
    """Return a model's chat template; None if it has none that can be read.

    As in transformers, a file of its own goes before the tokenizer's configuration.
    """
    files = files_of_a_model(model.folder, model.tokenizer)
    texts: dict[str, str] = {}
    try:
        for name in ("chat_template.json", "tokenizer_config.json"):
            if name in files:
                texts = _listed(read_json(model.name, files[name]).get("chat_template")) or texts
        if OWN_FILE in files:
            texts = {"default": read_text(files[OWN_FILE])}
        for name, path in files.items():
            if Path(name).parent.name == OTHERS_FILES:
                texts.setdefault(path.stem, read_text(path))
        "".join(texts.values()).encode()
    except (Problems, OSError, ValueError):
        return None
    return Template(texts, model) if "default" in texts else None


def _listed(value: object) -> dict[str, str]:
    """Return the templates of a configuration: one, or several with names."""
    if isinstance(value, str):
        return {"default": value}
    entries = (
        [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    )
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)}


class Chat(NamedTuple):
    """The chat template of an output, None if it has none, and lines that say why."""

    template: Template | None
    notes: Sequence[str] = ()


def choose_template(
    wish: str,
    everyone: Sequence[Checkpoint],
    owner: Checkpoint,
    found: Mapping[Checkpoint, Template],
    tokens: Mapping[Checkpoint, Tokens | None],
    output: Tokens | None,
) -> Chat:
    """Choose a chat template for an output with the tokenizer of `owner`, the donor coming first.

    `found` are the templates of those that have one. `auto` takes the owner's, else the donor's,
    else that of the others, if they agree in it and the output has its tokens. Raises Problems for
    what cannot be had.
    """
    if wish == "auto":
        return _automatic(everyone, owner, found, tokens, output)
    named = {model.name: model for model in reversed(everyone)}
    if wish == "donor" or wish in named:
        model = everyone[0] if wish == "donor" else named[wish]
        if model is owner and wish == "donor":
            return Chat(found.get(model))
        if model not in found:
            raise Problems(f"--chat-template {wish}: {model.name} has no chat template")
        template, whose = found[model], f"that of {model.name}"
    else:
        template, whose = _given(wish, named), "as given"
        same = [model for model in found if found[model].texts == template.texts]
        template = template._replace(owner=next(iter(same), None))
    notes = [f"chat template: {whose}"]
    if lacking := lacking_tokens(template, tokens, output):
        notes.append(
            f"warning: the chat template needs {_quoted(lacking)}, which are no tokens of the "
            f"output{_remedy(template)}"
        )
    return Chat(template, notes)


def _given(wish: str, names: Mapping[str, object]) -> Template:
    """Return the template of a file, or of the text itself."""
    if "{" in wish or "\n" in wish:
        text, name = wish, "its text"
    elif as_path(wish).is_file():
        name = wish
        with reading("--chat-template", name):
            text = read_text(as_path(wish))
    else:
        raise Problems(
            f"--chat-template {wish}: expected auto, donor, a model that is merged "
            f"({', '.join(names)}), or a file"
        )
    with reading("--chat-template", f"{name} is no template"):
        render_jinja_template([], chat_template=text)  # of no conversation: only to read it
    return Template({"default": text})


def _automatic(
    everyone: Sequence[Checkpoint],
    owner: Checkpoint,
    found: Mapping[Checkpoint, Template],
    tokens: Mapping[Checkpoint, Tokens | None],
    output: Tokens | None,
) -> Chat:
    """Take the tokenizer's own template, else the donor's, else what the others agree in."""
    if owner in found:
        return Chat(found[owner], [f"chat template: that of {owner.name}"])
    if not found or output is None:
        return Chat(None)
    first = {everyone[0]: found[everyone[0]]} if everyone[0] in found else found
    template = next(iter(first.values()))
    names = ", ".join(model.name for model in first)
    if any(other.texts != template.texts for other in first.values()):
        why = f"{owner.name} has none, and those of {names} differ; choose by --chat-template MODEL"
        return Chat(None, [f"chat template: none; {why}"])
    if lacking := lacking_tokens(template, tokens, output):
        why = f"that of {names} needs {_quoted(lacking)}, which are no tokens of the output"
        return Chat(None, [f"warning: chat template: none; {why}{_remedy(template)}"])
    return Chat(template, [f"chat template: that of {names}, as {owner.name} has none"])


def lacking_tokens(
    template: Template, tokens: Mapping[Checkpoint, Tokens | None], output: Tokens | None
) -> list[str]:
    """Return the tokens that a template writes and an output does not have."""
    if output is None or not output.ids:
        return []
    needed = MARKED.findall(template.whole)
    if template.owner is not None and (own := tokens[template.owner]) is not None:
        by_role = roles(template.owner.tokenizer)
        needed = [token for token in own.added if token in template.whole]
        needed += [by_role[role] for role in ROLE.findall(template.whole) if role in by_role]
    return [token for token in dict.fromkeys(needed) if token not in output.ids]


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens))


def _remedy(template: Template) -> str:
    if template.owner is None:
        return ""
    return f"; --tokenizer union has them too, --tokenizer {template.owner.name} has its own tokens"


def template_files(
    template: Template, owner: Checkpoint, made: Mapping[str, bytes]
) -> tuple[dict[str, bytes], list[str]]:
    """Return files that put a template into the place of the one of a tokenizer.

    And which of that tokenizer's are to be left out. `made` are those that are written anew anyway.
    """
    own = files_of_a_model(owner.folder, owner.tokenizer)
    left_out = [name for name in own if "chat_template" in name]
    start = _settings(template, owner)
    files = {OWN_FILE: start + template.texts["default"].encode()}
    for name, text in template.texts.items():
        if name != "default" and NAME.fullmatch(name):
            files[f"{OTHERS_FILES}/{name}.jinja"] = start + text.encode()
    config = "tokenizer_config.json"
    if config in own:
        content = json.loads(made[config]) if config in made else read_json(owner.name, own[config])
        if content.pop("chat_template", None) is not None:
            files[config] = as_json(content)
    return files, left_out


def _settings(template: Template, owner: Checkpoint) -> bytes:
    """Return what makes a template write its own tokens where it names them by role."""
    if template.owner is None or template.owner is owner:
        return b""
    theirs, own = roles(template.owner.tokenizer), roles(owner.tokenizer)
    named = [role for role in ROLES if re.search(rf"\b{role}\b", template.whole)]
    settings = [
        f"{{%- set {role} = {json.dumps(theirs[role], ensure_ascii=False)} %}}{{{{- '' }}}}"
        for role in named
        if role in theirs and theirs[role] != own.get(role)
    ]
    return "".join(settings).encode("utf-8", "backslashreplace")
