"""Independent, deliberately naive computations of what the methods should give, in float64."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


# -------------------------------------------------------------------- weighted sums


def task_arithmetic_oracle(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool,
    lambda_: float,
) -> Tensor:
    total = linear_oracle([t.double() - base.double() for t in tensors], weights, normalize)
    return base.double() + lambda_ * total


def _from_base(
    merge: Callable[[list[Tensor]], Tensor],
    tensors: Sequence[Tensor],
    base: Tensor | None,
    lambda_: float,
) -> Tensor:
    """Return the merge of tensors, or with a base that of what they change of it, scaled."""
    if base is None:
        return merge([t.double() for t in tensors])
    return base.double() + lambda_ * merge([t.double() - base.double() for t in tensors])


def nuslerp_oracle(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    lambda_: float = 1.0,
) -> Tensor:
    t = weights[1] / (weights[0] + weights[1])

    def arc(vectors: list[Tensor]) -> Tensor:
        a, b = vectors
        norms = float(a.norm() * b.norm())
        cosine = max(-1.0, min(1.0, float((a * b).sum()) / norms)) if norms else 1.0
        theta = math.acos(cosine)
        if math.sin(theta) < 1e-6:
            return (1 - t) * a + t * b
        return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)

    return _from_base(arc, tensors, base, lambda_)


def _unit(vector: Tensor) -> Tensor:
    """Return a vector of length 1, or the zero vector for that."""
    return vector / vector.norm() if vector.norm() > 0 else vector


def multislerp_oracle(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    lambda_: float = 1.0,
) -> Tensor:
    shares = [w / sum(weights) for w in weights]

    def project(vectors: list[Tensor]) -> Tensor:
        units = [_unit(v) for v in vectors]
        length = sum(w * float(v.norm()) for w, v in zip(shares, vectors, strict=True))
        mean = _unit(linear_oracle(units, shares, False))
        tangents = [u - (u * mean).sum() * mean for u in units]
        step = linear_oracle(tangents, shares, False)
        size = float(step.norm())
        return length * (math.cos(size) * mean + math.sin(size) * _unit(step))

    return _from_base(project, tensors, base, lambda_)


def karcher_oracle(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Walk along geodesics towards the mean, in the space of all entries, until nothing moves."""
    vectors = [t.double() for t in tensors]
    shares = [w / sum(weights) for w in weights]
    length = sum(w * float(v.norm()) for w, v in zip(shares, vectors, strict=True))
    pairs = [(w, _unit(v)) for w, v in zip(shares, vectors, strict=True) if v.norm() > 0]
    if not pairs:
        return torch.zeros_like(vectors[0])
    shares = [w / sum(w for w, _ in pairs) for w, _ in pairs]
    units = [u for _, u in pairs]
    mean = _unit(linear_oracle(units, shares, False))
    for _ in range(300):
        logs = []
        for unit in units:
            away = unit - (unit * mean).sum() * mean
            logs.append(_unit(away) * math.atan2(float(away.norm()), float((unit * mean).sum())))
        step = linear_oracle(logs, shares, False)
        size = float(step.norm())
        if size < 1e-15:
            break
        mean = _unit(math.cos(size) * mean + math.sin(size) * _unit(step))
    return length * mean


def model_stock_oracle(base: Tensor, tensors: Sequence[Tensor], lambda_: float = 1.0) -> Tensor:
    units = [_unit(t.double() - base.double()) for t in tensors]
    cosines = [float((a * b).sum()) for a, b in itertools.combinations(units, 2)]
    c, count = sum(cosines) / len(cosines), len(tensors)
    t = min(1.0, count * c / (1 + (count - 1) * c)) if c > 0 else 0.0
    mean = linear_oracle(tensors, [1] * count, True)
    return base.double() + lambda_ * t * (mean - base.double())


# -------------------------------------------------------------------- task vectors


class Expected(NamedTuple):
    """What a method with thresholds should give."""

    values: Tensor
    doubtful: Tensor  # entries that one rounding takes to the other side of a threshold
    slack: Tensor  # what the roundings of the arithmetic may add up to


class Sparse(NamedTuple):
    """Changes of which some are left out."""

    kept: Tensor  # models x entries
    doubtful: Tensor


def changes(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double() - base.double() for t in tensors])


def _rounding(base: Tensor, tensors: Sequence[Tensor]) -> float:
    """Return the relative size of two roundings of the arithmetic that is done."""
    return 2**-51 if torch.float64 in {t.dtype for t in (base, *tensors)} else 2**-22


def _beside(values: Tensor, threshold: float, rounding: float) -> Tensor:
    """Return which values are all but a threshold: rounding may make them equal to it."""
    return ((values - threshold).abs() <= rounding * abs(threshold)) & (values != threshold)


def combined(
    base: Tensor,
    sparse: Sparse,
    weights: Sequence[float],
    *,
    elect: bool,
    normalize: bool,
    lambda_: float,
    rounding: float,
) -> Expected:
    """Add up weighted changes; with `elect`, those of the sign of their sum, zero being plus."""
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.dim())
    weighted = w * sparse.kept
    doubtful = sparse.doubtful.any(0)
    taking_part = torch.ones_like(weighted, dtype=torch.bool)
    if elect:
        votes = weighted.sum(0)
        doubtful |= (votes != 0) & (votes.abs() <= rounding * weighted.abs().sum(0))
        taking_part = weighted * torch.where(votes >= 0, 1.0, -1.0) > 0
    change, size = (weighted * taking_part).sum(0), weighted.abs().sum(0)
    if normalize:
        total = (w * taking_part).sum(0)
        total = torch.where(taking_part.any(0), total, 1.0)
        change, size = change / total, size / total.abs()
    return _expected(base, lambda_ * change, doubtful, abs(lambda_) * size, rounding)


def _expected(
    base: Tensor, change: Tensor, doubtful: Tensor, size: Tensor, rounding: float
) -> Expected:
    slack = 2 * rounding * (base.double().abs() + size)
    return Expected(base.double() + change, doubtful, slack)


def _between(
    base: Tensor, tensors: Sequence[Tensor], densities: Sequence[float], gammas: Sequence[float]
) -> Sparse:
    """Drop a share of the largest changes, then keep the largest, until enough are kept."""
    deltas, rounding = changes(base, tensors), _rounding(base, tensors)
    kept, doubtful = torch.zeros_like(deltas), torch.zeros_like(deltas, dtype=torch.bool)
    n = base.numel()
    for i, (density, gamma) in enumerate(zip(densities, gammas, strict=True)):
        if n == 0:
            break
        keep = max(1, math.floor(density * n))
        top = min(math.floor(gamma * n), n - keep)
        magnitudes = deltas[i].abs()
        falling = sorted(magnitudes.flatten().tolist(), reverse=True)
        high, low = falling[top], falling[top + keep - 1]
        kept[i] = torch.where((low <= magnitudes) & (magnitudes <= high), deltas[i], 0)
        doubtful[i] = _beside(magnitudes, low, rounding)
        if top:
            doubtful[i] |= _beside(magnitudes, high, rounding)
    return Sparse(kept, doubtful)


def largest_oracle(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    elect: bool,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Expected:
    return combined(
        base,
        _between(base, tensors, densities, gammas),
        weights,
        elect=elect,
        normalize=normalize,
        lambda_=lambda_,
        rounding=_rounding(base, tensors),
    )


def masked_oracle(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    factors: Tensor,
    *,
    elect: bool,
    normalize: bool,
    lambda_: float = 1.0,
) -> Expected:
    """Combine changes times given factors: 0 where one is dropped, else what it is scaled by."""
    kept = changes(base, tensors) * factors
    return combined(
        base,
        Sparse(kept, torch.zeros_like(kept, dtype=torch.bool)),
        weights,
        elect=elect,
        normalize=normalize,
        lambda_=lambda_,
        rounding=_rounding(base, tensors),
    )


def _rows(tensor: Tensor) -> Tensor:
    width = tensor.shape[-1] if tensor.dim() else 1
    return tensor.double().reshape(tensor.numel() // max(width, 1), width)


def della_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return with what probability DELLA keeps each change: by its rank in its row."""
    found = []
    for row in _rows(delta).tolist():
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
        of_row = [density] * len(row)
        for rank, i in enumerate(order):
            if len(row) > 1:
                of_row[i] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
        found.append(of_row)
    return torch.tensor(found, dtype=torch.float64).reshape(delta.shape)


def sce_oracle(
    base: Tensor, tensors: Sequence[Tensor], select_topk: float = 1.0, lambda_: float = 1.0
) -> Expected:
    deltas, rounding = changes(base, tensors), _rounding(base, tensors)
    doubtful = torch.zeros_like(deltas, dtype=torch.bool)
    if select_topk < 1:
        # Or what they are proportional to: the squares of all differences of two changes.
        variances = sum((a - b) ** 2 for a, b in itertools.combinations(deltas, 2))
        falling = sorted((v for v in variances.flatten().tolist() if v != 0), reverse=True)
        k = math.floor(select_topk * len(falling))
        least = falling[k - 1] if k else math.inf
        beside = (variances - least).abs() <= 4 * rounding * variances
        if (beside & (variances != least)).any():
            doubtful |= beside
        deltas = torch.where(variances >= least, deltas, 0)
    squares = [float((d * d).sum()) for d in deltas]
    weights = [s / sum(squares) if sum(squares) else 0.0 for s in squares]
    signs = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.dim())
    agreeing = deltas * signs > 0
    total = (w * agreeing).sum(0)
    change = (w * deltas * agreeing).sum(0) / torch.where(total > 0, total, 1.0)
    doubtful |= (deltas.sum(0) != 0) & (deltas.sum(0).abs() <= rounding * deltas.abs().sum(0))
    size = abs(lambda_) * deltas.abs().amax(0)
    return _expected(base, lambda_ * change, doubtful.any(0), size, rounding)


def ram_oracle(
    base: Tensor,
    tensors: Sequence[Tensor],
    epsilon: float = 1e-5,
    r: float = 0.0,
    alpha: float = 0.0,
    lambda_: float = 1.0,
) -> Expected:
    """RAM, and with r and alpha RAM+ (tensor-local), entry by entry."""
    deltas, rounding = changes(base, tensors), _rounding(base, tensors)
    doubtful = _beside(deltas.abs(), epsilon, rounding).any(0)
    columns = deltas.flatten(1).T.tolist() if deltas.dim() > 1 else [deltas.tolist()]
    changed = [[abs(d) > epsilon for d in column] for column in columns]
    factors = []
    for t in range(len(tensors)):
        unique = sum(1 for column in changed if column[t] and sum(column) == 1)
        shared = sum(1 for column in changed if column[t] and sum(column) > 1)
        factors.append(1 + r * min(alpha, shared / unique if unique else 0.0))
    merged = []
    for column, which in zip(columns, changed, strict=True):
        taking = [t for t, is_changed in enumerate(which) if is_changed]
        if len(taking) == 1:
            merged.append(factors[taking[0]] * column[taking[0]])
        else:
            merged.append(sum(column[t] for t in taking) / len(taking) if taking else 0.0)
    change = torch.tensor(merged, dtype=torch.float64).reshape(base.shape)
    size = abs(lambda_) * deltas.abs().sum(0)
    return _expected(base, lambda_ * change, doubtful, size, rounding)


def nearswap_oracle(base: Tensor, tensor: Tensor, t: float, lambda_: float = 1.0) -> Expected:
    (delta,) = changes(base, [tensor])
    limited = torch.where(delta > t, t, torch.where(delta < -t, -t, delta))
    sure = torch.zeros_like(delta, dtype=torch.bool)  # beside the limit, both are all but one
    rounding = _rounding(base, [tensor])
    return _expected(base, lambda_ * limited, sure, abs(lambda_) * limited.abs(), rounding)


def quantile(values: Sequence[float], q: float) -> float:
    """Return a quantile, on a straight line between the two order statistics beside it."""
    rising = sorted(values)
    place = q * (len(rising) - 1)
    below = math.floor(place)
    above = min(below + 1, len(rising) - 1)
    return rising[below] + (place - below) * (rising[above] - rising[below])


def _divergence(before: Tensor, after: Tensor) -> float:
    """Return KL(softmax(after) || softmax(before)), as a sum of terms that are not negative.

    That is the sum of the q f(p / q), with f(r) = r log(r) - r + 1.
    """
    moves = [a - b for a, b in zip(after.tolist(), before.tolist(), strict=True)]
    if len(set(moves)) < 2:
        return 0.0
    total = sum(math.exp(b) for b in before.tolist())
    shares = [math.exp(b) / total for b in before.tolist()]
    least = min(moves)
    moved = least + math.log1p(
        sum(q * math.expm1(m - least) for q, m in zip(shares, moves, strict=True))
    )
    ratios = [math.expm1(m - moved) for m in moves]  # p / q - 1
    terms = [
        (1 + u) * math.log1p(u) - u if abs(u) > 1e-4 else u * u * (1 / 2 - u / 6 + u * u / 12)
        for u in ratios
    ]
    return sum(q * f for q, f in zip(shares, terms, strict=True))


def arcee_fusion_oracle(base: Tensor, tensor: Tensor, lambda_: float = 1.0) -> Expected:
    (delta,) = changes(base, [tensor])
    rows = zip(_rows(base), _rows(tensor), strict=True)
    of_rows = torch.tensor([_divergence(*pair) for pair in rows], dtype=torch.float64)
    importance = (_rows(delta).abs() * of_rows.view(-1, 1)).reshape(base.shape)
    found = importance.flatten().tolist()
    median, lower, upper = (quantile(found, q) if found else 0.0 for q in (0.5, 0.25, 0.75))
    threshold = median + 1.5 * (upper - lower)
    change = torch.where(importance >= threshold, delta, 0)
    doubtful = (importance - threshold).abs() <= 1e-6 * threshold if threshold else importance < 0
    size = abs(lambda_) * delta.abs()
    return _expected(base, lambda_ * change, doubtful, size, _rounding(base, [tensor]))


# -------------------------------------------------------------------- comparing


def ulps(result: Tensor, oracle: Tensor) -> Tensor:
    """Return how far a result is from the oracle, in units of the oracle's last place."""
    return (result.double() - oracle).abs() / _last_place(result.dtype, oracle)


def _last_place(dtype: torch.dtype, values: Tensor) -> Tensor:
    spacing = torch.finfo(dtype).eps * 2.0 ** (values.abs().log2().floor())
    return spacing.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def wrong_sums(result: Tensor, oracle: Tensor, tensors: Sequence[Tensor]) -> int:
    """Count entries of a weighted sum of tensors that are not the oracle's, rounded once.

    Where terms cancel, what the coefficients' own rounding (dot products of 16-bit floats are made
    in float32) leaves of them is allowed.
    """
    short = all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    terms = sum(t.double().abs() for t in tensors)
    allowed = 0.51 * _last_place(result.dtype, oracle) + (2**-21 if short else 2**-47) * terms
    return int((~((result.double() - oracle).abs() <= allowed)).sum())


def wrong(result: Tensor, expected: Expected) -> int:
    """Count entries that are neither as expected, rounded once, nor doubtful."""
    allowed = 0.51 * _last_place(result.dtype, expected.values) + expected.slack
    near = (result.double() - expected.values).abs() <= allowed
    return int((~(near | expected.doubtful)).sum())
