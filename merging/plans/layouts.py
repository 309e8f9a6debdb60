"""Layouts: for each output tensor, which tensor of which model it is made of, and its place.

In a merge of whole models every model brings its tensor of that name. In a stack each layer is made
of one layer of a model, or of as many of others as a slice has sources; the models of the first
slice, or one that is named for it, bring what stands before the layers, those of the last what
stands after them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from merging.models.checkpoints import Checkpoint, text_config
from merging.models.layers import PARTS, Layers, find_layers, places
from merging.models.structure import Structure
from merging.models.tensors import LazyTensor
from merging.problems import refuse, some
from merging.recipes.numbers import Factors
from merging.recipes.recipe import Recipe, Slice

AS_IT_IS = Slice((), {"scale": Factors()})  # of the tensors around the layers of a stack
PACKED = re.compile(r"(^|\.)(embed_tokens_per_layer|per_layer_model_projection)\.")
COUNTS = ("num_hidden_layers", "num_nextn_predict_layers")  # of layers, and of those beyond them


class Role(NamedTuple):
    """An output tensor: its name in each model that brings one, its slice, its place."""

    operands: tuple[tuple[Checkpoint, str], ...]
    part: Slice
    place: float  # among the layers, from 0 (the first) to 1 (the last)
    given: LazyTensor | None  # whose shape, dtype and vocabulary it has; None: the first operand's
    names: tuple[str, ...] = ()  # in the sources, if others than its own are


class Layout(NamedTuple):
    """The roles by output name, and what else follows from them."""

    roles: Mapping[str, Role]
    vocabularies: Sequence[Checkpoint]  # the one that the output has, then those matched with it
    untied: Sequence[str]  # those of the possible ties that the output stores apart
    ignored: Set[str]
    layers: Mapping[str, Layers] = {}  # of a stack, by model
    path: str = ""  # where a stack's class has its layers


def whole_models(recipe: Recipe, models: Mapping[str, Checkpoint], structure: Structure) -> Layout:
    """Lay out a merge of whole models. A tied tensor is apart if it is in any of them."""
    (part,) = recipe.slices
    donor = models[recipe.models[0]]
    operands = [models[source.model] for source in recipe.operands(part)]
    everyone = list(dict.fromkeys([donor, *operands]))
    ignored = structure.ignored(everyone)
    ties = structure.ties
    untied = [
        target
        for target in ties
        if any(target in model.tensors for model in everyone)
        and not all(target in structure.tied(model) for model in everyone)
    ]
    names = [n for n in donor.tensors if n not in ignored and (n not in ties or n in untied)]
    names += [name for name in untied if name not in donor.tensors]
    config = text_config(donor.config)
    counts = {k: getattr(config, k, None) or 0 for k in COUNTS}
    refuse(
        f"{donor.name}: config.json: {key}: expected a number, found {count!r}"
        for key, count in counts.items()
        if not isinstance(count, int)
    )
    place = places(names, structure.before_layers(names), *counts.values())
    roles = {}
    for name in names:
        given = donor.tensors.get(structure.stored_name(donor, name))
        bring = [donor] if given is not None and not given.is_floating else operands
        pairs = tuple((model, structure.stored_name(model, name)) for model in bring)
        roles[name] = Role(pairs, part, place[name], given)
    return Layout(roles, everyone, untied, ignored)


def stacked_layers(
    recipe: Recipe, models: Mapping[str, Checkpoint], structure: Structure
) -> Layout:
    """Lay out a stack of layers.

    Raises Problems for ranges outside a model, modules that it does not have, and layers that do
    not fit together.
    """
    refuse([f"{m.name}: {reason}" for m in models.values() if (reason := _unstackable(m))])
    donor, words = models[recipe.models[0]], models[recipe.words_of]
    layers = {name: find_layers(model) for name, model in models.items()}
    refuse([*_range_problems(recipe, layers), *_family_problems(models, layers, donor)])
    refuse(_shape_problems(recipe, models, layers))
    ignored = structure.ignored(models.values()).union(*(found.beyond for found in layers.values()))
    prefix = layers[donor.name].prefix
    shared = {t: s for t, s in structure.ties.items() if t.startswith(f"{prefix}.")}
    refuse([*_sharing_problems(recipe, prefix, shared), *_packed_problems(recipe, words)])
    first, last = _ends(recipe, models)
    path = structure.path_of(prefix, donor.tensors)
    tied = structure.ties.keys() - shared.keys()
    everyone = list(dict.fromkeys([words, *first.models, *last.models]))
    all_tied = all(structure.tied(model) >= tied for model in everyone)
    untied = [] if all_tied and not recipe.asks_for_head else sorted(tied)
    others = {name for model in everyone for name in layers[model.name].others}
    before = structure.before_layers(others, path)
    roles = {
        name: _end_role(first, name, 0.0, words, structure)
        for name in _outside(first, layers)
        if name in before
    }
    for number, layer in enumerate(chosen_layers(recipe)):
        for part in dict.fromkeys(p for m, i in layer.made_of for p in layers[m].parts[i]):
            stored = [(models[m], f"{layers[m].prefix}.{i}.{part}") for m, i in layer.made_of]
            model, i = layer.follows
            given = models[model].tensors.get(f"{layers[model].prefix}.{i}.{part}")
            name = f"{prefix}.{number}.{part}"
            names = tuple(name for _, name in stored[-len(layer.part.sources) :])
            roles[name] = Role(_floating(stored), layer.part, layer.place, given, names)
    after = [n for n in _outside(last, layers) if n not in before and n not in structure.ties]
    for name in (*after, *untied):
        roles[name] = _end_role(last, name, 1.0, words, structure)
    kept = {name: role for name, role in roles.items() if role.operands[0][1] not in ignored}
    return Layout(kept, everyone, untied, ignored, layers, path)


class ChosenLayer(NamedTuple):
    """A layer of a stack: the layers that it is made of, as (model, number there)."""

    part: Slice
    place: float  # in its slice, from 0 (the first layer) to 1 (the last, or only one)
    made_of: tuple[tuple[str, int], ...]  # as the method takes them
    follows: tuple[str, int]  # whose kind it has: the base's, or that of the first source


def chosen_layers(recipe: Recipe) -> Iterator[ChosenLayer]:
    """Yield the layers of a stack in order."""
    for part in recipe.slices:
        sources = recipe.operands(part)
        ranges = [source.layers or range(0) for source in sources]
        names = [source.model for source in sources]
        leader = names.index(recipe.base) if recipe.base in names else 0
        for n, numbers in enumerate(zip(*ranges, strict=True)):
            made_of = tuple(zip(names, numbers, strict=True))
            place = n / (len(ranges[0]) - 1) if len(ranges[0]) > 1 else 1.0
            yield ChosenLayer(part, place, made_of, made_of[leader])


class _End(NamedTuple):
    """The models that bring what stands on one side of a stack's layers, and their slice."""

    models: Sequence[Checkpoint]
    part: Slice


def _ends(recipe: Recipe, models: Mapping[str, Checkpoint]) -> list[_End]:
    """Return who brings what stands before the layers, and who what stands after them."""
    if recipe.embedding_source and recipe.lm_head_source:
        return [
            _End([models[name]], AS_IT_IS)
            for name in (recipe.embedding_source, recipe.lm_head_source)
        ]
    return [
        _End([models[source.model] for source in recipe.operands(part)], part)
        for part in (recipe.slices[0], recipe.slices[-1])
    ]


def _outside(end: _End, layers: Mapping[str, Layers]) -> list[str]:
    """Return the names of tensors outside the layers, in any model of an end."""
    names = [name for model in end.models for name in layers[model.name].others]
    return list(dict.fromkeys(names))


def _end_role(end: _End, name: str, place: float, words: Checkpoint, structure: Structure) -> Role:
    """Return the role of a tensor outside the layers, which has the rows of `words`."""
    stored = [(model, structure.stored_name(model, name)) for model in end.models]
    given = words.tensors.get(structure.stored_name(words, name))
    return Role(_floating(stored), end.part, place, given)


def _floating(
    stored: Sequence[tuple[Checkpoint, str]],
) -> tuple[tuple[Checkpoint, str], ...]:
    """Return the operands of a tensor; of integers, which are copied, the first alone."""
    model, name = stored[0]
    found = model.tensors.get(name)
    return tuple(stored if found is None or found.is_floating else stored[:1])


def _sharing_problems(recipe: Recipe, prefix: str, shared: Mapping[str, str]) -> Iterator[str]:
    """Refuse stacks in which layers that share a tensor are of several models, or come anew."""
    if not shared:
        return
    numbers: dict[int, str] = {}
    for target, source in shared.items():
        for name in (target, source):
            layer, _, part = name.removeprefix(f"{prefix}.").partition(".")
            numbers.setdefault(int(layer), part.partition(".")[0])
    sharing = [c for c in chosen_layers(recipe) if numbers.keys() & {i for _, i in c.made_of}]
    whole = all(sorted(numbers) == found for found in _numbers_by_source(sharing))
    if sharing and not (whole and len({chosen.follows[0] for chosen in sharing}) == 1):
        yield (
            f"{recipe.models[0]}: its layers {some(map(str, numbers))} share one "
            f"{numbers[min(numbers)]}; the stack must take all of them of one model, each once "
            "and in order, or none"
        )


def _numbers_by_source(chosen: Sequence[ChosenLayer]) -> list[list[int]]:
    """Return the numbers of layers that each of the sources, in turn, brings to a stack."""
    columns = max((len(layer.made_of) for layer in chosen), default=0)
    return [
        [layer.made_of[k][1] for layer in chosen if k < len(layer.made_of)] for k in range(columns)
    ]


def _packed_problems(recipe: Recipe, words: Checkpoint) -> Iterator[str]:
    """Refuse stacks of other layers than a tensor outside of them has blocks for."""
    packed = [name for name in words.tensors if PACKED.search(name)]
    in_order = list(range(text_config(words.config).num_hidden_layers)) if packed else []
    found = _numbers_by_source(list(chosen_layers(recipe)))
    if packed and any(numbers != in_order for numbers in found):
        yield (
            f"{words.name}: {packed[0]} has a block for each of its {len(in_order)} layers, in "
            "their order; a stack can only take them as they are, each in its place"
        )


def _unstackable(model: Checkpoint) -> str:
    """Say why a model has no one stack of decoder layers; nothing if it has."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder model; layers are stacked of decoders alone"
    if text_config(model.config) is not model.config:
        return PARTS
    return ""


def _range_problems(recipe: Recipe, layers: Mapping[str, Layers]) -> Iterator[str]:
    for part in recipe.slices:
        for source in recipe.operands(part):
            chosen = source.layers or range(0)
            depth = len(layers[source.model].parts)
            scale = part.values.get("scale")
            if chosen.stop > depth:
                yield (
                    f"{source.where}: expected layers within 0 to {depth} of {source.model}, "
                    f"found start {chosen.start} and end {chosen.stop}"
                )
            elif isinstance(scale, Factors) and isinstance(scale.factors, Mapping):
                parts = layers[source.model].parts[chosen.start : chosen.stop]
                known = {module for part in parts for name in part for module in name.split(".")}
                for module in scale.factors.keys() - known:
                    yield (
                        f"{source.where}.scale.{module}: no such module in these layers; "
                        f"known are {some(known - {'weight', 'bias'}, 20)}"
                    )


def _family_problems(
    models: Mapping[str, Checkpoint], layers: Mapping[str, Layers], donor: Checkpoint
) -> Iterator[str]:
    """Find models whose layers are built of other parts than the donor's."""
    parts = {name: set().union(*found.parts) for name, found in layers.items()}
    for name, model in models.items():
        other, lacking = parts[name] - parts[donor.name], parts[donor.name] - parts[name]
        if (other or lacking) and model.config.model_type != donor.config.model_type:
            has = f"have {some(other)}" if other else f"lack {some(lacking)}"
            yield (
                f"{name}: a {model.config.model_type} model, whose layers {has}; {donor.name} is a "
                f"{donor.config.model_type} model, and its layers are built of other tensors"
            )


def _shape_problems(
    recipe: Recipe, models: Mapping[str, Checkpoint], layers: Mapping[str, Layers]
) -> list[str]:
    """Compare the layers of other models with the donor's layers, wherever the part is known."""
    donor = models[recipe.models[0]]
    known: dict[str, set[tuple[int, ...]]] = {}
    for parts in layers[donor.name].parts:
        for part, name in parts.items():
            known.setdefault(part, set()).add(donor.tensors[name].shape)
    wrong: dict[tuple[str, str], str] = {}
    for model, i in (pair for layer in chosen_layers(recipe) for pair in layer.made_of):
        for part, name in layers[model].parts[i].items():
            shape = models[model].tensors[name].shape
            if shape not in known.get(part, {shape}):
                expected = " or ".join(map(str, sorted(known[part])))
                wrong[model, part] = (
                    f"{model}: {name} has shape {shape}, in {donor.name} it is {expected}"
                )
    return list(wrong.values())
