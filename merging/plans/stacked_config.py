"""The config of a layer stack: the donor's, of which all that speaks of layers follows them."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from merging.models.checkpoints import (
    Checkpoint,
    layer_attributes,
    of_layers,
    text_config,
    value_of,
)
from merging.models.folders import DEPTHS, OTHER_DEPTHS
from merging.plans.layouts import AS_IT_IS, Layout, chosen_layers
from merging.problems import Problems, cause, refuse, some
from merging.recipes.recipe import Recipe

# Lists that name layers by number: from 0, or from 1.
NUMBERS = re.compile(
    r"(_ids|_idxs|_indices|_indexes)$|^(mlp_only|moe|cross_attention|rope_scaling)_layers$"
)
NUMBERS_FROM_ONE = ("ple_layer_ids",)
# Lists that may be as long as the model is deep, by chance.
NOT_OF_LAYERS = re.compile(
    r"_token_ids?$|_tokens$|^(architectures|languages)$|multipliers$|_limit$|^axial_|_shape$|^mtp_"
)
OF_THE_EMBEDDING = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions")


class Form(NamedTuple):
    """Numbers of a config that say of which kind each layer is, where no list does."""

    keys: tuple[str, ...]
    kind: Callable[..., object]  # of layer i of n, by the values of the keys
    advice: str  # how to choose slices that can be said so
    list_instead: str = ""  # a list of the config that says it, if it is there


FIRST = "let the layers of that kind come first, each once or more, and all others after them"
LAST = "let the layers of that kind come last"
TURNS = (
    "take slices whose length and start are multiples of the period, so that the kinds alternate"
)
FORMS = (
    Form(("first_k_dense_replace",), lambda i, n, k: i < k, FIRST, "mlp_layer_types"),
    Form(("num_dense_layers",), lambda i, n, k: i < k, FIRST, "mlp_layer_types"),
    Form(("max_window_layers",), lambda i, n, k: i < k, FIRST, "layer_types"),
    Form(("num_kv_shared_layers",), lambda i, n, k: i >= n - k, LAST),
    Form(
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        lambda i, n, start, end, step: (
            start <= i <= (end if end >= 0 else n) and (i + 1) % step == 0
        ),
        "let the layers with experts follow each other",
    ),
    Form(("attn_layer_period", "attn_layer_offset"), lambda i, n, p, o: p and i % p == o, TURNS),
    Form(
        ("expert_layer_period", "expert_layer_offset"), lambda i, n, p, o: p and i % p == o, TURNS
    ),
    Form(("n_layers_per_attn_res_block",), lambda i, n, k: k and i % k, TURNS),
    Form(
        ("loop_layer_index_start", "loop_layer_index_end"),
        lambda i, n, start, end: start <= i < end,
        "let the layers of the loop follow each other",
    ),
    Form(
        ("n_input_layers", "n_recurrent_layers", "n_output_layers"),
        lambda i, n, a, b, c: (i >= a) + (i >= a + b) if a + b + c == n else -1,
        "take all input layers first, then recurrent ones, then output layers",
    ),
)


class Chosen(NamedTuple):
    """The layers of a stack in order, and the configs of their models as dictionaries."""

    layers: list[tuple[str, int]]  # model, number there
    configs: Mapping[str, dict[str, Any]]
    depths: Mapping[str, int]
    donor: str

    def of_each(self, key: str) -> Iterator[tuple[int, int, Any]]:
        """Yield the number, the depth of its model and that one's value, for each layer."""
        for model, i in self.layers:
            yield i, self.depths[model], self.configs[model].get(key)


def stacked_config(
    recipe: Recipe, models: Mapping[str, Checkpoint], layout: Layout, tied: bool
) -> tuple[PretrainedConfig, Set[str]]:
    """Return the donor's config with the depth, and all that it says of layers, of the chosen ones.

    And the keys that follow these layers, or the sources of embedding and head. Raises Problems for
    what cannot be said in the form that the config has for it.
    """
    chosen = Chosen(
        [layer.follows for layer in chosen_layers(recipe)],
        {name: _settings(text_config(model.config)) for name, model in models.items()},
        {name: len(found.parts) for name, found in layout.layers.items()},
        recipe.models[0],
    )
    config = text_config(models[chosen.donor].config)
    before, after = chosen.depths[chosen.donor], len(chosen.layers)
    of_donor = chosen.configs[chosen.donor]
    depths = [*DEPTHS, *OTHER_DEPTHS]  # where a decoder has no encoder, some call it that too
    changes: dict[str, Any] = {key: after for key in depths if of_donor.get(key) == before}
    changes |= _followed_lists(chosen) | {"tie_word_embeddings": tied}
    changes |= _sparse_steps(chosen, of_donor | changes)
    changes |= _followed_forms(chosen, of_donor | changes)
    singles = _followed_singles(models, chosen)
    changes |= {"per_layer_config": singles} if singles else {}
    changes |= _of_the_embedding(recipe, models, layout, chosen)
    values = of_donor | changes
    try:
        result = type(config).from_dict(values)
    except Exception as error:  # of many kinds: the class does not take such values
        raise Problems(
            f"{chosen.donor}: its config cannot say these layers: {cause(error)}"
        ) from error
    if "num_hidden_layers" in getattr(config, "attribute_map", {}) and not isinstance(
        getattr(type(config), "num_hidden_layers", None), property
    ):
        result.num_hidden_layers = after
    refuse(_changed_by_class(result, values))
    return result, changes.keys() | singles.get("0", {}).keys()


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """Return a config's values as the class has them, which may be others than in its file."""
    values = dict(config.to_dict())
    own = {
        key: value_of(config, key) for key, value in values.items() if type(value) in (int, list)
    }
    return values | {key: value for key, value in own.items() if type(value) in (int, list)}


def _of_the_embedding(
    recipe: Recipe, models: Mapping[str, Checkpoint], layout: Layout, chosen: Chosen
) -> dict[str, Any]:
    """Return what the embedding's source says of tokens, and of positions if it brings a table."""
    donor, source = models[chosen.donor], models[recipe.words_of]
    of_donor, of_source = chosen.configs[chosen.donor], chosen.configs[source.name]
    tables = {
        len_of_source - len_of_donor
        for name, role in layout.roles.items()
        if role.part is AS_IT_IS and role.place == 0 and name in donor.tensors
        for len_of_donor in donor.tensors[name].shape[:1]
        for len_of_source in source.tensors[name].shape[:1]
    }
    keys = [key for key in OF_THE_EMBEDDING if key in of_donor and key in of_source]
    for key in POSITIONS:
        found, expected = of_source.get(key), of_donor.get(key)
        if isinstance(found, int) and isinstance(expected, int) and found - expected in tables:
            keys.append(key)
    return {key: of_source[key] for key in keys}


def _followed_lists(chosen: Chosen) -> dict[str, Any]:
    """Return the lists of layers' numbers, and those with one entry a layer."""
    changes: dict[str, Any] = {}
    for key, value in chosen.configs[chosen.donor].items():
        if not isinstance(value, list | tuple) or NOT_OF_LAYERS.search(key):
            continue
        each = list(chosen.of_each(key))
        if NUMBERS.search(key):
            first = 1 if key in NUMBERS_FROM_ONE else 0
            changes[key] = [
                n + first for n, (i, _, numbers) in enumerate(each) if i + first in (numbers or ())
            ]
        elif key == "attention_types":
            kinds = [_expanded(nested)[i] for i, _, nested in each]
            changes[key] = [[[kind], 1] for kind in kinds]
            changes["attention_layers"] = kinds
        elif key == "block_types":  # a cycle
            changes[key] = [cycle[i % len(cycle)] for i, _, cycle in each]
        elif len(value) == chosen.depths[chosen.donor]:
            for (model, _), (_, depth, entries) in zip(chosen.layers, each, strict=True):
                if not isinstance(entries, list | tuple) or len(entries) != depth:
                    raise Problems(f"{model}: config.json lacks {key} for each of its layers")
            changes[key] = [entries[i] for i, _, entries in each]
    return changes


def _expanded(nested: Sequence[Any]) -> list[Any]:
    return [kind for kinds, count in nested for _ in range(count) for kind in kinds]


def _sparse_steps(chosen: Chosen, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a decoder_sparse_step of 1, with all layers without experts in mlp_only_layers."""
    if not values.get("decoder_sparse_step") or "mlp_only_layers" not in values:
        return {}
    steps = [(i, step or 1) for i, _, step in chosen.of_each("decoder_sparse_step")]
    by_step = {n for n, (i, step) in enumerate(steps) if (i + 1) % step}
    listed = values["mlp_only_layers"] or ()
    return {"decoder_sparse_step": 1, "mlp_only_layers": sorted(by_step.union(listed))}


def _followed_forms(chosen: Chosen, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers that say the kinds of the chosen layers, form by form."""
    changes: dict[str, Any] = {}
    problems = []
    for form in FORMS:
        now = [value for key in form.keys if isinstance(value := values.get(key), int)]
        if len(now) < len(form.keys):
            continue
        if values.get(form.list_instead):  # which follows; these say no more
            changes |= {key: values[key] for key in form.keys}
            continue
        rows = zip(*(chosen.of_each(key) for key in form.keys), strict=True)
        kinds = [form.kind(*row[0][:2], *(value or 0 for _, _, value in row)) for row in rows]
        tries = itertools.product(range(len(kinds) + 2), repeat=len(now))
        fitting = (t for t in itertools.chain([now], tries) if _says(form, t, kinds))
        found = next(fitting, None)
        if found is None:
            layers = some((f"{n} ({kind})" for n, kind in enumerate(kinds)), 12)
            keys = ", ".join(form.keys)
            problems.append(
                f"{chosen.donor}: {keys} in its config cannot say of which kind the chosen layers "
                f"are: {layers}; {form.advice}"
            )
        else:
            changes |= dict(zip(form.keys, found, strict=True))
    refuse(problems)
    return changes


def _says(form: Form, numbers: Sequence[int], kinds: Sequence[object]) -> bool:
    depth = len(kinds)
    try:
        return all(form.kind(i, depth, *numbers) == kind for i, kind in enumerate(kinds))
    except ZeroDivisionError:
        return False


def _followed_singles(models: Mapping[str, Checkpoint], chosen: Chosen) -> dict[str, Any]:
    """Return the values of single layers among the chosen, where one of the models has such."""
    configs = {name: text_config(models[name].config) for name, _ in chosen.layers}
    keys = set().union(*(layer_attributes(config) for config in configs.values()))
    values = {
        (name, key): of_layers(config, key) for name, config in configs.items() for key in keys
    }
    return {
        str(n): {key: values[name, key][i] for key in keys}
        for n, (name, i) in enumerate(chosen.layers)
        if keys
    }


def _changed_by_class(config: PretrainedConfig, asked: Mapping[str, Any]) -> Iterator[str]:
    """Find lists of layers that the class changes, as some do with the last layer's kind."""
    written = config.to_dict()
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        wanted, found = asked.get(key), written.get(key)
        if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
            layers = [
                i for i, pair in enumerate(zip(wanted, found, strict=True)) if len(set(pair)) > 1
            ]
            if layers:
                i = layers[0]
                yield (
                    f"{type(config).__name__} makes layer {i} {found[i]}, which is {wanted[i]} in "
                    f"{key} of the chosen layers; end the stack with a layer that is {found[i]}"
                )
