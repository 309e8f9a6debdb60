"""Time each method on one tensor against the plain PyTorch formula, and compare their results.

python benchmarks/methods.py --threads 1
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from merge_methods import linear, slerp, ties  # noqa: E402

SHAPE = (2048, 5632)
WEIGHTS = [0.5, 0.3]


def naive_linear(a: Tensor, b: Tensor) -> Tensor:
    stacked = torch.stack([a.float(), b.float()])
    weights = torch.tensor(WEIGHTS).view(2, 1, 1)
    return ((stacked * weights).sum(0) / weights.sum()).to(a.dtype)


def naive_slerp(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.float(), b.float()
    theta = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    one, other = torch.sin(0.5 * theta), torch.sin(0.5 * theta)
    return ((one * x + other * y) / torch.sin(theta)).to(a.dtype)


def naive_ties(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    deltas = torch.stack([m.float() - base.float() for m in (a, b)])
    kept = int(0.5 * base.numel())
    for delta in deltas:
        threshold = delta.abs().flatten().topk(kept).values[-1]
        delta[delta.abs() < threshold] = 0
    weights = torch.tensor(WEIGHTS).view(2, 1, 1)
    weighted = deltas * weights
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted * sign > 0
    total = (agree * weights).sum(0)
    merged = (weighted * agree).sum(0) / total.clamp_min(1e-9)
    return (base.float() + merged).to(base.dtype)


def seconds(function: Callable[[], Tensor], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator).bfloat16()
    a, b = ((base + 0.1 * torch.randn(SHAPE, generator=generator)).bfloat16() for _ in range(2))
    c = torch.randn(SHAPE, generator=generator).bfloat16()
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "linear": (lambda: linear([a, b], WEIGHTS), lambda: naive_linear(a, b)),
        "slerp": (lambda: slerp([a, c], 0.5), lambda: naive_slerp(a, c)),
        "ties": (
            lambda: ties(base, [a, b], WEIGHTS, [0.5, 0.5]),
            lambda: naive_ties(base, a, b),
        ),
    }
    print(f"bfloat16 tensors of {SHAPE}, {arguments.threads} threads")
    for name, (ours, naive) in cases.items():
        fast, slow = seconds(ours), seconds(naive)
        differ = (ours() != naive()).float().mean()
        print(
            f"{name:8} {fast * 1e3:7.1f} ms, naive {slow * 1e3:7.1f} ms, {slow / fast:5.1f}x; "
            f"{differ:.2%} of entries differ by rounding"
        )


if __name__ == "__main__":
    main()
