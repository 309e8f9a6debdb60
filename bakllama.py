"""Build a model out of layers taken from several checkpoints, as a YAML file says.

python bakllama.py stack.yml ./output

    layer_slices:
      - {model: org/a, start: 0, end: 20}
      - {model: org/b, start: 10, end: 32, scale: 0.9}
    embedding_source: org/a     # optional; default: the first slice's model
    lm_head_source: org/b       # optional; default: the last slice's model

Where embedding and head are tied in both sources, they are tied in the output too, unless the file
names a lm_head_source of its own.
"""

import argparse
import math
import re
import reprlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from files import donor_files
from problems import refuse, some
from schedules import NUMBERED

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from checkpoints import Checkpoint, Source
    from saving import Plan, Planned, Recipe

TOP_KEYS = ("layer_slices", "embedding_source", "lm_head_source")
SLICE_KEYS = ("model", "start", "end", "scale")
# Config lists that name layers by number, rather than having one entry per layer.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
SIZES = ("hidden_size",)  # config values in which all models of a stack must agree
NOT_PER_LAYER = re.compile(r"_token_ids?$|^architectures$")


@dataclass(frozen=True)
class Slice:
    """Layers start (inclusive) to end (exclusive) of a model; scale multiplies their weights."""

    model: str
    start: int
    end: int
    scale: "float | Mapping[str, float]" = 1.0


@dataclass(frozen=True)
class Stack:
    """A layer stack as its YAML file describes it, defaults filled in."""

    slices: tuple[Slice, ...]
    embedding_source: str
    lm_head_source: str
    head_asked_for: bool  # whether the file names a lm_head_source other than the embedding's
    text: str  # of the file

    @property
    def models(self) -> tuple[str, ...]:
        named = (*(s.model for s in self.slices), self.embedding_source, self.lm_head_source)
        return tuple(dict.fromkeys(named))


# ---------------------------------------------------------------------------- configuration


def read_stack(path: Path) -> Stack:
    """Read and check a YAML file; ValueError lists every problem with its key's path."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        duplicate = _duplicate_key(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    problems = [f"{duplicate}: given twice"] if duplicate else _stack_problems(content)
    refuse([f"{path}: {problem}" for problem in problems])
    slices = tuple(Slice(**entry) for entry in content["layer_slices"])
    embedding = content.get("embedding_source") or slices[0].model
    head = content.get("lm_head_source")
    return Stack(slices, embedding, head or slices[-1].model, head not in (None, embedding), text)


def _duplicate_key(node: Any, path: str = "") -> str:
    """Return the path of a mapping's key that is given twice, which YAML's readers let pass."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [f"{path}{key}" for key in keys if keys.count(key) > 1]
        inner = [_duplicate_key(value, f"{path}{key.value}.") for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        twice = []
        inner = [_duplicate_key(v, f"{path.rstrip('.')}[{i}].") for i, v in enumerate(node.value)]
    else:
        return ""
    return next(filter(None, twice + inner), "")


def _stack_problems(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"expected a mapping with the key layer_slices, found {_kind(content)}"
        return
    yield from _unknown_keys(content, TOP_KEYS, "")
    for key in TOP_KEYS[1:]:
        if content.get(key) is not None and not _is_name(content[key]):
            yield f"{key}: expected the name of a model, found {_kind(content[key])}"
    slices = content.get("layer_slices")
    if not isinstance(slices, list) or not slices:
        yield f"layer_slices: expected a list of at least one slice, found {_kind(slices)}"
        return
    for i, entry in enumerate(slices):
        yield from _slice_problems(entry, f"layer_slices[{i}]")


def _slice_problems(entry: Any, path: str) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{path}: expected a mapping with model, start and end, found {_kind(entry)}"
        return
    yield from _unknown_keys(entry, SLICE_KEYS, f"{path}.")
    if not _is_name(entry.get("model")):
        yield f"{path}.model: expected the name of a model, found {_kind(entry.get('model'))}"
    start, end = entry.get("start"), entry.get("end")
    for key, value in (("start", start), ("end", end)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{path}.{key}: expected a layer number of at least 0, found {_kind(value)}"
    if isinstance(start, int) and isinstance(end, int) and not start < end:
        yield f"{path}: expected start < end, found start {start} and end {end}"
    scale = entry.get("scale", 1.0)
    if isinstance(scale, dict):
        for module, factor in scale.items():
            if not _is_name(module):
                yield f"{path}.scale: expected names of modules, found {_kind(module)}"
            elif not _is_number(factor):
                yield f"{path}.scale.{module}: expected a finite number, found {_kind(factor)}"
    elif not _is_number(scale):
        yield (
            f"{path}.scale: expected a finite number, or a mapping from module names to numbers, "
            f"found {_kind(scale)}"
        )


def _unknown_keys(mapping: Mapping[Any, Any], known: Sequence[str], path: str) -> Iterator[str]:
    for key in mapping:
        if key not in known:
            yield f"{path}{key}: unknown key; known are {', '.join(known)}"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return -sys.float_info.max <= value <= sys.float_info.max
    return False


def _kind(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)


# ---------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a checkpoint's decoder: for each, its tensors by their last part."""

    prefix: str
    parts: list[dict[str, str]]  # one {part: stored name} per layer
    others: list[str]  # stored names outside the layers
    beyond: set[str]  # numbered like layers, but above the depth: e.g. for predicting more tokens


def find_layers(checkpoint: "Checkpoint") -> Layers:
    """Find the one stack of numbered tensors that is as deep as the config says."""
    depth = int(checkpoint.config.get_text_config().num_hidden_layers)
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in checkpoint.tensors:
        if match := NUMBERED.match(name):
            layers = stacks.setdefault(match["stack"], {})
            layers.setdefault(int(match["index"]), {})[match["part"]] = name
    fitting = [
        prefix
        for prefix, layers in stacks.items()
        if len(layers) >= depth and layers.keys() >= set(range(depth))
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{checkpoint.name}: expected one stack of {depth} numbered layers, found "
            f"{some(fitting) if fitting else 'none'}; bakllama.py stacks the layers of decoders"
        )
    chosen = stacks[fitting[0]]
    numbered = {name for layer in chosen.values() for name in layer.values()}
    others = [name for name in checkpoint.tensors if name not in numbered]
    beyond = {name for i in chosen.keys() - set(range(depth)) for name in chosen[i].values()}
    return Layers(fitting[0], [chosen[i] for i in range(depth)], others, beyond)


def scale_of(scale: "float | Mapping[str, float]", part: str) -> float:
    """Return the factor for a layer's tensor, e.g. `self_attn.o_proj.weight`."""
    if not isinstance(scale, Mapping):
        return float(scale)
    factors = [float(scale[module]) for module in part.split(".") if module in scale]
    return math.prod(factors)


def stacked_config(
    stack: Stack, models: "Mapping[str, Checkpoint]", tied: bool
) -> "PretrainedConfig":
    """Return the donor's config with the depth, and every per-layer list, of the chosen layers."""
    from architecture import changed_config

    chosen = [(s.model, i) for s in stack.slices for i in range(s.start, s.end)]
    parts = {name: models[name].config.get_text_config() for name in models}
    donor = parts[stack.slices[0].model]
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
                    raise ValueError(f"{name}: config.json lacks {key} for each of its layers")
            changes[key] = [lists[name][i] for name, i in chosen]
    embedding = parts[stack.embedding_source]
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(embedding, key, None) != getattr(donor, key, None):
            changes[key] = getattr(embedding, key, None)
    return changed_config(models[stack.slices[0].model].config, **changes)


def plan_stack(
    stack: Stack,
    models: "Mapping[str, Checkpoint]",
    *,
    dtype: "torch.dtype | None" = None,
    trust_remote_code: bool = False,
) -> "Planned":
    """Say where each tensor of the stacked model comes from.

    Raises ValueError for ranges outside a model, unknown modules in scale, and layers that do not
    fit together.
    """
    import architecture as arch
    from checkpoints import Source
    from saving import Planned

    donor = models[stack.slices[0].model]
    refuse([f"{m.name}: {reason}" for m in models.values() if (reason := _unstackable(m))])
    cls = arch.model_class(donor.config, donor.path, trust_remote_code)
    skeleton, problems = arch.assemble(cls, donor.config, donor.tensors)
    refuse([f"{donor.name}: {problem}" for problem in problems])
    ties = arch.possible_ties(skeleton, donor.tensors)
    rest = [model for model in models.values() if model is not donor]
    aligned = arch.aligned([donor, *rest], skeleton.base_model_prefix, ties)
    models = {model.name: model for model in aligned}
    donor, embedding = models[donor.name], models[stack.embedding_source]
    head = models[stack.lm_head_source]
    layers = {name: find_layers(model) for name, model in models.items()}
    refuse([*_range_problems(stack, layers), *_family_problems(models, layers, donor)])
    ignored = arch.ignored_names(models.values(), skeleton)
    for found in layers.values():
        ignored |= found.beyond
    tied = {model: arch.tied_names(model, ties) for model in (embedding, head)}
    all_tied = not stack.head_asked_for and all(tied[m] == ties.keys() for m in tied)
    rows, notes = arch.vocabulary_rows(cls, skeleton, embedding, [head], trust_remote_code)

    def of_head(name: str) -> "Source":
        """Return a tensor after the layers, its rows those of the embedding's vocabulary."""
        stored = ties[name] if name in tied[head] else name
        given = Source(embedding, ties[name] if name in tied[embedding] else name)
        return Source(head, stored, rows(head, stored, given))

    sources: dict[str, tuple[Source, float]] = {}
    others = {*layers[embedding.name].others, *layers[head.name].others}
    before = arch.before_layers(skeleton, others)
    for name in layers[embedding.name].others:
        if name in before:
            sources[name] = Source(embedding, name), 1.0
    chosen = [(entry, i) for entry in stack.slices for i in range(entry.start, entry.end)]
    for number, (entry, i) in enumerate(chosen):
        for part, name in layers[entry.model].parts[i].items():
            output = f"{layers[donor.name].prefix}.{number}.{part}"
            sources[output] = Source(models[entry.model], name), scale_of(entry.scale, part)
    for name in layers[head.name].others:
        if name not in before and name not in ties:
            sources[name] = of_head(name), 1.0
    if not all_tied:
        sources |= {name: (of_head(name), 1.0) for name in ties}
    problems = [
        f"{source.checkpoint.name}: misses {source.name}"
        for source, _ in sources.values()
        if source.name not in source.checkpoint.tensors
    ]
    refuse(problems)
    plan = {
        name: _recipe(source, scale, dtype)
        for name, (source, scale) in sources.items()
        if source.name not in ignored
    }
    refuse(list(_shape_problems(plan, layers[donor.name], donor)))
    config = stacked_config(stack, models, all_tied)
    model, problems = arch.assemble(cls, config, plan)
    refuse(problems)
    return Planned(donor.name, plan, model, tuple(sorted(ignored)), tuple(notes))


def _unstackable(model: "Checkpoint") -> str:
    """Say why a model has no one stack of decoder layers; nothing if it has."""
    from checkpoints import text_config

    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder model; bakllama.py stacks the layers of decoders alone"
    if text_config(model.config) is not model.config:
        return (
            "a model of several parts, such as vision and text, whose other tensors belong to no "
            "layer; stack its text model alone, saved as a model of its own"
        )
    return ""


def _recipe(source: "Source", scale: float, dtype: "torch.dtype | None") -> "Recipe":
    import torch
    from torch import Tensor

    from checkpoints import FLOAT_DTYPES
    from merge_methods import linear
    from saving import Recipe, output_dtype

    target = output_dtype(source.info.dtype, dtype)
    scaled = scale != 1.0 and source.info.dtype in FLOAT_DTYPES

    def scale_it(tensors: list[Tensor], device: torch.device) -> Tensor:
        return linear(tensors, [scale], normalize=False, dtype=target, device=device)

    how = "scaled" if scaled else "copied"
    return Recipe(how, (source,), source.shape, target, scale_it if scaled else None)


def _range_problems(stack: Stack, layers: Mapping[str, Layers]) -> Iterator[str]:
    for i, entry in enumerate(stack.slices):
        depth = len(layers[entry.model].parts)
        if entry.end > depth:
            yield (
                f"layer_slices[{i}]: expected layers within 0 to {depth} of {entry.model}, "
                f"found start {entry.start} and end {entry.end}"
            )
        elif isinstance(entry.scale, Mapping):
            chosen = layers[entry.model].parts[entry.start : entry.end]
            known = {module for part in chosen for name in part for module in name.split(".")}
            for module in entry.scale.keys() - known:
                yield (
                    f"layer_slices[{i}].scale.{module}: no such module in these layers; "
                    f"known are {some(known - {'weight', 'bias'}, 20)}"
                )


def _family_problems(
    models: "Mapping[str, Checkpoint]", layers: Mapping[str, Layers], donor: "Checkpoint"
) -> Iterator[str]:
    """Find models whose layers are built of other parts than the donor's."""
    parts = {name: set().union(*found.parts) for name, found in layers.items()}
    for name, model in models.items():
        other = parts[name] - parts[donor.name]
        if other and model.config.model_type != donor.config.model_type:
            yield (
                f"{name}: a {model.config.model_type} model, whose layers have {some(other)}; "
                f"{donor.name} is a {donor.config.model_type} model and has no such tensors"
            )


def _shape_problems(plan: "Plan", layers: Layers, donor: "Checkpoint") -> Iterator[str]:
    """Compare the layers of other models with the donor's layers, wherever the part is known."""
    known: dict[str, set[tuple[int, ...]]] = {}
    for parts in layers.parts:
        for part, name in parts.items():
            known.setdefault(part, set()).add(donor.tensors[name].shape)
    wrong: dict[tuple[str, str], str] = {}
    for output, recipe in plan.items():
        match = NUMBERED.match(output)
        if match and match["stack"] == layers.prefix:
            shapes = known.get(match["part"], {recipe.shape})
            if recipe.shape not in shapes:
                model = recipe.sources[0].checkpoint.name
                wrong[model, match["part"]] = (
                    f"{model}: {recipe.sources[0].name} has shape {recipe.shape}, in "
                    f"{donor.name} it is {' or '.join(map(str, sorted(shapes)))}"
                )
    yield from wrong.values()


# ---------------------------------------------------------------------------- run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Build a language model out of layers taken from several checkpoints. A model "
        "is a local directory or a Hugging Face Hub id (org/name, or org/name@revision).",
        epilog=cli.EXIT_STATUS,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file that lists the slices of layers")
    parser.add_argument("output", help="directory to write the stacked model to")
    cli.add_common_options(parser)
    return parser


def table(stack: Stack) -> str:
    """Return the resolved stack as text, one slice a line."""
    width = max(len(s.model) for s in stack.slices)
    lines = [
        f"{s.model:<{width}}  layers {s.start} to {s.end}, exclusive"
        + (f", scale {s.scale}" if s.scale != 1.0 else "")
        for s in stack.slices
    ]
    depth = sum(s.end - s.start for s in stack.slices)
    return "\n".join(
        [
            f"stack of {depth} layers",
            *lines,
            f"embedding and tokenizer: {stack.embedding_source}",
            f"final norm and head: {stack.lm_head_source}",
        ]
    )


def work(argv: Sequence[str] | None) -> None:
    started = time.monotonic()
    arguments = build_parser().parse_args(cli.joined(argv))
    stack = read_stack(Path(arguments.config))
    cli.say(arguments.quiet and not arguments.dry_run, table(stack))
    problems: list[str] = []
    models = cli.open_inputs(arguments, stack.models, SIZES, problems, [arguments.config])

    def plan() -> "Planned":
        return plan_stack(
            stack,
            models,
            dtype=cli.chosen_dtype(arguments.dtype),
            trust_remote_code=arguments.trust_remote_code,
        )

    def card(title: str, planned: "Planned") -> str:
        from cards import Method, model_card

        method = Method("layer stack", "layers of the models below, in this order", "")
        resolved = "\n".join([table(stack), *planned.notes])
        made_by = {"sh": cli.command("bakllama.py", argv), "yaml": stack.text}
        return model_card(title, models.values(), method, resolved, made_by)

    donor, embedding = models[stack.slices[0].model], models[stack.embedding_source]
    copied = donor_files(donor.path, embedding.path)
    copied.pop("generation_config.json", None)  # it speaks of token ids
    if (embedding.path / "generation_config.json").is_file():
        copied["generation_config.json"] = embedding.path / "generation_config.json"
    cli.write(arguments, plan, card, copied, problems, started)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
