"""Prove that each layer of a stack is, and computes, what it is in its model.

Types and settings of a layer's modules are compared with those that transformers gives it in its
own model: whatever a config says of layers, and in whatever form, shows there.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from merging.models.structure import Structure
from merging.models.trial import modules_in_order, uses_cache
from merging.problems import cause, some

Kinds = dict[str, Any]
NUMBER_OF_A_LAYER = re.compile(
    r"idx|index|layer_id|layer_number|num_hidden_layers|^_|^training$|^store_full_length_kv$"
)
# Settings by which a layer computes otherwise than in its place before, but is of the same kind.
DEPENDS_ON_NUMBER = re.compile(r"\.seed$")
OF_FORWARD = re.compile(r"inverse_layer_idx")  # config keys that say that a number is computed with


def _kinds(layer: nn.Module) -> Kinds:
    """Return what each module in a layer is and is set to, but for the layer's own number."""
    found: Kinds = {}
    for name, part in layer.named_modules():
        found[name] = type(part).__name__
        for key, value in vars(part).items():
            is_setting = value is None or isinstance(value, bool | int | float | str)
            if is_setting and not NUMBER_OF_A_LAYER.search(key):
                found[f"{name}.{key}"] = value
    return found


def _layers(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def compare_layers(
    output: nn.Module,
    models: Mapping[str, nn.Module],
    chosen: Sequence[tuple[str, int]],
    donor: str,
    path: str,
) -> tuple[list[str], list[str]]:
    """Return problems: layers of another kind than in their model; and notes on other numbers.

    `path` is where all of the models have their layers. What is the same in all layers of another
    model than the donor differs between their configs, of which the user has been told.
    """
    kinds = {
        name: [_kinds(layer) for layer in _layers(model, path)] for name, model in models.items()
    }
    problems: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for n, layer in enumerate(_layers(output, path)):
        name, i = chosen[n]
        found, wanted = _kinds(layer), kinds[name][i]
        for key in sorted(found.keys() | wanted.keys()):
            value, expected = found.get(key), wanted.get(key)
            everywhere = all(other.get(key) == expected for other in kinds[name])
            if value == expected or (everywhere and name != donor):
                continue
            number = isinstance(value, float) and isinstance(expected, float)
            to = notes if number or DEPENDS_ON_NUMBER.search(key) else problems
            to.setdefault(key.lstrip("."), []).append(f"{n} ({value}, in {name} {expected})")
    return (
        [
            f"{donor}: its config cannot say of which kind the chosen layers are: {key} of layer "
            f"{some(layers)}; choose slices in which layers of that kind keep their places"
            for key, layers in problems.items()
        ],
        [
            f"warning: {key} depends on a layer's number or the depth, so these layers compute "
            f"differently than in their model: {some(layers)}"
            for key, layers in notes.items()
        ],
    )


def mixed_kinds(
    models: Mapping[str, nn.Module],
    chosen: Sequence[Sequence[tuple[str, int]]],
    followed: Sequence[tuple[str, int]],
    path: str,
) -> list[str]:
    """Return notes on layers that are made of layers of different kinds.

    `chosen` are the layers that each is made of, `followed` the one among them whose kind it has.
    """
    kinds = {
        name: [_kinds(layer) for layer in _layers(model, path)] for name, model in models.items()
    }
    found: dict[str, list[str]] = {}
    for n, (layers, (leader, j)) in enumerate(zip(chosen, followed, strict=True)):
        for name, i in layers:
            own, wanted = kinds[name][i], kinds[leader][j]
            for key in sorted(own.keys() | wanted.keys()):
                value, expected = own.get(key), wanted.get(key)
                everywhere = all(
                    kind.get(key) == kinds[model][0].get(key)
                    for model in (name, leader)
                    for kind in kinds[model]
                )  # which is a difference of their configs, of which the user has been told
                if value != expected and not everywhere:
                    text = f"{n} ({expected}; {value} in layer {i} of {name})"
                    found.setdefault(key.lstrip("."), []).append(text)
    return [
        f"warning: layers of different kinds are merged: {key} of layer {some(layers)}"
        for key, layers in found.items()
    ]


def odd_parts(
    structure: Structure,
    output: nn.Module,
    tensors: Iterable[str],
    path: str,
    chosen: Sequence[tuple[str, int]],
) -> Iterator[str]:
    """Find tensors of layers that the class has no place for, or wants, in the layers' new places.

    Some classes give a part to the first or the last of all layers alone.
    """
    own = {name for name in output.state_dict() if name.startswith(f"{path}.")}
    given = {n for n in structure.parameters_of(tensors).values() if n.startswith(f"{path}.")}
    for names, verb in ((given - own, "builds no"), (own - given, "builds a")):
        numbers = {int(name.removeprefix(f"{path}.").partition(".")[0]) for name in names}
        models = {name for n, (name, _) in enumerate(chosen) if n in numbers} or dict(chosen)
        if names:
            yield (
                f"{some(models)}: {structure.cls.__name__} {verb} {some(names)} into layers in "
                "these places, of the first or last layer, say; keep such layers where they were "
                "in their model, if that has all of its tensors"
            )


def forward_notes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings for settings by which a layer's number takes part in the computation."""
    for key, value in config.items():
        if value is True and OF_FORWARD.search(key):
            yield (
                f"warning: {key} makes a layer's number part of the computation, so layers that "
                "have another number now compute differently than in their model"
            )


def running_problems(output: Any, ways: Sequence[int]) -> tuple[list[str], list[str]]:
    """Run a stack's model without values, in the ways in which its donor runs: problems, notes."""
    if not ways:
        name = type(output).__name__
        return [], [f"note: a {name} does not run without values, so the stack was not tried"]
    for way in ways:
        try:
            modules_in_order(output, way)
        except Exception as error:  # whatever the model's own code raises
            how = " with a cache, as to generate text" if uses_cache(way) else ""
            return [f"the stack cannot compute{how}: {cause(error)}; choose other slices"], []
    return [], []
