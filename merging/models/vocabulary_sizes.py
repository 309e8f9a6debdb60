"""Where vocabularies are: the config's keys of their sizes, and the tensors that grow with those.

Asked of models on the meta device, that differ from each other in one number of the config.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from merging.models.checkpoints import Checkpoint
from merging.models.structure import Structure
from merging.models.tensors import LazyTensor
from merging.problems import Problems, first_line, refuse, some

# Config keys that say how many rows there are, and those of them that count no tokens of a
# tokenizer: by their own names, or by those of the parts that they are in.
VOCABULARY_SIZE = re.compile(r"vocab_size(_per_layer_input)?$")
NO_TOKENS = re.compile(
    r"(^|\.)[^.]*(audio|vision|image|speech|talker|qformer|projector|protein|acoustics|timestamp)"
    r"[^.]*\.|(audio|vision|mel|codebook|t2u|unit_hifi_gan|char|shape|pronunciation|composer"
    r"|num_speakers|input|output)_vocab_size$"
)
GROWTH = 64  # a multiple of what classes round sizes up to
PADDED = "final_logits_bias"  # which transformers pads with zeros for new tokens
OF_KINDS = re.compile(r"type_vocab_size$")  # of segments, tasks, modalities: a handful


def config_parts(
    config: PretrainedConfig, label: str = ""
) -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield a config and those inside it, each with the start of its keys' labels."""
    yield label, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from config_parts(value, f"{label}{name}.")


def vocabulary_sizes(config: PretrainedConfig, of_tokens: bool = True) -> dict[str, int]:
    """Return a config's numbers of tokens, or of other things with rows, by their keys.

    Those of its parts too, as `text_config.vocab_size`.
    """
    found = {}
    for label, part in config_parts(config):
        values = part.to_dict()
        keys = [k for k in values if VOCABULARY_SIZE.search(k) and not OF_KINDS.search(k)]
        of_codes = "num_codebooks" in values and not any(NO_TOKENS.search(k) for k in keys)
        for key in keys:
            is_other = NO_TOKENS.search(label + key) or (of_codes and key == "vocab_size")
            if isinstance(values[key], int) and values[key] and bool(is_other) != of_tokens:
                found[label + key] = values[key]
    return found


def vocabulary_dims(structure: Structure, stored: Iterable[str]) -> dict[str, dict[str, int]]:
    """Map the stored tensors that have one entry a token to the dimension that counts them.

    By the config's key: a tensor is one if it grows with that number, whatever it is called and
    whatever other dimensions happen to be as large. Raises Problems.
    """
    names = structure.parameters_of(stored)
    before = _grown(structure, "", 0)
    found: dict[str, dict[str, int]] = {}
    for key, size in vocabulary_sizes(structure.config).items():
        after, dims = _grown(structure, key, GROWTH), {}
        for name, parameter in names.items():
            shapes = before.get(parameter, ()), after.get(parameter, ())
            grown = [d for d, sizes in enumerate(zip(*shapes, strict=True)) if len({*sizes}) > 1]
            if grown and not any(name in group for group in found.values()):
                dims[name] = grown[0]
                one, more = (shape[grown[0]] for shape in shapes)
                times = (more - one) // GROWTH
                if times > 1 and one == times * size:
                    raise Problems(
                        f"{name} has {times} entries for each of config.json's {key}, "
                        "which cannot be matched by token; give all models one tokenizer"
                    )
        if dims:
            found[key] = dims
    return found


def with_values(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    """Return a copy of a config with other values, by keys such as `text_config.vocab_size`."""
    copy = type(config).from_dict(config.to_dict())
    for label, value in values.items():
        *path, key = label.split(".")
        part: Any = copy
        for name in path:
            part = getattr(part, name)
        setattr(part, key, value)
    return copy


def changed_rows(
    structure: Structure, before: Checkpoint, tensors: Mapping[str, LazyTensor]
) -> int | None:
    """Return how many tokens there are after tensors got other shapes; None if all kept theirs.

    Raises Problems unless it is only the number of rows, and the same in all that have them.
    """
    shapes = {n: before.tensors[structure.stored_name(before, n)].shape for n in tensors}
    changed = {n: t.shape for n, t in tensors.items() if t.shape != shapes[n]}
    if not changed:
        return None
    embedding = structure.embedding_name(before.tensors)
    groups = vocabulary_dims(structure, shapes).values()
    dims = next((group for group in groups if embedding in group), {})

    def around(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[: dims[name]] + shape[dims[name] + 1 :] if name in dims else shape

    problems = [
        f"{name} is {shape} in the adapter, the model has {shapes[name]}"
        for name, shape in changed.items()
        if len(shape) != len(shapes[name]) or around(name, shape) != around(name, shapes[name])
    ]
    refuse(problems)
    named = [name for name in dims if name in tensors and not name.endswith(PADDED)]
    rows = {name: tensors[name].shape[dims[name]] for name in named}
    if len({*rows.values()}) > 1:
        listed = some(f"{name} {count}" for name, count in rows.items())
        raise Problems(
            f"the adapter changes the number of rows of some embeddings alone: {listed}; rows "
            "that it does not bring are unknown, so save it with save_embedding_layers=True"
        )
    return next(iter(rows.values()))


def _grown(structure: Structure, label: str, by: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the class's tensors when one number of its config is larger."""
    sizes = {label: vocabulary_sizes(structure.config)[label] + by} if by else {}
    copy = with_values(structure.config, sizes)
    try:
        with torch.device("meta"), no_init_weights():
            return {name: tuple(t.shape) for name, t in structure.cls(copy).state_dict().items()}
    except Exception as error:  # of the class's own checks
        raise Problems(
            f"{structure.cls.__name__} cannot be built with another {label}, so that its rows "
            f"cannot be matched by token ({first_line(error)}); give all models one tokenizer"
        ) from error
