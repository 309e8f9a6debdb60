"""Layouts: for each output tensor, which tensor of which model it is made of, and its place.

In a merge of whole models every model brings its tensor of that name. In a stack each layer brings
its own, and two models what stands before the layers and after them.
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
    operands = [models[name] for name in recipe.operands(part)]
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
    donor = models[recipe.models[0]]
    embedding, head = models[str(recipe.embedding_source)], models[str(recipe.lm_head_source)]
    layers = {name: find_layers(model) for name, model in models.items()}
    refuse([*_range_problems(recipe, layers), *_family_problems(models, layers, donor)])
    refuse(_shape_problems(recipe, models, layers))
    ignored = structure.ignored(models.values()).union(*(found.beyond for found in layers.values()))
    prefix = layers[donor.name].prefix
    shared = {t: s for t, s in structure.ties.items() if t.startswith(f"{prefix}.")}
    refuse([*_sharing_problems(recipe, prefix, shared), *_packed_problems(recipe, embedding)])
    ends = structure.ties.keys() - shared.keys()
    all_tied = all(structure.tied(model) >= ends for model in (embedding, head))
    untied = [] if all_tied and not recipe.asks_for_head else sorted(ends)
    path = structure.path_of(prefix, donor.tensors)
    others = {*layers[embedding.name].others, *layers[head.name].others}
    before = structure.before_layers(others, path)
    roles = {
        name: Role(((embedding, name),), AS_IT_IS, 0.0, None)
        for name in layers[embedding.name].others
        if name in before
    }
    for number, (part, model, i) in enumerate(chosen_layers(recipe)):
        for place, stored in layers[model].parts[i].items():
            name = f"{prefix}.{number}.{place}"
            roles[name] = Role(((models[model], stored),), part, 0.0, None)
    after = [n for n in layers[head.name].others if n not in before and n not in structure.ties]
    for name in (*after, *untied):
        given = embedding.tensors.get(structure.stored_name(embedding, name))
        stored = structure.stored_name(head, name)
        roles[name] = Role(((head, stored),), AS_IT_IS, 1.0, given)
    kept = {name: role for name, role in roles.items() if role.operands[0][1] not in ignored}
    return Layout(kept, [embedding, head], untied, ignored, layers, path)


def chosen_layers(recipe: Recipe) -> Iterator[tuple[Slice, str, int]]:
    """Yield the layers of a stack in order: the slice, the model, the layer's number there."""
    for part in recipe.slices:
        (source,) = part.sources
        for i in source.layers or ():
            yield part, source.model, i


def _sharing_problems(recipe: Recipe, prefix: str, shared: Mapping[str, str]) -> Iterator[str]:
    """Refuse stacks in which layers that share a tensor are of several models, or come anew."""
    if not shared:
        return
    numbers: dict[int, str] = {}
    for target, source in shared.items():
        for name in (target, source):
            layer, _, part = name.removeprefix(f"{prefix}.").partition(".")
            numbers.setdefault(int(layer), part.partition(".")[0])
    chosen = [(model, i) for _, model, i in chosen_layers(recipe)]
    sharing = [(model, i) for model, i in chosen if i in numbers]
    whole = sorted(numbers) == [i for _, i in sharing]
    if sharing and not (whole and len({model for model, _ in sharing}) == 1):
        yield (
            f"{recipe.models[0]}: its layers {some(map(str, numbers))} share one "
            f"{numbers[sharing[0][1]]}; the stack must take all of them of one model, each once "
            "and in order, or none"
        )


def _packed_problems(recipe: Recipe, embedding: Checkpoint) -> Iterator[str]:
    """Refuse stacks of other layers than a tensor outside of them has blocks for."""
    packed = [name for name in embedding.tensors if PACKED.search(name)]
    numbers = [i for _, _, i in chosen_layers(recipe)]
    depth = text_config(embedding.config).num_hidden_layers
    if packed and numbers != list(range(depth)):
        yield (
            f"{embedding.name}: {packed[0]} has a block for each of its {depth} layers, in their "
            "order; a stack can only take them as they are, each in its place"
        )


def _unstackable(model: Checkpoint) -> str:
    """Say why a model has no one stack of decoder layers; nothing if it has."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder model; bakllama.py stacks the layers of decoders alone"
    if text_config(model.config) is not model.config:
        return PARTS
    return ""


def _range_problems(recipe: Recipe, layers: Mapping[str, Layers]) -> Iterator[str]:
    for i, part in enumerate(recipe.slices):
        (source,) = part.sources
        chosen = source.layers or range(0)
        depth = len(layers[source.model].parts)
        scale = part.values["scale"]
        if chosen.stop > depth:
            yield (
                f"layer_slices[{i}]: expected layers within 0 to {depth} of {source.model}, "
                f"found start {chosen.start} and end {chosen.stop}"
            )
        elif isinstance(scale, Factors) and isinstance(scale.factors, Mapping):
            parts = layers[source.model].parts[chosen.start : chosen.stop]
            known = {module for part in parts for name in part for module in name.split(".")}
            for module in scale.factors.keys() - known:
                yield (
                    f"layer_slices[{i}].scale.{module}: no such module in these layers; "
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
    for _, model, i in chosen_layers(recipe):
        for part, name in layers[model].parts[i].items():
            shape = models[model].tensors[name].shape
            if shape not in known.get(part, {shape}):
                expected = " or ".join(map(str, sorted(known[part])))
                wrong[model, part] = (
                    f"{model}: {name} has shape {shape}, in {donor.name} it is {expected}"
                )
    return list(wrong.values())
