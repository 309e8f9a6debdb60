"""Find one threshold for each model over all its tensors, where models are trimmed as a whole.

For that the inputs are read twice before they are merged. The magnitudes of all changes, as
float32, have bits that are ordered like their values; each pass counts the values of 16 of them.
"""

import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from merging.arithmetic.chunks import work_dtype
from merging.arithmetic.entries import in_float32, magnitudes
from merging.arithmetic.selection import DIGITS, count_digits, find_digit
from merging.plans.plan import Plan, PlannedTensor
from merging.runs.computing import computed, read_sources


def with_thresholds(plan: Plan, device: torch.device, threads: int, show_progress: bool) -> Plan:
    """Return a plan whose tensors have the thresholds of their models: `--trim-scope model`.

    The threshold of a model is its k-th largest change over all merged tensors, k = max(1,
    floor(density n)) of n entries. The plan itself, if it does not trim models as a whole.
    """
    merged = {name: tensor for name, tensor in plan.tensors.items() if tensor.method is not None}
    if not plan.trims_models or not merged:
        return plan
    densities: Sequence[float] = next(iter(merged.values())).arguments["densities"]
    number = sum(math.prod(tensor.shape) for tensor in merged.values())
    ranks = [max(1, math.floor(density * number)) for density in densities]
    prefixes = [0] * len(ranks)
    for shift in (16, 0):
        label = f"finding thresholds, pass {2 - shift // 16} of 2"
        counter = _Counter(prefixes, shift, device)
        with (
            computed(merged, merged, counter, device, threads) as done,
            tqdm(total=len(merged), desc=label, disable=not show_progress) as bar,
        ):
            for _ in done:
                bar.update()
        found = [find_digit(counts, k) for counts, k in zip(counter.counts, ranks, strict=True)]
        ranks = [k for _, k in found]
        prefixes = [p << 16 | digit for p, (digit, _) in zip(prefixes, found, strict=True)]
    thresholds = [struct.unpack("<f", prefix.to_bytes(4, "little"))[0] for prefix in prefixes]
    return replace(plan, tensors=_given(plan.tensors, thresholds))


def _given(
    tensors: Mapping[str, PlannedTensor], thresholds: Sequence[float]
) -> dict[str, PlannedTensor]:
    return {
        name: tensor
        if tensor.method is None
        else replace(tensor, arguments={**tensor.arguments, "thresholds": thresholds})
        for name, tensor in tensors.items()
    }


class _Counter:
    """Adds up how often digits occur in the changes of each model, in any order of tensors."""

    def __init__(self, prefixes: Sequence[int], shift: int, device: torch.device) -> None:
        self.counts = [torch.zeros(DIGITS + 2, dtype=torch.int64, device=device) for _ in prefixes]
        self._prefixes, self._shift, self._device = prefixes, shift, device
        self._lock = threading.Lock()

    def __call__(self, name: str, planned: PlannedTensor) -> None:
        base, *tensors = read_sources(planned)
        work = work_dtype([base, *tensors], planned.dtype)
        for total, tensor, prefix in zip(self.counts, tensors, self._prefixes, strict=True):
            entries = in_float32(magnitudes(base, tensor, self._device, work))
            found: Tensor = count_digits(entries, prefix, self._shift)
            with self._lock:
                total += found
