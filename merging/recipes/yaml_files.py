"""Read YAML files: plain values, no key twice, and fields that are checked as they are read."""

import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from merging.problems import Problems, reading
from merging.recipes.user_files import read_text

LARGEST = 1_000_000  # bytes of a file that people write
DEEPEST = 20  # values within values
DIGITS = r"[0-9]+\.[0-9]*|\.[0-9]+"


def read_yaml(path: Path) -> tuple[Any, str]:
    """Return what a YAML file holds, and its text. Raises Problems if it is not valid."""
    import yaml  # here, as --help does not wait for it

    with reading(path, "not valid YAML"):
        text = read_text(path, LARGEST)
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                raise ValueError("aliases (*name), or too many brackets; write it out, plainly")
        loader = _plain_loader(yaml)(text)
        try:
            node = loader.get_single_node()
            if twice := _duplicate_key(node):
                raise Problems(f"{path}: {twice}")
            return (None if node is None else loader.construct_document(node)), text
        finally:
            loader.dispose()


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


def _duplicate_key(root: Any) -> str:
    """Say where a mapping has a key twice, which YAML's readers let pass; nothing if none has."""
    seen: set[int] = set()  # aliases may name a node a million times
    waiting = [(root, "")]
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen or node is None or isinstance(node.value, str):
            continue
        seen.add(id(node))
        keys: set[Any] = set()
        for i, entry in enumerate(node.value):
            if not isinstance(entry, tuple):
                waiting.append((entry, f"{path}[{i}]"))
                continue
            key, value = entry
            name = f"{path}.{key.value}".lstrip(".")
            if isinstance(key.value, str) and key.value in keys:
                return f"{name}: given twice, again in line {key.start_mark.line + 1}"
            keys.add(key.value if isinstance(key.value, str) else None)
            waiting.append((value, name))
    return ""


class Fields:
    """A mapping whose fields are taken one by one; what is wrong is added to the problems."""

    def __init__(self, content: Any, path: str, known: Sequence[str], problems: list[str]) -> None:
        self._path, self._problems = path, problems
        self._is_mapping = isinstance(content, dict)
        self._content = content if isinstance(content, dict) else {}
        if not self._is_mapping:
            needed = f"a mapping with the keys {', '.join(known)}"
            problems.append(f"{path}: ".lstrip(": ") + f"expected {needed}, found {kind(content)}")
        for key in self._content:
            if key not in known:
                problems.append(f"{self.at(key)}: unknown key; known are {', '.join(known)}")

    def at(self, key: object) -> str:
        return f"{self._path}.{key}".lstrip(".")

    def take(
        self, key: str, allowed: Callable[[Any], bool], expected: str, default: Any = ...
    ) -> Any:
        """Return a field that is allowed; without one, the default, or None and a problem."""
        if key not in self._content and default is not ...:
            return default
        value = self._content.get(key)
        if self._is_mapping and not allowed(value):
            self._problems.append(f"{self.at(key)}: expected {expected}, found {kind(value)}")
            return None if default is ... else default
        return value


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
