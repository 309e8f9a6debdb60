"""Time each method on one tensor against the plain PyTorch formula, and compare their results.

    python benchmarks/methods.py --threads 1

Random methods draw masks of their own, so that their results cannot be compared.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import merge_methods as ours  # noqa: E402

WEIGHTS = [0.5, 0.3]
DENSITY, EPSILON, GAMMA, TOPK, T = 0.5, 0.15, 0.01, 0.5, 0.05

Merge = Callable[[Tensor, list[Tensor]], Tensor]  # of a base and models


# -------------------------------------------------------------------- plain weighted sums


def scaled(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return (torch.stack(tensors) * torch.tensor(weights).view(-1, *[1] * tensors[0].dim())).sum(0)


def naive_linear(base: Tensor, models: list[Tensor]) -> Tensor:
    return scaled(models, [w / sum(WEIGHTS) for w in WEIGHTS])


def naive_task_arithmetic(base: Tensor, models: list[Tensor]) -> Tensor:
    return base + scaled([m - base for m in models], WEIGHTS)


def naive_arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def naive_slerp(base: Tensor, models: list[Tensor]) -> Tensor:
    return naive_arc(base, models[0], 0.5)


def naive_nuslerp(base: Tensor, models: list[Tensor]) -> Tensor:
    t = WEIGHTS[1] / sum(WEIGHTS)
    return base + naive_arc(models[0] - base, models[1] - base, t)


def naive_multislerp(base: Tensor, models: list[Tensor]) -> Tensor:
    weights = [w / sum(WEIGHTS) for w in WEIGHTS]
    norms = [m.norm() for m in models]
    units = [m / n for m, n in zip(models, norms, strict=True)]
    mean = scaled(units, weights)
    mean = mean / mean.norm()
    step = scaled([u - (u * mean).sum() * mean for u in units], weights)
    length = step.norm() + 1e-12
    length_of_all = sum(w * n for w, n in zip(weights, norms, strict=True))
    result: Tensor = (mean * torch.cos(length) + step * torch.sin(length) / length) * length_of_all
    return result


def naive_karcher(base: Tensor, models: list[Tensor]) -> Tensor:
    norms = [m.norm() for m in models]
    units = [m / n for m, n in zip(models, norms, strict=True)]
    mean = scaled(units, [0.5, 0.5])
    mean = mean / mean.norm()
    for _ in range(10):
        steps = []
        for unit in units:
            cosine = (unit * mean).sum().clamp(-1, 1)
            theta = torch.acos(cosine)
            steps.append(theta / torch.sin(theta) * (unit - cosine * mean))
        step = scaled(steps, [0.5, 0.5])
        length = step.norm()
        if length < 1e-5:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * step
    result: Tensor = mean * (norms[0] + norms[1]) / 2
    return result


def naive_model_stock(base: Tensor, models: list[Tensor]) -> Tensor:
    a, b = (m - base for m in models)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    t = (2 * cosine / (1 + cosine)).clamp(0, 1)
    result: Tensor = t * (models[0] + models[1]) / 2 + (1 - t) * base
    return result


# -------------------------------------------------------------------- plain task vectors


def largest(delta: Tensor, density: float = DENSITY) -> Tensor:
    kept = int(density * delta.numel())
    return delta * (delta.abs() >= delta.abs().flatten().topk(kept).values[-1])


def without_outliers(delta: Tensor) -> Tensor:
    drop, keep = int(GAMMA * delta.numel()), int(DENSITY * delta.numel())
    falling = delta.abs().flatten().sort(descending=True).values
    magnitudes = delta.abs()
    return delta * ((magnitudes <= falling[drop]) & (magnitudes >= falling[drop + keep - 1]))


def drawn(delta: Tensor) -> Tensor:
    return delta * torch.bernoulli(torch.full_like(delta, DENSITY)) / DENSITY


def drawn_by_rank(delta: Tensor) -> Tensor:
    ranks = delta.abs().argsort(-1).argsort(-1).float()
    chance = DENSITY - EPSILON + 2 * EPSILON * ranks / (delta.shape[-1] - 1)
    return delta * torch.bernoulli(chance) / chance


def elected(deltas: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    w = torch.tensor(weights).view(-1, *[1] * deltas[0].dim())
    weighted = torch.stack(deltas) * w
    agree = weighted * torch.where(weighted.sum(0) >= 0, 1.0, -1.0) > 0
    merged = (weighted * agree).sum(0)
    return merged / (agree * w).sum(0).clamp_min(1e-9) if normalize else merged


def task_vectors(
    sparsify: Callable[[Tensor], Tensor], elect: bool = False, normalize: bool = False
) -> Merge:
    def merge(base: Tensor, models: list[Tensor]) -> Tensor:
        deltas = [sparsify(m - base) for m in models]
        if not elect:
            return base + scaled(deltas, WEIGHTS)
        return base + elected(deltas, WEIGHTS, normalize)

    return merge


def naive_sce(base: Tensor, models: list[Tensor]) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    variances = deltas.var(0, unbiased=False)
    kept = int(TOPK * int((variances != 0).sum()))
    deltas = deltas * (variances >= variances.flatten().topk(kept).values[-1])
    squares = [float((d * d).mean()) for d in deltas]
    weights = torch.tensor([s / sum(squares) for s in squares]).view(-1, *[1] * base.dim())
    agree = deltas * torch.where(deltas.sum(0) >= 0, 1.0, -1.0) > 0
    return base + (deltas * agree * weights).sum(0) / (agree * weights).sum(0).clamp_min(1e-9)


def naive_ram(base: Tensor, models: list[Tensor], r: float = 0.0) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    changed = deltas.abs() > 1e-5
    count = changed.sum(0)
    alone = changed & (count == 1)
    over = [(c & (count > 1)).sum() / a.sum() for c, a in zip(changed, alone, strict=True)]
    factors = 1 + r * torch.stack(over).clamp_max(0.2).view(-1, *[1] * base.dim())
    shared = deltas * (changed & (count > 1)) / count.clamp_min(1)
    return base + (deltas * alone * factors + shared).sum(0)


def naive_ramplus(base: Tensor, models: list[Tensor]) -> Tensor:
    return naive_ram(base, models, 0.1)


def naive_nearswap(base: Tensor, models: list[Tensor]) -> Tensor:
    return base + (models[0] - base).clamp(-T, T)


def naive_fusion(base: Tensor, models: list[Tensor]) -> Tensor:
    delta = models[0] - base
    p, q = (t.log_softmax(-1) for t in (models[0], base))
    importance = delta.abs() * (p.exp() * (p - q)).sum(-1, keepdim=True)
    rising = importance.flatten().sort().values
    lower, median, upper = (rising[int(s * (len(rising) - 1))] for s in (0.25, 0.5, 0.75))
    return base + delta * (importance >= median + 1.5 * (upper - lower))


# -------------------------------------------------------------------- the table

D, E, G, KEYS = [DENSITY] * 2, [EPSILON] * 2, [GAMMA] * 2, [1, 2]
CASES: dict[str, tuple[Merge, Merge]] = {
    "linear": (lambda b, m: ours.linear(m, WEIGHTS), naive_linear),
    "task_arithmetic": (lambda b, m: ours.task_arithmetic(b, m, WEIGHTS), naive_task_arithmetic),
    "slerp": (lambda b, m: ours.slerp([b, m[0]], 0.5), naive_slerp),
    "nuslerp": (lambda b, m: ours.nuslerp(m, WEIGHTS, base=b), naive_nuslerp),
    "multislerp": (lambda b, m: ours.multislerp(m, WEIGHTS), naive_multislerp),
    "karcher": (lambda b, m: ours.karcher(m, [1, 1]), naive_karcher),
    "model_stock": (lambda b, m: ours.model_stock(b, m), naive_model_stock),
    "ties": (lambda b, m: ours.ties(b, m, WEIGHTS, D), task_vectors(largest, True, True)),
    "dare_linear": (lambda b, m: ours.dare_linear(b, m, WEIGHTS, D, KEYS), task_vectors(drawn)),
    "dare_ties": (lambda b, m: ours.dare_ties(b, m, WEIGHTS, D, KEYS), task_vectors(drawn, True)),
    "della_linear": (
        lambda b, m: ours.della_linear(b, m, WEIGHTS, D, E, KEYS),
        task_vectors(drawn_by_rank),
    ),
    "della": (
        lambda b, m: ours.della(b, m, WEIGHTS, D, E, KEYS),
        task_vectors(drawn_by_rank, True, True),
    ),
    "breadcrumbs": (
        lambda b, m: ours.breadcrumbs(b, m, WEIGHTS, D, G),
        task_vectors(without_outliers),
    ),
    "breadcrumbs_ties": (
        lambda b, m: ours.breadcrumbs_ties(b, m, WEIGHTS, D, G),
        task_vectors(without_outliers, True),
    ),
    "sce": (lambda b, m: ours.sce(b, m, select_topk=TOPK), naive_sce),
    "ram": (lambda b, m: ours.ram(b, m), naive_ram),
    "ramplus_tl": (lambda b, m: ours.ramplus_tl(b, m), naive_ramplus),
    "nearswap": (lambda b, m: ours.nearswap(b, m[:1], T), naive_nearswap),
    "arcee_fusion": (lambda b, m: ours.arcee_fusion(b, m[:1]), naive_fusion),
}
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")


def seconds(function: Callable[[], Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def measure(name: str, base: Tensor, models: list[Tensor], repeats: int) -> str:
    """Return a line with the times of a method, and in how many entries the results differ."""
    method, formula = CASES[name]

    def naive() -> Tensor:
        return formula(base.float(), [m.float() for m in models]).to(base.dtype)

    fast = seconds(lambda: method(base, models), repeats)
    slow = seconds(naive, repeats)
    line = f"{name:16} {fast * 1e3:7.1f} ms, naive {slow * 1e3:7.1f} ms, {slow / fast:5.1f}x"
    if name in RANDOM:
        return line
    differ = (method(base, models) != naive()).float().mean()
    return f"{line}; {differ:.2%} of entries differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--shape", type=int, nargs="+", default=[2048, 5632])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    base, shared, *changes = (torch.randn(arguments.shape, generator=generator) for _ in range(4))
    models = [(base + 0.07 * (shared + change)).bfloat16() for change in changes]
    print(f"bfloat16 tensors of {tuple(arguments.shape)}, {arguments.threads} threads")
    for name in arguments.methods:
        print(measure(name, base.bfloat16(), models, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
