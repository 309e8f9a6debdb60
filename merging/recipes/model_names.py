"""Names of models as users give them: a directory or a Hub id, and BASE+ADAPTER."""

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")


def split_adapter(model: str) -> tuple[str, str | None]:
    """Split BASE+ADAPTER. What exists as a whole is a path; a path may have a + of its own.

    Raises ValueError if one is empty.
    """
    if "+" not in model or as_path(model).exists():
        return model, None
    splits = [(model[:i], model[i + 1 :]) for i, sign in enumerate(model) if sign == "+"]
    sensible = [pair for pair in splits if all(map(_could_be_model, pair))]
    parts = model.split("+")
    if not sensible and len(parts) > 2 and all(map(_could_be_model, parts)):
        raise ValueError(f"{model}: expected BASE+ADAPTER, one adapter is taken")
    base, adapter = (sensible or splits)[-1]
    if not base or not adapter:
        raise ValueError(f"{model}: expected BASE+ADAPTER, one of them is empty")
    return base, adapter


def as_path(model: str) -> Path:
    return Path(os.path.expanduser(model))


def _could_be_model(name: str) -> bool:
    return bool(name) and bool(HUB_ID.match(name) or as_path(name).exists())


def is_local(model: str) -> bool:
    """Whether a name is meant as a path: it exists, or no Hub id looks like it."""
    repo = model.partition("@")[0]
    looks_like_path = model.startswith((".", "/", "~")) or "\\" in model or repo.count("/") > 1
    return looks_like_path or Path(model).exists()
