"""The methods that leave some changes of the base out, against hand-computed cases and oracles."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from oracles import (
    Expected,
    arcee_fusion_oracle,
    della_probabilities,
    finetunes,
    largest_oracle,
    masked_oracle,
    nearswap_oracle,
    ram_oracle,
    randoms,
    sce_oracle,
    wrong,
)
from torch import Tensor

from merge_methods import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    nearswap,
    ram,
    ramplus_tl,
    sce,
    task_arithmetic,
    ties,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (2,), (7,), (301,), (13, 37), (5, 1), (3, 5, 17), (0,), (4, 0)]
WEIGHTS = [0.75, 0.25, 1.25, 0.5, 0.625]  # of which sums of few are exact
DENSITIES = [0.5, 0.2, 0.8, 0.33, 0.7]
EPSILONS = [0.15, 0.1, 0.05, 0.3, 0.2]
GAMMAS = [0.01, 0.2, 0.05, 0.0, 0.3]
KEYS = [7, 1 << 40, 123_456_789_012_345, 1, (1 << 63) - 1]

Models = Sequence[Tensor]
# What a method gives of a base and models, and what it should.
Case = Callable[[Tensor, Models], tuple[Tensor, Expected]]


# -------------------------------------------------------------------- cases


def largest(method: Callable[..., Tensor], elect: bool, **options: Any) -> Case:
    """TIES and breadcrumbs, which keep changes by their magnitude."""

    def run(base: Tensor, models: Models) -> tuple[Tensor, Expected]:
        n = len(models)
        gammas = [] if method is ties else [GAMMAS[:n]]
        result = method(base, models, WEIGHTS[:n], DENSITIES[:n], *gammas, **options)
        given = {"normalize": method is ties} | options
        gamma = gammas[0] if gammas else [0.0] * n
        oracle = largest_oracle(
            base, models, WEIGHTS[:n], DENSITIES[:n], gamma, elect=elect, **given
        )
        return result, oracle

    return run


def masks(shape: Sequence[int], count: int) -> Tensor:
    """Return what dare keeps, for the keys above: seen where each change of zero is 1."""
    zeros = torch.zeros(tuple(shape), dtype=torch.float64)
    found = [
        dare_linear(zeros, [zeros + 1], [1], [density], [key], rescale=False)
        for density, key in zip(DENSITIES[:count], KEYS, strict=False)
    ]
    return torch.stack(found)


def dare(method: Callable[..., Tensor], elect: bool, **options: Any) -> Case:
    def run(base: Tensor, models: Models) -> tuple[Tensor, Expected]:
        n = len(models)
        result = method(base, models, WEIGHTS[:n], DENSITIES[:n], KEYS[:n], **options)
        given = {"normalize": False} | {k: v for k, v in options.items() if k != "rescale"}
        factors = masks(base.shape, n)
        if options.get("rescale", True):
            factors /= torch.tensor(DENSITIES[:n], dtype=torch.float64).view(-1, *[1] * base.dim())
        return result, masked_oracle(base, models, WEIGHTS[:n], factors, elect=elect, **given)

    return run


def della_factors(base: Tensor, models: Models, rescale: bool) -> Tensor:
    """Return what the changes that della keeps of each model are multiplied by."""
    found = []
    zero = torch.zeros_like(base, dtype=torch.float64)
    each = zip(models, DENSITIES, EPSILONS, KEYS, strict=False)
    for model, density, epsilon, key in each:
        delta = model.double() - base.double()
        kept = della_linear(zero, [delta], [1], [density], [epsilon], [key], rescale=False)
        chance = della_probabilities(delta, density, epsilon)
        found.append((kept != 0) / (chance if rescale else 1))
    return torch.stack(found)


def magprune(method: Callable[..., Tensor], elect: bool, **options: Any) -> Case:
    def run(base: Tensor, models: Models) -> tuple[Tensor, Expected]:
        n = len(models)
        numbers = (WEIGHTS[:n], DENSITIES[:n], EPSILONS[:n], KEYS[:n])
        result = method(base, models, *numbers, **options)
        given = {"normalize": elect} | {k: v for k, v in options.items() if k != "rescale"}
        factors = della_factors(base, models, options.get("rescale", True))
        return result, masked_oracle(base, models, WEIGHTS[:n], factors, elect=elect, **given)

    return run


def plain(method: Callable[..., Tensor], oracle: Callable[..., Expected], **options: Any) -> Case:
    def run(base: Tensor, models: Models) -> tuple[Tensor, Expected]:
        return method(base, models, **options), oracle(base, models, **options)

    return run


def fused(lambda_: float) -> Case:
    def run(base: Tensor, models: Models) -> tuple[Tensor, Expected]:
        found = arcee_fusion(base, models, lambda_=lambda_)
        return found, arcee_fusion_oracle(base, models[0], lambda_)

    return run


def swapped(t: float, lambda_: float) -> Case:
    def run(base: Tensor, models: Models) -> tuple[Tensor, Expected]:
        found = nearswap(base, models, t, lambda_=lambda_)
        return found, nearswap_oracle(base, models[0], t, lambda_)

    return run


RAMPLUS = partial(ram_oracle, r=0.1, alpha=0.2)
CASES: dict[str, tuple[Case, int]] = {  # and how many models at most; sce needs two
    "ties, lambda": (largest(ties, True, lambda_=0.7), 5),
    "breadcrumbs": (largest(breadcrumbs, False), 5),
    "breadcrumbs, normalized": (largest(breadcrumbs, False, normalize=True, lambda_=0.7), 5),
    "breadcrumbs_ties": (largest(breadcrumbs_ties, True), 5),
    "breadcrumbs_ties, normalized": (largest(breadcrumbs_ties, True, normalize=True), 5),
    "dare_linear": (dare(dare_linear, False), 5),
    "dare_linear, not rescaled": (dare(dare_linear, False, rescale=False, lambda_=1.5), 5),
    "dare_linear, normalized": (dare(dare_linear, False, normalize=True), 5),
    "dare_ties": (dare(dare_ties, True), 5),
    "dare_ties, normalized": (dare(dare_ties, True, normalize=True, lambda_=0.7), 5),
    "della_linear": (magprune(della_linear, False), 5),
    "della_linear, normalized": (magprune(della_linear, False, normalize=True), 5),
    "della": (magprune(della, True), 5),
    "della, not normalized": (magprune(della, True, normalize=False, lambda_=0.7), 5),
    "della, not rescaled": (magprune(della, True, rescale=False), 5),
    "sce": (plain(sce, sce_oracle), 5),
    "sce, half": (plain(sce, sce_oracle, select_topk=0.5, lambda_=0.7), 5),
    "ram": (plain(ram, ram_oracle, epsilon=0.02), 5),
    "ram, lambda": (plain(ram, ram_oracle, lambda_=0.7), 5),
    "ramplus_tl": (plain(ramplus_tl, RAMPLUS, epsilon=0.02), 5),
    "ramplus_tl, r": (plain(ramplus_tl, ram_oracle, epsilon=0.05, r=0.5, alpha=3.0), 5),
    "nearswap": (swapped(0.03, 1.0), 1),
    "nearswap, lambda": (swapped(0.01, 0.7), 1),
    "arcee_fusion": (fused(1.0), 1),
    "arcee_fusion, lambda": (fused(0.7), 1),
}
COUNTS = [(name, count) for name, (_, most) in CASES.items() for count in (1, 2, 3, 5)]
COUNTS = [(n, c) for n, c in COUNTS if c <= CASES[n][1] and (c > 1 or not n.startswith("sce"))]


def steps(count: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 3) -> list[Tensor]:
    """Return a base and models of few values, whose changes no float here has to round.

    So many magnitudes, sums and variances are equal, and some changes are none.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-8, 9, tuple(shape), generator=generator) / 16
    deltas = [torch.randint(-6, 7, tuple(shape), generator=generator) / 64 for _ in range(count)]
    return [base.to(dtype), *((base + d).to(dtype) for d in deltas)]


# -------------------------------------------------------------------- oracles


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name, count", COUNTS)
def test_agrees_with_the_oracle(
    name: str, count: int, dtype: torch.dtype, device: torch.device
) -> None:
    base = randoms(1, (23, 131), dtype)[0]
    models = finetunes(base, count)
    _, expected = CASES[name][0](base, models)
    result, _ = CASES[name][0](base.to(device), [m.to(device) for m in models])
    assert (result.shape, result.dtype, result.device) == (base.shape, dtype, device)
    assert expected.doubtful.sum() < 40
    assert wrong(result.cpu(), expected) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, count", COUNTS)
def test_equal_magnitudes_are_treated_alike(name: str, count: int, dtype: torch.dtype) -> None:
    base, *models = steps(count, (23, 41), dtype)
    result, expected = CASES[name][0](base, models)
    if not name.startswith(("arcee", "dare", "della")):
        assert not expected.doubtful.any()
    assert wrong(result, expected) == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str, dtype: torch.dtype) -> None:
    run, most = CASES[name]
    for shape in SHAPES:
        base = randoms(1, shape, dtype, 5)[0]
        models = finetunes(base, min(most, 3))
        result, expected = run(base, models)
        assert (result.shape, result.dtype) == (shape, dtype)
        assert wrong(result, expected) == 0, shape


@pytest.mark.parametrize("name", CASES)
def test_mixed_dtypes_round_to_that_of_the_base(name: str) -> None:
    run, most = CASES[name]
    base = randoms(1, (31, 67), torch.bfloat16)[0]
    dtypes = [torch.float32, torch.bfloat16, torch.float16][:most]
    models = [m.to(d) for m, d in zip(finetunes(base.float(), len(dtypes)), dtypes, strict=True)]
    result, expected = run(base, models)
    assert result.dtype == torch.bfloat16
    assert wrong(result, expected) == 0


# -------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("name", CASES)
def test_models_equal_to_the_base_change_nothing(name: str) -> None:
    run, most = CASES[name]
    for dtype in FLOATS:
        for base in (randoms(1, (30, 20), dtype)[0], torch.zeros((30, 20), dtype=dtype)):
            assert torch.equal(run(base, [base] * min(most, 2))[0], base)


@pytest.mark.parametrize("name", CASES)
def test_degenerate_models(name: str) -> None:
    run, most = CASES[name]
    base, a = randoms(2, (30, 20), torch.float32)
    delta = a / 16
    of_rows = torch.arange(30.0).view(30, 1).expand(30, 20) / 64
    for relation, models in {
        "equal": [base + delta, base + delta],
        "opposed": [(base + delta).double(), 2 * base.double() - (base + delta).double()],
        "one is the base": [base, base + delta, base],
        "rows are constant": [base + of_rows, base - of_rows / 2],
    }.items():
        result, expected = run(base, models[:most])
        assert wrong(result, expected) == 0, relation


@pytest.mark.parametrize("name", CASES)
def test_constant_rows(name: str) -> None:
    run, most = CASES[name]
    ones = torch.ones(6, 5)
    result, expected = run(ones, [1.5 * ones, 1.25 * ones][:most])
    assert wrong(result, expected) == 0


# -------------------------------------------------------------------- breadcrumbs, by hand

TENTHS = torch.arange(1.0, 11.0) * torch.tensor([1.0, -1.0] * 5)  # 1, -2, 3, ... -10


def kept_by(
    method: Callable[..., Tensor], *numbers: Sequence[float], **options: Any
) -> list[float]:
    """Return which of 1, -2, ... -10 a method keeps, as magnitudes."""
    found = method(torch.zeros(10), [TENTHS], [1.0], *numbers, **options)
    assert all(v in (0.0, t) for v, t in zip(found.tolist(), TENTHS.tolist(), strict=True))
    return sorted(abs(v) for v in found.tolist() if v)


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
@pytest.mark.parametrize(
    "density, gamma, kept",
    [
        (0.5, 0.0, [6, 7, 8, 9, 10]),
        (0.5, 0.1, [5, 6, 7, 8, 9]),
        (0.5, 0.19, [5, 6, 7, 8, 9]),  # so many are dropped as are wholly in the share
        (0.59, 0.1, [5, 6, 7, 8, 9]),
        (0.5, 0.2, [4, 5, 6, 7, 8]),
        (0.9, 0.1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (0.9, 0.5, [1, 2, 3, 4, 5, 6, 7, 8, 9]),  # gamma gives way
        (1.0, 0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (0.1, 0.9, [1]),
        (0.2, 0.0, [9, 10]),
        (0.01, 0.0, [10]),  # at least one
        (0.01, 0.2, [8]),
    ],
)
def test_breadcrumbs_drops_the_largest_and_the_smallest(
    method: Callable[..., Tensor], density: float, gamma: float, kept: list[int]
) -> None:
    assert kept_by(method, [density], [gamma]) == kept


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_breadcrumbs_treats_equal_magnitudes_alike(method: Callable[..., Tensor]) -> None:
    model = torch.tensor([3.0, -3.0, 2.0, 2.0, -2.0, 1.0, 1.0, 0.5])
    zeros = torch.zeros(8)
    # One is to be dropped, three kept: the second largest is 3, the fourth 2.
    assert method(zeros, [model], [1], [0.375], [0.125]).tolist() == [3, -3, 2, 2, -2, 0, 0, 0]
    # Two are to be dropped: the third largest is 2, the fifth 2.
    assert method(zeros, [model], [1], [0.375], [0.25]).tolist() == [0, 0, 2, 2, -2, 0, 0, 0]
    # Three dropped, of four kept the last is 1.
    assert method(zeros, [model], [1], [0.5], [0.375]).tolist() == [0, 0, 2, 2, -2, 1, 1, 0]


def test_breadcrumbs_adds_up_and_breadcrumbs_ties_elects() -> None:
    base = torch.tensor([10.0, 10.0])
    a, b = base + torch.tensor([4.0, 3.0]), base + torch.tensor([2.0, -5.0])
    given = (base, [a, b], [2, 1], [1, 1], [0, 0])
    assert breadcrumbs(*given).tolist() == [20.0, 11.0]
    assert breadcrumbs(*given, lambda_=0.5).tolist() == [15.0, 10.5]
    assert breadcrumbs(*given, normalize=True).tolist() == pytest.approx([10 + 10 / 3, 10 + 1 / 3])
    assert breadcrumbs_ties(*given).tolist() == [20.0, 16.0]
    assert breadcrumbs_ties(*given, lambda_=0.5).tolist() == [15.0, 13.0]
    normal = breadcrumbs_ties(*given, normalize=True)
    assert normal.tolist() == pytest.approx([10 + 10 / 3, 13.0])


# -------------------------------------------------------------------- dare and della, by hand


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_divides_what_it_keeps_by_the_density(method: Callable[..., Tensor]) -> None:
    base = torch.full((1_000,), 8.0)
    model = base + 1
    found = method(base, [model], [0.5], [0.25], [3])
    assert set(found.tolist()) == {8.0, 10.0}
    plainly = method(base, [model], [0.5], [0.25], [3], rescale=False)
    assert set(plainly.tolist()) == {8.0, 8.5}
    assert torch.equal(found != 8, plainly != 8)
    assert torch.equal(method(base, [model], [1], [1.0], [3]), model)


def test_dare_adds_up_and_dare_ties_elects() -> None:
    zeros = torch.zeros(2)
    models = [torch.tensor([4.0, 3.0]), torch.tensor([2.0, -5.0])]
    given = (zeros, models, [2, 1], [1, 1], [5, 6])
    assert dare_linear(*given).tolist() == [10.0, 1.0]
    assert dare_linear(*given, normalize=True, lambda_=3).tolist() == pytest.approx([10.0, 1.0])
    assert dare_ties(*given).tolist() == [10.0, 6.0]
    assert dare_ties(*given, normalize=True, lambda_=3).tolist() == pytest.approx([10.0, 9.0])


@pytest.mark.parametrize("method", [della_linear, della])
@pytest.mark.parametrize("shape", [(6, 50), (300,), (2, 3, 50)])
def test_della_divides_what_it_keeps_by_its_own_probability(
    method: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    delta = randoms(1, shape, torch.float64)[0]
    chance = della_probabilities(delta, 0.6, 0.2)
    found = method(torch.zeros_like(delta), [delta], [1], [0.6], [0.2], [11])
    kept = found != 0
    assert 0.4 < float(kept.double().mean()) < 0.8
    torch.testing.assert_close(found[kept], (delta / chance)[kept], rtol=1e-6, atol=0)
    plainly = method(torch.zeros_like(delta), [delta], [1], [0.6], [0.2], [11], rescale=False)
    assert torch.equal(plainly, torch.where(kept, delta, 0))


def test_della_ranks_by_magnitude_and_equal_ones_by_index() -> None:
    delta = torch.tensor([[3.0, -1.0, 2.0, -4.0, 2.0]])
    expected = torch.tensor([[0.55, 0.25, 0.35, 0.65, 0.45]], dtype=torch.float64)
    assert torch.allclose(della_probabilities(delta, 0.45, 0.2), expected)
    seen = torch.zeros_like(expected)
    for key in range(60):
        found = della_linear(torch.zeros(1, 5), [delta], [1], [0.45], [0.2], [key]).double()
        seen = torch.where(found != 0, delta / found, seen)
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (40, 1)])
def test_a_row_of_one_entry_is_kept_with_the_density(shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape)
    found = torch.stack(
        [della_linear(zeros, [zeros + 1], [1], [0.4], [0.2], [key]) for key in range(300)]
    )
    assert set(found.flatten().tolist()) == {0.0, 2.5}
    share = float((found != 0).double().mean())
    assert abs(share - 0.4) < 5 * math.sqrt(0.24 / found.numel())


# -------------------------------------------------------------------- sce, by hand


def test_sce_by_hand() -> None:
    base = torch.full((4,), 10.0)
    a = base + torch.tensor([2.0, -4.0, 0.0, 0.0])
    b = base + torch.tensor([1.0, 1.0, -2.0, 2.0])
    # Squares 20 and 10: weights 2/3 and 1/3. The sums elect +, -, -, +.
    assert sce(base, [a, b]).tolist() == pytest.approx([10 + 5 / 3, 6.0, 8.0, 12.0])
    assert sce(base, [a, b], lambda_=0.5).tolist() == pytest.approx([10 + 5 / 6, 8.0, 9.0, 11.0])
    # Variances 1/4, 25/4, 1, 1: a quarter is the second entry alone, of weights 16/17 and 1/17.
    assert sce(base, [a, b], select_topk=0.25).tolist() == [10.0, 6.0, 10.0, 10.0]
    # Half would be two; the third and fourth are alike, and both are kept. Weights 16 to 9.
    assert sce(base, [a, b], select_topk=0.5).tolist() == [10.0, 6.0, 8.0, 12.0]
    assert sce(base, [a, b], select_topk=0.2).tolist() == base.tolist()  # of four, less than one


def test_sce_counts_entries_of_some_variance() -> None:
    base = torch.zeros(5)
    a, b = torch.tensor([1.0, 1.0, 3.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 4.0, 2.0])
    # Two entries vary: half of two is one, the fourth.
    assert sce(base, [a, b], select_topk=0.5).tolist() == [0.0, 0.0, 0.0, 4.0, 0.0]
    # Without a selection those that do not vary take part too. Weights 15 to 22.
    assert sce(base, [a, b]).tolist() == pytest.approx([1.0, 1.0, 3.0, 4.0, 2.0])


def test_sce_weighs_models_by_their_mean_square() -> None:
    base = torch.zeros(2)
    a, b = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0])  # 10 to 1
    assert sce(base, [a, b]).tolist() == pytest.approx([31 / 11, 1.0])
    assert sce(base, [-a, -b]).tolist() == pytest.approx([-31 / 11, -1.0])


def test_sce_keeps_equal_variances_whichever_models_they_are_of() -> None:
    """Entries 2 and 3 have the changes of 0 and 1 in another order, and so their variances."""
    deltas = torch.tensor(
        [[0.1, 0.7, 0.3, 0.2, 0.0], [0.3, 0.2, 0.2, 0.9, 0.1], [0.2, 0.9, 0.1, 0.7, 0.0]]
    ).bfloat16()
    base = torch.zeros(5, dtype=torch.bfloat16)
    for share, kept in ((0.2, [1, 3]), (0.6, [0, 1, 2, 3])):
        merged = sce(base, list(deltas), select_topk=share)
        assert merged.nonzero().flatten().tolist() == kept


def test_sce_needs_two_models() -> None:
    with pytest.raises(ValueError, match="at least two"):
        sce(torch.zeros(3), [torch.ones(3)])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_sce_of_what_is_not_finite_is_not_finite(where: int, bad: float, share: float) -> None:
    tensors = randoms(3, (40,), torch.bfloat16)
    tensors[where][7] = bad
    assert not sce(tensors[0], tensors[1:], select_topk=share).isfinite().all()
    tensors[where].fill_(bad)
    assert not sce(tensors[0], tensors[1:], select_topk=share).isfinite().all()


def test_sce_of_an_exact_tie_of_votes_takes_plus() -> None:
    base = torch.zeros(2)
    a, b = torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 1.0])
    assert sce(base, [a, b]).tolist() == [2.0, 1.0]
    assert sce(base, [b, a]).tolist() == [2.0, 1.0]


# -------------------------------------------------------------------- ram, by hand


def test_ram_by_hand() -> None:
    base = torch.full((5,), 8.0)
    a = base + torch.tensor([1.0, 2.0, 0.0, 0.25, 4.0])
    b = base + torch.tensor([3.0, 0.0, -1.0, 0.0, -2.0])
    c = base + torch.tensor([2.0, 0.0, 0.0, 0.0, 0.25])
    # Of several that changed an entry the mean, of one the whole; 0.25 is no change.
    found = ram(base, [a, b, c], epsilon=0.25)
    assert found.tolist() == [10.0, 10.0, 7.0, 8.0, 9.0]
    assert ram(base, [a, b, c], epsilon=0.25, lambda_=2).tolist() == [12.0, 12.0, 6.0, 8.0, 10.0]
    found = ram(base, [a, b, c], epsilon=0.2)
    assert found.tolist() == [10.0, 10.0, 7.0, 8.25, 8.75]


def test_ramplus_by_hand() -> None:
    base = torch.zeros(6)
    a = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    b = torch.tensor([3.0, 0.0, 0.0, 0.0, 4.0, 0.0])
    # Of a one entry is shared and three are its own, of b one and one.
    found = ramplus_tl(base, [a, b], r=0.5, alpha=10)
    assert found.tolist() == pytest.approx([2.0, *[1 + 0.5 / 3] * 3, 4 * 1.5, 0.0])
    found = ramplus_tl(base, [a, b], r=0.5, alpha=0.4)
    assert found.tolist() == pytest.approx([2.0, *[1 + 0.5 / 3] * 3, 4 * 1.2, 0.0])
    assert ramplus_tl(base, [a, b]).tolist() == pytest.approx([2.0, 1.02, 1.02, 1.02, 4.08, 0.0])
    doubled = ramplus_tl(base, [a, b], r=0.5, alpha=0.4, lambda_=2)
    assert doubled.tolist() == pytest.approx([4.0, *[2 + 1 / 3] * 3, 9.6, 0.0])
    assert torch.equal(ramplus_tl(base, [a, b], r=0.0), ram(base, [a, b]))
    assert torch.equal(ramplus_tl(base, [a]), a)


# -------------------------------------------------------------------- one model, by hand


def test_nearswap_by_hand() -> None:
    base = torch.full((6,), 4.0)
    model = base + torch.tensor([0.0, 0.25, -0.25, 0.5, 3.0, -3.0])
    assert nearswap(base, [model], 0.5).tolist() == [4.0, 4.25, 3.75, 4.5, 4.5, 3.5]
    assert nearswap(base, [model], 0.5, lambda_=2).tolist() == [4.0, 4.5, 3.5, 5.0, 5.0, 3.0]
    assert nearswap(base, [model], 0.0).tolist() == base.tolist()
    assert torch.equal(nearswap(base, [model], 10.0), model)


def test_arcee_fusion_by_hand() -> None:
    """In one row the divergence is a factor of all: the threshold is one of magnitudes."""
    base = torch.zeros(8)
    model = torch.tensor([1.0, -1.0, 1.0, 2.0, 2.0, -2.0, 3.0, -9.0])
    # Median 2, quartiles 1 and 2.25: the threshold is 3.875.
    assert arcee_fusion(base, [model]).tolist() == [0.0] * 7 + [-9.0]
    assert arcee_fusion(base, [model], lambda_=2).tolist() == [0.0] * 7 + [-18.0]
    # Median 2, quartiles 1.25 and 2.75, between those that are there: the threshold is 4.25.
    for last, kept in ((4.5, 4.5), (4.0, 0.0)):
        model = torch.tensor([1.0, -1.0, 2.0, 2.0, 3.0, last])
        assert arcee_fusion(torch.zeros(6), [model]).tolist() == [0.0] * 5 + [kept]
    # All are as important as the median.
    model = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(arcee_fusion(torch.zeros(4), [model]), model)


def test_arcee_fusion_weighs_rows_by_their_divergence() -> None:
    """A row that moves as a whole changes no softmax, and so is not taken, however far it moves."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    model = torch.stack([7 * torch.ones(4), signs, *(0.1 * i * signs for i in (1, 2, 3))])
    expected = torch.zeros(5, 4)
    expected[1] = signs
    assert torch.equal(arcee_fusion(torch.zeros(5, 4), [model]), expected)


def test_arcee_fusion_sees_no_divergence_where_rounding_makes_one() -> None:
    """Rows that move as a whole are all of importance 0, which is what median and threshold are."""
    (base,) = steps(0, (40, 6), torch.float32)
    model = base + torch.arange(40.0).view(40, 1) / 8
    assert torch.equal(arcee_fusion(base, [model]), model)


def test_arcee_fusion_measures_the_divergence_of_the_model_from_the_base() -> None:
    """Where rows are peaked, that of the base from the model would choose other entries."""
    base, delta, more, other = randoms(4, (12, 6), torch.float64)
    for change in (delta, more, other):
        expected = arcee_fusion_oracle(3 * base, 3 * base + change)
        assert not expected.doubtful.any()
        assert wrong(arcee_fusion(3 * base, [3 * base + change]), expected) == 0


# -------------------------------------------------------------------- what is refused

ONE = torch.ones(2, 2)
TWO = [torch.ones(2, 2), torch.zeros(2, 2)]


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: breadcrumbs(ONE, [ONE], [1], [bad], [0.01]),
        lambda bad: breadcrumbs_ties(ONE, [ONE], [1], [bad], [0.01]),
        lambda bad: dare_linear(ONE, [ONE], [1], [bad], [0]),
        lambda bad: dare_ties(ONE, [ONE], [1], [bad], [0]),
    ],
)
@pytest.mark.parametrize("bad", [-0.01, -0.5, 1.01, math.nan])
def test_densities_outside_their_range_are_refused(
    call: Callable[[float], Tensor], bad: float
) -> None:
    with pytest.raises(ValueError, match="densit"):
        call(bad)


def keeping(method: Callable[..., Tensor], count: int) -> dict[str, Any]:
    """Return what a method that keeps some entries takes besides densities."""
    epsilons, gammas, keys = {"epsilons": EPSILONS}, {"gammas": GAMMAS}, {"keys": KEYS}
    own: dict[Any, dict[str, Any]] = {breadcrumbs: gammas, breadcrumbs_ties: gammas, ties: {}}
    own |= {dare_linear: keys, dare_ties: keys}
    own |= {della: epsilons | keys, della_linear: epsilons | keys}
    return {name: values[:count] for name, values in own[method].items()}


KEEPING = [breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties, della, della_linear, ties]


@pytest.mark.parametrize("method", KEEPING)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_density_of_0_keeps_nothing(method: Callable[..., Tensor], dtype: torch.dtype) -> None:
    base = randoms(1, (13, 37), dtype)[0]
    a, b = finetunes(base, 2)
    rest = keeping(method, 2)
    without = method(base, [a, base], WEIGHTS[:2], [0.5, 0.5], **rest)
    assert torch.equal(method(base, [a, b], WEIGHTS[:2], [0.5, 0.0], **rest), without)
    b[3, 4] = math.inf  # which is to be found nevertheless
    broken = method(base, [a, b], WEIGHTS[:2], [0.5, 0.0], **rest)
    assert not torch.isfinite(broken[3, 4])


@pytest.mark.parametrize("method, whole", [(della_linear, task_arithmetic), (della, ties)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_density_of_1_keeps_all(
    method: Callable[..., Tensor], whole: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    base = randoms(1, (13, 37), dtype)[0]
    a, b = finetunes(base, 2)
    densities = [[1.0, 1.0]] if whole is ties else []
    expected = whole(base, [a, b], WEIGHTS[:2], *densities)
    found = method(base, [a, b], WEIGHTS[:2], [1.0, 1.0], EPSILONS[:2], KEYS[:2])
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)


@pytest.mark.parametrize("method", [della, della_linear])
@pytest.mark.parametrize(
    "density, epsilon",
    [(0.1, 0.15), (0.9, 0.15), (0.9, 0.1), (0.1, 0.1), (0.5, -0.1), (0.5, math.nan)],
)
def test_della_refuses_probabilities_outside_their_range(
    method: Callable[..., Tensor], density: float, epsilon: float
) -> None:
    with pytest.raises(ValueError, match="epsilon|densit"):
        method(ONE, [ONE], [1], [density], [epsilon], [0])


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
@pytest.mark.parametrize("gamma", [-0.1, 1.5, math.nan])
def test_gammas_outside_their_range_are_refused(
    method: Callable[..., Tensor], gamma: float
) -> None:
    with pytest.raises(ValueError, match="gamma"):
        method(ONE, [ONE], [1], [0.5], [gamma])


@pytest.mark.parametrize("topk", [-0.1, 1.5, math.nan])
def test_sce_refuses_shares_outside_their_range(topk: float) -> None:
    with pytest.raises(ValueError, match="select_topk|topk"):
        sce(ONE, [ONE], select_topk=topk)


@pytest.mark.parametrize("method", [ram, ramplus_tl])
def test_a_size_of_changes_is_at_least_0(method: Callable[..., Tensor]) -> None:
    assert torch.equal(method(ONE, [ONE + 1e-6], epsilon=0.0), ONE + 1e-6)
    assert torch.equal(method(ONE, [ONE + 1e-6], epsilon=1e-5), ONE)
    for epsilon in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="epsilon of at least 0"):
            method(ONE, [ONE], epsilon=epsilon)


@pytest.mark.parametrize("t", [-1e-9, math.nan])
def test_nearswap_refuses_a_negative_t(t: float) -> None:
    with pytest.raises(ValueError, match="t of at least 0"):
        nearswap(ONE, [ONE], t)


@pytest.mark.parametrize("method", [nearswap, arcee_fusion])
def test_one_model_is_asked_for(method: Callable[..., Tensor]) -> None:
    numbers = [0.1] if method is nearswap else []
    with pytest.raises(ValueError, match="one|too many values"):
        method(ONE, TWO, *numbers)


@pytest.mark.parametrize(
    "method, numbers",
    [(breadcrumbs_ties, [[1, 1], [0, 0]]), (dare_ties, [[1, 1], [0, 1]])]
    + [(della, [[0.5, 0.5], [0.1, 0.1], [0, 1]])],
)
def test_negative_weights_are_not_normalised_after_an_election(
    method: Callable[..., Tensor], numbers: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match="negative weights"):
        method(ONE, TWO, [1, -0.5], *numbers, normalize=True)
    method(ONE, TWO, [1, -0.5], *numbers, normalize=False)


@pytest.mark.parametrize(
    "method, numbers",
    [(breadcrumbs, [[1, 1], [0, 0]]), (dare_linear, [[1, 1], [0, 1]])]
    + [(della_linear, [[0.5, 0.5], [0.1, 0.1], [0, 1]])],
)
def test_weights_that_cancel_are_not_normalised(
    method: Callable[..., Tensor], numbers: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match="cannot be normalised"):
        method(ONE, TWO, [1, -1], *numbers, normalize=True)
    method(ONE, TWO, [1, -1], *numbers)


def test_dense_breadcrumbs_is_task_arithmetic() -> None:
    base = randoms(1, (500,), torch.bfloat16)[0]
    models = finetunes(base, 3)
    found = breadcrumbs(base, models, WEIGHTS[:3], [1.0] * 3, [0.0] * 3)
    torch.testing.assert_close(found, task_arithmetic(base, models, WEIGHTS[:3]))


NUMBERS: dict[Callable[..., Tensor], list[float]] = {  # of each model
    ties: [1.0, 0.5],
    breadcrumbs: [1.0, 0.5, 0.01],
    breadcrumbs_ties: [1.0, 0.5, 0.01],
    dare_linear: [1.0, 0.5, 3],
    dare_ties: [1.0, 0.5, 3],
    della_linear: [1.0, 0.5, 0.1, 3],
    della: [1.0, 0.5, 0.1, 3],
    task_arithmetic: [1.0],
}


@pytest.mark.parametrize("method", NUMBERS)
@pytest.mark.parametrize("count", [1, 3])
def test_each_model_has_numbers_of_its_own(method: Callable[..., Tensor], count: int) -> None:
    numbers = NUMBERS[method]
    method(ONE, TWO, *([number] * 2 for number in numbers))
    for place in range(len(numbers)):
        given = [[number] * (count if i == place else 2) for i, number in enumerate(numbers)]
        with pytest.raises(ValueError, match="zip|expected|one for each"):
            method(ONE, TWO, *given)


# -------------------------------------------------------------------- elections


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "weights", [(0.3, 0.5), (1.0, 1.0), (0.1, 7.0), (1e-30, 3e-30), (0.6, 0.0), (3e20, 1e20)]
)
@pytest.mark.parametrize("count", [2, 3])
def test_votes_that_nearly_cancel_are_counted_in_float64(
    count: int, weights: tuple[float, float], normalize: bool
) -> None:
    """Opposite votes that differ by some units of float32's last place, or by none."""
    one = randoms(1, (4_096,), torch.float32)[0]
    near = (-one.double() * weights[0] / weights[1]) if weights[1] else -one.double()
    other = near.float()
    for place in range(-4, 5):
        away = torch.where(other > 0, math.inf, -math.inf) * (1 if place > 0 else -1)
        moved = other
        for _ in range(abs(place)):
            moved = torch.nextafter(moved, away)
        models, given = [one, moved], list(weights)
        if count == 3:  # which has no vote, but makes an election of three
            models, given = [*models, torch.zeros(4_096)], [*given, 1.0]
        votes = weights[0] * one.double() + weights[1] * moved.double()
        sign = torch.where(votes >= 0, 1.0, -1.0)
        found = ties(torch.zeros(4_096), models, given, [1.0] * count, normalize=normalize)
        parts = [w * m.double() for w, m in zip(weights, models, strict=False)]
        total = sum(torch.where(part * sign > 0, part, 0) for part in parts)
        if normalize:
            agreeing = sum((p * sign > 0) * w for p, w in zip(parts, weights, strict=True))
            total = total / torch.where(agreeing > 0, agreeing, 1.0)
        torch.testing.assert_close(found.double(), total, rtol=1e-6, atol=0)


def test_thresholds_of_a_model_hold_for_changes_rounded_to_float32() -> None:
    """For those that are more than float32 holds, as are differences of float32 tensors."""
    step = 2.0**-24
    values = [1 - step, 1 - 0.6 * step, 1 - 0.5 * step, 1 - 0.4 * step, 1, 1 + step]
    change = torch.tensor([*values, *(-v for v in values)], dtype=torch.float64)
    found = ties(torch.zeros_like(change), [change], [1.0], [0.5], thresholds=[1.0])
    assert torch.equal(found, torch.where(change.float().abs() >= 1, change, 0))
    assert int(found.count_nonzero()) == 8  # at half a step it is rounded to even, which is 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_of_weight_0_adds_nothing_where_the_other_does_not(dtype: torch.dtype) -> None:
    a, b = torch.tensor([[3.0, -3.0, 3.0, 3.0], [0.0, 0.0, 0.5, -0.5]], dtype=dtype)
    for weights, models in (([0.0, 1.0], [a, b]), ([1.0, 0.0], [b, a])):
        found = ties(torch.zeros_like(a), models, weights, [1.0, 1.0])
        assert found.tolist() == [0.0, 0.0, 0.5, -0.5]


@pytest.mark.parametrize("least", [1e-3, 1e-6, 1e-9])
def test_of_two_changes_the_lesser_weight_takes_nothing_of_the_other(least: float) -> None:
    """A change that is small, of a model that counts, beside a large one of one that does not."""
    large, small = randoms(2, (1_000,), torch.bfloat16)
    small = (large.abs() * small.sign() * least).bfloat16()
    found = ties(torch.zeros_like(large), [large, small], [least, 1.0], [1.0, 1.0])
    parts = [large.double() * least, small.double()]
    agree = large.sign() == small.sign()
    of_one = torch.where(parts[0].abs() > parts[1].abs(), large.double(), parts[1])
    expected = torch.where(agree, sum(parts) / (1 + least), of_one)
    clear = agree | ((parts[0].abs() / parts[1].abs() - 1).abs() > 1e-6)
    torch.testing.assert_close(found.double()[clear], expected[clear], rtol=2**-8, atol=0)
