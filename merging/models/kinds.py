"""What kind of tensor a name stands for, and in which layer, as people speak of models."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from merging.models.layers import NUMBERED, stacks

KINDS = ("embedding", "attention", "MLP", "experts", "norms", "head", "other")
VALUES = re.compile(r"^(weight|bias|scale|running_\w+|num_\w+|\d+)$", re.IGNORECASE)
# Of the modules in a tensor's name, whichever comes first below decides.
NORM = re.compile(r"norm|layrnorm|^ln(_|\d|$)|_ln$", re.IGNORECASE)  # of the last module
EXPERTS = re.compile(r"expert|^(\w+_)?moe$|^router$", re.IGNORECASE)
ROUTER = re.compile(r"(mlp|moe|ffn|feed_forward)\.gate(\.|$)", re.IGNORECASE)
HEAD = re.compile(
    r"^(lm_head|embed_out|unembed\w*|output|output_projection|score|classifier|cls|qa_outputs"
    r"|proj_out|final_logits_bias|\w+_head)$"
)
EMBEDDING = re.compile(r"(?<!un)embed|^(wte|wpe|shared)$", re.IGNORECASE)
ATTENTION = re.compile(r"attn|attention|qkv", re.IGNORECASE)
MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense_?relu|^fc_?\d|^c_fc$|^intermediate$|^output$|^(w|lin)[123]$|^ff$",
    re.IGNORECASE,
)


class Layer(NamedTuple):
    """A layer of a model: which of its stacks, in words if it has several, and the number."""

    stack: str
    number: int

    def __str__(self) -> str:
        return f"{self.stack} {self.number}".lstrip()


def layers_of(names: Iterable[str]) -> dict[str, Layer | None]:
    """Map names of tensors to their layers; None for those outside of all layers."""
    names = list(names)
    words = _words(list(stacks(names)))

    def layer_of(name: str) -> Layer | None:
        match = NUMBERED.match(name)
        if match is None or match["stack"] not in words:
            return None
        return Layer(words[match["stack"]], int(match["index"]))

    return {name: layer_of(name) for name in names}


def _words(paths: Sequence[str]) -> dict[str, str]:
    """Return for each stack's path the first part of it that not all of them have."""
    if len(paths) < 2:
        return dict.fromkeys(paths, "")
    shared = set.intersection(*(set(path.split(".")) for path in paths))
    words = {p: next((part for part in p.split(".") if part not in shared), p) for p in paths}
    return words if len(set(words.values())) == len(paths) else {path: path for path in paths}


def kind_of(name: str, in_layer: bool) -> str:
    """Return the kind of a tensor, one of KINDS."""
    modules = [part for part in name.split(".") if not VALUES.match(part)]
    if not modules:
        return "other"

    def has(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(module) for module in modules)

    if NORM.search(modules[-1]):
        return "norms"
    if has(EXPERTS) or ROUTER.search(name):
        return "experts"
    if not in_layer and has(HEAD):
        return "head"
    if not in_layer and has(EMBEDDING):
        return "embedding"
    if has(ATTENTION):
        return "attention"
    return "MLP" if has(MLP) else "other"
