"""Methods whose result is a weighted sum of the tensors: sum_t c_t theta_t.

The coefficients c depend only on the method's weights and on the dot products of the tensors, each
taken as one long vector: a small function from a Gram matrix (n x n numbers) to n numbers. With a
base, vectors are the changes delta_t = theta_t - base, and what is left, 1 - sum_t c_t, is the
base's. See merge_methods.py for what all functions have in common.
"""

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merging.arithmetic.chunks import Scratch, add_to_base
from merging.arithmetic.sums import Gram, cosine, gram_matrix, weighted_sum, weighted_total
from merging.arithmetic.weights import Undefined, check_one_each, normalized

PARALLEL = 0.9995  # |cos| above which slerp interpolates linearly
ALL_BUT_PARALLEL = 1e-6  # sine below which nuslerp interpolates linearly
CANCELLED = 1e-6  # length of a mean of unit vectors that has no direction
SETTLED = 1e-6  # length of a step of karcher below which only rounding makes one longer
MOST_STEPS = 1000
LARGE = 1e3  # size of a coefficient above which tensors would cancel, but for their differences

OPPOSITE = (
    "the models point in opposite directions, between which no mean is defined; use other weights, "
    "or linear"
)

Coefficients = Callable[[Gram], Sequence[float]]


@torch.no_grad()
def linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Average the tensors: sum_t w_t theta_t, over sum_t w_t when normalising (arXiv 2203.05482).

    Weights may be negative. Raises ValueError if normalising by weights whose sum is about zero.
    """
    return weighted_sum(tensors, normalized(weights) if normalize else weights, dtype, device)


@torch.no_grad()
def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Add task vectors to the base: base + lambda sum_t w_t (theta_t - base) (arXiv 2212.04089).

    Over sum_t w_t when normalising. Negative weights take a skill away. Raises ValueError if
    normalising by weights whose sum is about zero.
    """
    coefficients = normalized(weights) if normalize else weights
    return _add_changes(base, tensors, coefficients, lambda_, dtype, device)


@torch.no_grad()
def slerp(
    tensors: Sequence[Tensor],
    t: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Interpolate on the arc from a (t = 0) to b (t = 1), each tensor taken as one long vector.

        (sin((1-t) theta) a + sin(t theta) b) / sin(theta),   cos(theta) = a.b / (|a| |b|)

    (Shoemake 1985.) Where |cos(theta)| > 0.9995, or a norm is zero, the arc is not defined well:
    (1-t) a + t b. Raises ValueError if t is outside [0, 1], or there are not two tensors.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"slerp needs t in [0, 1], got {t}")
    if len(tensors) != 2:
        raise ValueError(f"slerp needs two tensors, got {len(tensors)}")
    sine = math.sqrt(1 - PARALLEL**2)
    return _sum_of(tensors, lambda gram: _on_the_arc(gram, t, sine), None, 1, dtype, device)


def _on_the_arc(gram: Gram, t: float, smallest_sine: float) -> list[float]:
    """Return the coefficients of two vectors on the arc between them, or the straight line."""
    cos = cosine(gram, 0, 1)
    theta = math.acos(max(-1.0, min(1.0, cos)))
    sine = math.sin(theta)
    if sine < smallest_sine or 0 in (gram[0][0], gram[1][1]):
        return [1 - t, t]
    return [math.sin((1 - t) * theta) / sine, math.sin(t * theta) / sine]


@torch.no_grad()
def nuslerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Interpolate on the arc between two tensors, as slerp does, by weights: t = w_2 / (w_1 + w_2).

    A straight line where sin(theta) is about 0 or a norm is zero. With a base, that of the changes:
    base + lambda slerp(delta_1, delta_2). Raises ValueError if there are not two tensors, or the
    sum of the weights is about zero.
    """
    if len(tensors) != 2:
        raise ValueError(f"nuslerp needs two tensors, got {len(tensors)}")
    check_one_each(tensors, weights)
    t = normalized(weights)[1]

    def coefficients(gram: Gram) -> list[float]:
        return _on_the_arc(gram, t, ALL_BUT_PARALLEL)

    return _sum_of(tensors, coefficients, base, lambda_, dtype, device)


@torch.no_grad()
def multislerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Interpolate between several tensors, or their changes, on a sphere about their mean.

    With unit vectors u_t, weights of sum 1 and m = sum_t w_t u_t / |sum_t w_t u_t|, the tangents at
    m are w_t (u_t - <u_t, m> m), and the result is the point to which their sum leads from m, times
    sum_t w_t |theta_t| (Goddard, "Multi-SLERP"). By the choice of m that sum is zero, whatever the
    vectors are, so the point is m. A vector of norm 0 takes no part in the direction. With a base:
    base + lambda times that of the changes.

    Raises ValueError if the sum of the weights is about zero, Undefined if the mean is.
    """
    shares = normalized(weights)

    def coefficients(gram: Gram) -> list[float]:
        return _with_mean_norm(gram, shares, _mean(_cosines(gram), _of_nonzero(gram, shares)))

    return _sum_of(tensors, coefficients, base, lambda_, dtype, device)


@torch.no_grad()
def karcher(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Take the Riemannian mean of the directions: that of the least weighted squares of angles.

    From x = the normalised mean of the unit vectors u_t, until it stays:
    x = exp_x(sum_t w_t log_x(u_t)), with log_x(u) = theta (u - cos(theta) x) / sin(theta),
    cos(theta) = <x, u>, and exp_x(v) = cos|v| x + sin|v| v / |v|; weights of sum 1. All of it
    stays within the span of the vectors, so in n numbers. The result is x sum_t w_t |theta_t|.
    Vectors of norm 0 take no part in the direction (Karcher 1977; arXiv 2603.04972).

    Raises ValueError if the sum of the weights is about zero or one is negative, Undefined if the
    vectors have no one mean, as opposite ones.
    """
    if any(w < 0 for w in weights):
        raise ValueError(f"karcher needs weights of at least 0, got {list(weights)}")
    shares = normalized(weights)

    def coefficients(gram: Gram) -> list[float]:
        cosines, taking_part = _cosines(gram), _of_nonzero(gram, shares)
        x = _mean(cosines, taking_part)
        if any(taking_part):
            steps = [w / sum(taking_part) for w in taking_part]
            x = _riemannian_mean(cosines, steps, x)
        return _with_mean_norm(gram, shares, x)

    return _sum_of(tensors, coefficients, None, 1, dtype, device)


def _riemannian_mean(cosines: Gram, weights: Sequence[float], x: list[float]) -> list[float]:
    """Return the coefficients of the Riemannian mean of unit vectors, from an x near to it.

    It is reached where steps no longer become shorter, or are as short as the coefficients' own
    rounding.
    """
    size = math.inf
    for _ in range(MOST_STEPS):
        towards = [math.fsum(c * row[j] for j, c in enumerate(x)) for row in cosines]  # <x, u_t>
        angles = [math.acos(max(-1.0, min(1.0, cos))) for cos in towards]
        if any(w and angle > math.pi - CANCELLED for w, angle in zip(weights, angles, strict=True)):
            break  # opposite to x: in no one direction from there
        scales = [angle / math.sin(angle) if angle > 1e-8 else 1.0 for angle in angles]
        pulls = [w * scale for w, scale in zip(weights, scales, strict=True)]
        back = math.fsum(p * cos for p, cos in zip(pulls, towards, strict=True))
        step = [p - back * c for p, c in zip(pulls, x, strict=True)]
        last, size = size, _length(cosines, step)
        if last <= size < SETTLED or size <= sys.float_info.epsilon * max(map(abs, x)):
            return x
        along = math.sin(size) / size
        moved = [math.cos(size) * c + along * s for c, s in zip(x, step, strict=True)]
        length = _length(cosines, moved)  # 1, but for rounding
        x = [c / length for c in moved]
    raise Undefined(OPPOSITE)


def _length(gram: Gram, vector: Sequence[float]) -> float:
    """Return the length of a sum of vectors with these coefficients."""
    pairs = ((i, j) for i in range(len(vector)) for j in range(len(vector)))
    return math.sqrt(max(0.0, math.fsum(vector[i] * vector[j] * gram[i][j] for i, j in pairs)))


def _cosines(gram: Gram) -> Gram:
    return [[cosine(gram, i, j) for j in range(len(gram))] for i in range(len(gram))]


def _of_nonzero(gram: Gram, weights: Sequence[float]) -> list[float]:
    """Return the weights of vectors that have a direction, 0 for those of norm 0."""
    return [w if gram[i][i] != 0 else 0.0 for i, w in enumerate(weights)]


def _mean(cosines: Gram, weights: Sequence[float]) -> list[float]:
    """Return the coefficients of the normalised mean of unit vectors. Undefined if that is zero."""
    length = _length(cosines, weights)
    if length < CANCELLED and any(weights):
        raise Undefined(OPPOSITE)
    return [w / length if length else 0.0 for w in weights]


def _with_mean_norm(gram: Gram, weights: Sequence[float], x: Sequence[float]) -> list[float]:
    """Return the coefficients of x, a sum of unit vectors, times the mean of the norms."""
    norms = [math.sqrt(row[i]) for i, row in enumerate(gram)]
    length = math.fsum(w * norm for w, norm in zip(weights, norms, strict=True))
    return [length * c / norm if norm else 0.0 for c, norm in zip(x, norms, strict=True)]


@torch.no_grad()
def model_stock(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Go from the base towards the mean as far as the models agree (arXiv 2403.19522, section 4).

    t mean_t(theta_t) + (1 - t) base, with t = N c / (1 + (N - 1) c) of N models, and c the mean of
    the cosines between two of the changes; t = 0 where c <= 0. A change of norm 0 has cosine 0.
    `lambda_` scales t. Raises ValueError for fewer than two tensors.
    """
    count = len(tensors)
    if count < 2:
        raise ValueError(f"model_stock needs at least two tensors, got {count}")

    def coefficients(gram: Gram) -> list[float]:
        cosines = [cosine(gram, i, j) for i in range(count) for j in range(i)]
        c = math.fsum(cosines) / len(cosines)
        t = count * c / (1 + (count - 1) * c) if c > 0 else c * 0  # NaN stays
        return [t / count] * count

    return _sum_of(tensors, coefficients, base, lambda_, dtype, device)


@torch.no_grad()
def passthrough(
    tensors: Sequence[Tensor],
    scale: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Multiply the only tensor by a number, as a slice of a layer stack may ask for."""
    (tensor,) = tensors
    return weighted_sum([tensor], [scale], dtype, device)


def _sum_of(
    tensors: Sequence[Tensor],
    coefficients: Coefficients,
    base: Tensor | None,
    lambda_: float,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Tensor:
    """Return the sum of the tensors, or of their changes to a base, by their Gram matrix."""
    dtype = dtype or (tensors[0] if base is None else base).dtype
    gram = gram_matrix(tensors, base, dtype, device)
    finite = all(map(math.isfinite, (number for row in gram for number in row)))
    found = coefficients(gram) if finite else [math.nan] * len(tensors)
    if base is None:
        return weighted_sum(tensors, found, dtype, device)
    return _add_changes(base, tensors, found, lambda_, dtype, device)


def _add_changes(
    base: Tensor,
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    lambda_: float,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Tensor:
    """Return base + lambda sum_t c_t (theta_t - base)."""
    found = [lambda_ * c for c in coefficients]
    dtype = dtype or base.dtype
    if max(map(abs, found), default=0) > LARGE:  # of a direction whose change is next to nothing

        def merge(deltas: list[Tensor], part: slice, scratch: Scratch) -> Tensor:
            return weighted_total(deltas, found, scratch)

        return add_to_base(merge, base, tensors, 1, dtype, device, work=torch.float64)
    return weighted_sum([base, *tensors], [1 - math.fsum(found), *found], dtype, device)
