"""The config of a layer stack: the donor's, of which all that speaks of layers follows them."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from merging.models.checkpoints import Checkpoint, changed_config, text_config
from merging.plans.layouts import chosen_layers
from merging.problems import Problems
from merging.recipes.recipe import Recipe

# Config lists that name layers by number, rather than having one entry per layer.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
NOT_PER_LAYER = re.compile(r"_token_ids?$|^architectures$")
OF_THE_EMBEDDING = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def stacked_config(
    recipe: Recipe, models: Mapping[str, Checkpoint], tied: bool
) -> PretrainedConfig:
    """Return the donor's config with the depth, and every per-layer list, of the chosen layers."""
    chosen = [(model, i) for _, model, i in chosen_layers(recipe)]
    parts = {name: text_config(models[name].config) for name in models}
    donor = parts[recipe.models[0]]
    changes: dict[str, Any] = {"num_hidden_layers": len(chosen), "tie_word_embeddings": tied}
    for key, value in donor.to_dict().items():
        if not isinstance(value, list) or NOT_PER_LAYER.search(key):
            continue
        lists: dict[str, Any] = {name: getattr(parts[name], key, None) for name, _ in chosen}
        if key in INDEX_LISTS:
            changes[key] = [n for n, (name, i) in enumerate(chosen) if i in (lists[name] or ())]
        elif len(value) == donor.num_hidden_layers:
            for name, entries in lists.items():
                if entries is None or len(entries) != parts[name].num_hidden_layers:
                    raise Problems(f"{name}: config.json lacks {key} for each of its layers")
            changes[key] = [lists[name][i] for name, i in chosen]
    embedding = parts[str(recipe.embedding_source)]
    for key in OF_THE_EMBEDDING:
        if getattr(embedding, key, None) != getattr(donor, key, None):
            changes[key] = getattr(embedding, key, None)
    return changed_config(models[recipe.models[0]].config, **changes)
