"""Run models once without values, on the meta device: do they compute, and in which order?"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

TOKENS = 8


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield inputs of a few tokens: first such that nothing in a model has to look at values."""
    books = int(getattr(model.config, "num_codebooks", 0) or 1)
    with torch.device("meta"):
        tokens = torch.ones((1, TOKENS), dtype=torch.long)
        mask = torch.ones((1, 1, TOKENS, TOKENS), dtype=torch.bool)
        plain = {"input_ids": tokens, "use_cache": False}
        yield plain | {"attention_mask": mask, "position_ids": tokens}
        yield plain
        yield plain | {"input_ids": tokens.expand(books, -1)}


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


def first_way(model: PreTrainedModel) -> tuple[int, list[str]] | None:
    """Return the first kind of inputs on which a model runs without values, and its order."""
    for way in range(3):
        try:
            return way, modules_in_order(model, way)
        except Exception:  # of many kinds; a model that looks at values cannot run
            continue
    return None
