"""Run models once without values, on the meta device: do they compute, and in which order?"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

TOKENS = 8
KINDS = 3  # of inputs, each first without a cache of what earlier tokens left, then with one


class Trial(NamedTuple):
    """On which inputs a model runs, by number, and its modules in the order of their calls."""

    ways: tuple[int, ...]  # one without a cache, and one with it if the model runs so too
    order: list[str]


def uses_cache(way: int) -> bool:
    return way >= KINDS


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield inputs of a few tokens: first such that nothing in a model has to look at values.

    With a cache, that comes last: the model itself is to find out where it is.
    """
    books = int(getattr(model.config, "num_codebooks", 0) or 1)
    with torch.device("meta"):
        tokens = torch.ones((1, TOKENS), dtype=torch.long)
        mask = torch.ones((1, 1, TOKENS, TOKENS), dtype=torch.bool)
        plain = {"input_ids": tokens}
        told = plain | {"attention_mask": mask, "position_ids": tokens}
        of_books = {"input_ids": tokens.expand(books, -1)}
    yield from (given | {"use_cache": False} for given in (told, plain, of_books))
    yield from (given | {"use_cache": True} for given in (plain, of_books, told))


def modules_in_order(model: PreTrainedModel, way: int) -> list[str]:
    """Run a model on one of several kinds of inputs; return its modules as they are called.

    Raises whatever the model raises: that it cannot compute, or not without values.
    """
    order: list[str] = []
    model = copy.deepcopy(model)  # as some change themselves by running
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    model.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        model.eval()(**list(_inputs(model))[way])
    return order


def tried(model: PreTrainedModel) -> Trial:
    """Run a model without values on the first kinds of inputs that it takes, if it takes any."""
    ways: list[int] = []
    order: list[str] = []
    for kinds in (range(KINDS), range(KINDS, 2 * KINDS)):
        for way in kinds:
            try:
                found = modules_in_order(model, way)
            except Exception:  # of many kinds; a model that looks at values cannot run
                continue
            ways.append(way)
            order = order or found
            break
    return Trial(tuple(ways), order)
