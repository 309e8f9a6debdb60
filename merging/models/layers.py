"""Where tensors stand among a model's numbered layers."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from merging.models.checkpoints import Checkpoint, text_config, value_of
from merging.models.folders import DEPTHS, OTHER_DEPTHS, parts_of
from merging.problems import Problems, some

NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<index>\d+)\.(?P<part>.+)$")


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a checkpoint's decoder: for each, its tensors by their last part."""

    prefix: str
    parts: Sequence[Mapping[str, str]]  # one {part: stored name} per layer
    others: Sequence[str]  # stored names outside the layers
    beyond: frozenset[str]  # numbered like layers, but above the depth: to predict more tokens


FEW = 200  # layers that a config may ask for though they have no tensors: some are used again
PARTS = (
    "a model of several parts, such as vision and text, whose other tensors belong to no layer; "
    "stack its text model alone, saved as a model of its own"
)


def depth_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Find numbers of layers beyond those of the stored names, before anything is made for each."""
    numbers: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        if match := NUMBERED.match(name):
            numbers.setdefault(match["stack"], set()).add(match["index"])
    stored = max(map(len, numbers.values()), default=0)
    for part in parts_of(checkpoint.config.to_dict()):
        for key in (*DEPTHS, *OTHER_DEPTHS):
            if isinstance(depth := part.get(key), int) and depth > max(stored, FEW):
                yield (
                    f"{checkpoint.name}: config.json says {key} {depth}, but the tensors are of "
                    f"{stored} layers at most"
                )


def find_layers(checkpoint: Checkpoint) -> Layers:
    """Find the one stack of numbered tensors that is as deep as the config says."""
    config = text_config(checkpoint.config)
    found = (value_of(config, key) for key in DEPTHS)
    depths = [depth for depth in found if isinstance(depth, int) and depth > 0]
    if not depths:
        raise Problems(f"{checkpoint.name}: {PARTS}")
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in checkpoint.tensors:
        if match := NUMBERED.match(name):
            layers = stacks.setdefault(match["stack"], {})
            layers.setdefault(int(match["index"]), {})[match["part"]] = name
    fitting: list[str] = []
    for depth in depths:
        numbers = set(range(depth))
        fitting = [prefix for prefix, layers in stacks.items() if layers.keys() >= numbers]
        if fitting:
            break
    if len(fitting) != 1:
        several = f"; {PARTS}" if len(fitting) > 1 else ""
        raise Problems(
            f"{checkpoint.name}: expected one stack of {depths[0]} numbered layers, found "
            f"{some(fitting) if fitting else 'none'}; layers are stacked of decoders alone"
            f"{several}"
        )
    chosen = stacks[fitting[0]]
    numbered = {name for layer in chosen.values() for name in layer.values()}
    others = [name for name in checkpoint.tensors if name not in numbered]
    beyond = {name for i in chosen.keys() - set(range(depth)) for name in chosen[i].values()}
    return Layers(fitting[0], [chosen[i] for i in range(depth)], others, frozenset(beyond))


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the stacks of numbered layers by their names' beginning, and how many each has.

    Numbered modules that are made of no others, as in the two linears of a projector, are no
    layers.
    """
    sizes: dict[str, int] = {}
    composite = set()
    for name in names:
        if match := NUMBERED.match(name):
            sizes[match["stack"]] = max(sizes.get(match["stack"], 0), int(match["index"]) + 1)
            if "." in match["part"]:
                composite.add(match["stack"])
    return {stack: size for stack, size in sizes.items() if stack in composite}


def places(
    names: Iterable[str], before: Container[str], depth: int, beyond: int = 0
) -> dict[str, float]:
    """Map names of tensors to their places: i / (n - 1) for layer i of n, else 0 or 1.

    0 for those `before` the layers (embeddings), 1 for all others (final norm, head). Each stack of
    numbered layers (encoder, decoder, vision tower) counts its own. Those `beyond` the `depth` of
    a decoder, which predict more tokens, are at 1.
    """
    names = list(names)
    sizes = stacks(names)

    def place(name: str) -> float:
        match = NUMBERED.match(name)
        if any(part.startswith("mtp") for part in name.split(".")):
            return 1.0
        if not match or match["stack"] not in sizes:
            return 0.0 if name in before else 1.0
        size = sizes[match["stack"]]
        size -= beyond if size == depth + beyond else 0
        return min(1.0, int(match["index"]) / (size - 1)) if size > 1 else 0.0

    return {name: place(name) for name in names}
