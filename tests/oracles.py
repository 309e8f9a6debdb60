"""Independent, deliberately naive computations of what the methods should give, in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def randoms(count: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def finetunes(base: Tensor, count: int, seed: int = 1) -> list[Tensor]:
    """Return tensors that differ from the base by small changes, some of them none."""
    changes = randoms(count, base.shape, torch.float32, seed)
    return [base + (0.05 * c * (c.abs() > 0.2)).to(base) for c in changes]


def linear_oracle(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    total = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total / sum(weights) if normalize else total


def slerp_oracle(a: Tensor, b: Tensor, t: float) -> Tensor:
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def ties_oracle(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    normalize: bool,
    naive_count: bool,
) -> Tensor:
    """TIES entry by entry, in Python floats."""
    origin = base.double().flatten().tolist()
    trimmed = []
    for tensor, density in zip(tensors, densities, strict=True):
        delta = (tensor.double() - base.double()).flatten().tolist()
        k = max(1, math.floor(density * len(delta)))
        kth = sorted(map(abs, delta), reverse=True)[k - 1] if delta else 0.0
        trimmed.append([d if abs(d) >= kth else 0.0 for d in delta])
    result = []
    for i, start in enumerate(origin):
        votes = [w * d[i] for w, d in zip(weights, trimmed, strict=True)]
        ballot = [math.copysign(v != 0, v) for v in votes] if naive_count else votes
        sign = 1 if sum(ballot) >= 0 else -1
        agreeing = [(w, v) for w, v in zip(weights, votes, strict=True) if v * sign > 0]
        merged = sum(v for _, v in agreeing)
        if normalize and agreeing:
            merged /= sum(w for w, _ in agreeing)
        result.append(start + merged)
    return torch.tensor(result, dtype=torch.float64).view(base.shape)


def ulps(result: Tensor, oracle: Tensor) -> Tensor:
    """Return how far a result is from the oracle, in units of the oracle's last place."""
    spacing = torch.finfo(result.dtype).eps * 2.0 ** (oracle.abs().log2().floor())
    smallest = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    return (result.double() - oracle).abs() / spacing.clamp_min(smallest)
