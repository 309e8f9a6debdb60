"""Read YAML files: plain values, no key twice, and fields that are checked as they are read.

What is wrong is said with the key's path and line, all of it together.
"""

import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.problems import Problems, reading, refuse
from merging.recipes.user_files import read_text

LARGEST = 1_000_000  # bytes of a file that people write
DEEPEST = 20  # values within values
A_MODEL = "the name of a model"  # what is expected where one is missing
DIGITS = r"[0-9]+\.[0-9]*|\.[0-9]+"


@dataclass(frozen=True)
class Document:
    """What a YAML file holds, in which line each key and entry is, and what is wrong with them."""

    name: str  # of the file
    text: str
    content: Any
    lines: Mapping[str, int]  # by path, such as slices[0].sources
    problems: list[str] = field(default_factory=list)

    def at(self, path: str) -> str:
        """Say where in the file a path is; one that is not there is missing in what is above it."""
        place = path
        while place and place not in self.lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        where = f"{self.name}, line {self.lines[place]}" if place in self.lines else self.name
        return f"{where}: {path}" if path else where

    def wrong(self, path: str, problem: str) -> None:
        self.problems.append(f"{self.at(path)}: {problem}")


def read_yaml(path: Path) -> Document:
    """Return what a YAML file holds. Raises Problems if it is not valid."""
    with reading(path, "not valid YAML"):
        text = read_text(path, LARGEST)
    return parse_yaml(str(path), text)


def parse_yaml(name: str, text: str, first_line: int = 1) -> Document:
    """Return what YAML holds that begins in a line of the named file. Raises Problems."""
    import yaml  # here, as --help does not wait for it

    text = text.removeprefix("\ufeff")  # which editors of Windows write, and cards need not hold
    with reading(name, "not valid YAML"):
        try:
            _check_plain(yaml, text)
            loader = _plain_loader(yaml)(text)
            try:
                root = loader.get_single_node()
                lines, twice = _survey(root, first_line)
                content = None if root is None or twice else loader.construct_document(root)
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{name}, line {mark.line + first_line}" if mark else name
            what = ", ".join(filter(None, [error.context, error.problem]))
            raise Problems(f"{where}: not valid YAML: {what}") from error
    document = Document(name, text, content, lines)
    for key, line in twice:
        document.wrong(key, f"given twice, again in line {line}")
    refuse(document.problems)
    return document


def _check_plain(yaml: Any, text: str) -> None:
    """Refuse YAML that is not one document of plain values."""
    depth = documents = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        problem = None
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            problem = "aliases (*name), or too many brackets; write it out, plainly"
        elif documents > 1:
            problem = "several documents, apart by ---; give each a file of its own"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _plain_loader(yaml: Any) -> Any:
    """Return a loader that takes numbers for numbers, true and false, and all else for text.

    YAML 1.1 reads 010 as 8, 1:30 as 90, and 1e-3 as text.
    """
    loader: Any = type("PlainLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for tag, pattern, starts in (
        ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        (
            "float",
            rf"[-+]?(({DIGITS})(e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|\.(inf|nan))",
            "-+.0123456789",
        ),
        ("bool", "true|false", "tfTF"),
        ("null", "~|null|", ["~", "n", "N", ""]),
    ):
        regex = re.compile(f"^({pattern})$", re.IGNORECASE)
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", regex, list(starts))
    return loader


def _survey(root: Any, first_line: int) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Return the lines of all keys and entries by path, and the keys that are there twice.

    YAML's readers let those pass.
    """
    lines: dict[str, int] = {}
    twice: list[tuple[str, int]] = []
    waiting = [(root, "")]
    while waiting:
        node, path = waiting.pop()
        if node is None or isinstance(node.value, str):
            continue
        for i, entry in enumerate(node.value):
            key, value = entry if isinstance(entry, tuple) else (entry, entry)
            name = f"{path}[{i}]" if key is value else f"{path}.{key.value}".lstrip(".")
            line = key.start_mark.line + first_line
            if name in lines:
                twice.append((name, line))
            lines.setdefault(name, line)
            waiting.append((value, name))
    return lines, twice


class Fields:
    """A mapping whose fields are taken one by one; what is wrong is said to the document."""

    def __init__(
        self,
        document: Document,
        content: Any,
        path: str,
        known: Sequence[str],
        refused: Mapping[str, str] | None = None,  # why, by key
        passed_over: Sequence[str] = (),
    ) -> None:
        self._document, self._path = document, path
        self._is_mapping = isinstance(content, dict)
        self._content = content if isinstance(content, dict) else {}
        if not self._is_mapping:
            needed = f"a mapping with the keys {', '.join(known)}"
            document.wrong(path, f"expected {needed}, found {kind(content)}")
        for key in self._content:
            if refused and key in refused:
                document.wrong(self.at(key), refused[key])
            elif key not in known and key not in passed_over:
                document.wrong(self.at(key), f"unknown key; known are {', '.join(known)}")

    def at(self, key: object) -> str:
        return f"{self._path}.{key}".lstrip(".")

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def take(
        self, key: str, allowed: Callable[[Any], bool], expected: str, default: Any = ...
    ) -> Any:
        """Return a field that is allowed; without one, the default, or None and a problem."""
        if key not in self._content and default is not ...:
            return default
        value = self._content.get(key)
        if self._is_mapping and not allowed(value):
            self._document.wrong(self.at(key), f"expected {expected}, found {kind(value)}")
            return None if default is ... else default
        return value


def is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_number(value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return -sys.float_info.max <= value <= sys.float_info.max
    return False


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def kind(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)
