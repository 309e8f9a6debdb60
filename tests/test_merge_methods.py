"""The methods, against hand-computed cases and naive float64 oracles."""

import itertools
import math

import pytest
import torch
from oracles import finetunes, linear_oracle, randoms, slerp_oracle, ties_oracle, ulps

from merge_methods import linear, slerp, ties

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


SHAPES = [(), (1,), (7,), (301,), (13, 37), (3, 5, 17), (0,), (4, 0)]


def test_linear_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([3.0, 6.0, 8.0])
    assert linear([a, b], [1, 3]).tolist() == [2.5, 5.0, 5.0]
    assert linear([a, b], [1, 3], normalize=False).tolist() == [10.0, 20.0, 20.0]
    assert linear([a, b], [2, -1]).tolist() == [-1.0, -2.0, -16.0]
    # By the sum, which is -2 and -4, not by its magnitude.
    assert linear([a, b], [-3, 1]).tolist() == [0.0, 0.0, -10.0]
    assert linear([a, b], [-1, -3]).tolist() == [2.5, 5.0, 5.0]
    assert linear([a], [0.25]).tolist() == a.tolist()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "weights", [(0.6, 0.2), (0.3, 0.3, 0.1), (1.7, -0.4), (-1.7, 0.4), (0.1,) * 5]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_rounds_correctly(
    dtype: torch.dtype, weights: tuple[float, ...], normalize: bool, device: torch.device
) -> None:
    tensors = randoms(len(weights), (300_000,), dtype)
    result = linear([t.to(device) for t in tensors], weights, normalize=normalize).cpu()
    oracle = linear_oracle(tensors, weights, normalize)
    assert result.dtype == dtype
    distinct = oracle.abs() > 1e-12  # below, the oracle's own rounding is in the way
    assert ulps(result, oracle)[distinct].max() <= 0.51


def test_linear_rounds_correctly_where_terms_cancel() -> None:
    a = randoms(1, (100_000,), torch.bfloat16)[0]
    nearly = (a.double() * 3).to(torch.bfloat16)
    oracle = 0.3 * a.double() - 0.1 * nearly.double()
    distinct = oracle.abs() > 1e-9
    assert distinct.sum() > 10_000
    result = linear([a, nearly], [0.3, -0.1], normalize=False)
    assert ulps(result, oracle)[distinct].max() <= 0.51


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_shapes_and_dtypes(
    dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    tensors = [t.to(device) for t in randoms(3, shape, dtype)]
    result = linear(tensors, [0.5, 0.3, 0.4])
    oracle = linear_oracle([t.cpu() for t in tensors], [0.5, 0.3, 0.4], True)
    assert (result.shape, result.dtype, result.device) == (shape, dtype, tensors[0].device)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.cpu().double(), oracle, rtol=2 * eps, atol=2 * eps)


def test_linear_of_one_model_twice_is_that_model() -> None:
    for dtype in FLOATS:
        a = randoms(1, (1000,), dtype)[0]
        assert torch.equal(linear([a, a], [0.5, 0.5]), a)
        assert torch.equal(linear([a, a], [0.25, 0.75]), a)


def test_linear_does_not_depend_on_the_order_of_two_models() -> None:
    a, b = randoms(2, (10_000,), torch.bfloat16)
    assert torch.equal(linear([a, b], [0.7, 0.2]), linear([b, a], [0.2, 0.7]))


def test_linear_mixes_dtypes_and_rounds_to_the_one_asked_for() -> None:
    a, b = randoms(1, (1000,), torch.float32)[0], randoms(1, (1000,), torch.bfloat16, 5)[0]
    oracle = linear_oracle([a, b], [0.5, 0.5], True)
    assert linear([a, b], [0.5, 0.5]).dtype == torch.float32
    assert linear([b, a], [0.5, 0.5]).dtype == torch.bfloat16
    result = linear([a, b], [0.5, 0.5], dtype=torch.float16)
    assert result.dtype == torch.float16
    assert ulps(result, oracle).max() <= 0.51


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (0.1, 0.2, -0.3), (0,)])
def test_linear_refuses_weights_that_cannot_be_normalised(weights: tuple[float, ...]) -> None:
    tensors = randoms(len(weights), (4,), torch.float32)
    with pytest.raises(ValueError, match="cannot be normalised"):
        linear(tensors, weights)
    oracle = linear_oracle(tensors, weights, False)
    torch.testing.assert_close(linear(tensors, weights, normalize=False).double(), oracle)


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    half = math.sqrt(2)
    torch.testing.assert_close(slerp([a, b], 0.5), torch.tensor([half, half]))
    third = slerp([a, 3 * b], 1 / 3)  # orthogonal, of different length: 30 degrees of the way
    torch.testing.assert_close(third, torch.tensor([math.sqrt(3), 3.0]))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.87, 1.0])
@pytest.mark.parametrize(
    "relation", ["random", "near", "parallel", "antiparallel", "zero", "orthogonal"]
)
def test_slerp_rounds_correctly(relation: str, t: float, device: torch.device) -> None:
    a, noise = randoms(2, (50_000,), torch.bfloat16)
    b = {
        "random": noise,
        "near": a + (0.3 * noise),
        "parallel": a + (0.01 * noise),
        "antiparallel": -a,
        "zero": torch.zeros_like(a),
        "orthogonal": torch.cat([a[25_000:], -a[:25_000]]),
    }[relation].to(torch.bfloat16)
    result = slerp([a.to(device), b.to(device)], t).cpu()
    oracle = slerp_oracle(a, b, t)
    distinct = oracle.abs() > 1e-9
    assert (ulps(result, oracle)[distinct] <= 0.51).all()
    assert (result[~distinct].abs() < 1e-8).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_slerp_shapes_and_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = randoms(2, shape, dtype)
    result = slerp([a, b], 0.3)
    assert (result.shape, result.dtype) == (shape, dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), slerp_oracle(a, b, 0.3), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", FLOATS)
def test_slerp_at_its_ends_is_its_models(dtype: torch.dtype) -> None:
    a, b = randoms(2, (1000,), dtype)
    assert torch.equal(slerp([a, b], 0.0), a)
    assert torch.equal(slerp([a, b], 1.0), b)
    torch.testing.assert_close(slerp([a, a], 0.3), a, rtol=1e-15, atol=0)


def test_slerp_keeps_the_norm_of_equally_long_vectors() -> None:
    a, b = (v / v.norm() for v in randoms(2, (1000,), torch.float64))
    for t in (0.2, 0.5, 0.9):
        assert float(slerp([a, b], t).norm()) == pytest.approx(1, abs=1e-12)


def test_slerp_of_tiny_values_does_not_underflow() -> None:
    a, b = (1e-30 * v for v in randoms(2, (1000,), torch.float32))
    torch.testing.assert_close(
        slerp([a, b], 0.4).double() * 1e30, slerp_oracle(a.double() * 1e30, b.double() * 1e30, 0.4)
    )


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_slerp_refuses_t_outside_its_range(t: float) -> None:
    with pytest.raises(ValueError, match=r"t in \[0, 1\]"):
        slerp([torch.ones(2), torch.ones(2)], t)


def test_ties_by_hand() -> None:
    base = torch.full((2, 3), 10.0)
    a = base + torch.tensor([[4.0, -3.0, 0.5], [0.25, 2.0, 0.0]])
    b = base + torch.tensor([[2.0, 5.0, 0.1], [-1.0, -2.0, 0.3]])
    # Trimmed to 3 of 6: a keeps 4, -3, 2; b keeps 2, 5, -2. Elected: + (6), + (2), -, +, + (0).
    kept = ties(base, [a, b], [1, 1], [0.5, 0.5])
    assert kept.tolist() == [[13.0, 15.0, 10.0], [10.0, 12.0, 10.0]]
    summed = ties(base, [a, b], [1, 1], [0.5, 0.5], normalize=False)
    assert summed.tolist() == [[16.0, 15.0, 10.0], [10.0, 12.0, 10.0]]
    # Weighted 2 to 1, entry two is elected - (-6 + 5): only a's -3 counts.
    weighted = ties(base, [a, b], [2, 1], [0.5, 0.5])
    torch.testing.assert_close(
        weighted, torch.tensor([[10 + (2 * 4 + 2) / 3, 7.0, 10.0], [10.0, 12.0, 10.0]])
    )
    # Counting heads, entry two is a draw, which counts as +: only b's 5 counts.
    counted = ties(base, [a, b], [2, 1], [0.5, 0.5], naive_count=True)
    assert counted[0, 1] == 15.0


def test_ties_keeps_equal_magnitudes_at_the_threshold() -> None:
    base = torch.zeros(4)
    model = torch.tensor([1.0, -1.0, 1.0, 0.5])
    assert ties(base, [model], [1], [0.25]).tolist() == [1.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "count, normalize, naive_count",
    list(itertools.product([1, 2, 3, 5], [True, False], [True, False])),
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_agrees_with_the_oracle(
    dtype: torch.dtype, count: int, normalize: bool, naive_count: bool, device: torch.device
) -> None:
    base = randoms(1, (37, 211), dtype)[0]
    models = finetunes(base, count)
    weights, densities = [0.7, 0.3, 1.1, 0.3, 0.5][:count], [0.5, 0.2, 0.9, 1.0, 0.33][:count]
    flags = {"normalize": normalize, "naive_count": naive_count}
    result = ties(base.to(device), [m.to(device) for m in models], weights, densities, **flags)
    oracle = ties_oracle(base, models, weights, densities, **flags)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.cpu().double(), oracle, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-7
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_shapes(shape: tuple[int, ...]) -> None:
    base = randoms(1, shape, torch.float32)[0]
    models = finetunes(base, 2)
    result = ties(base, models, [1, 1], [0.4, 0.6])
    assert result.shape == shape
    oracle = ties_oracle(base, models, [1, 1], [0.4, 0.6], True, False)
    torch.testing.assert_close(result.double(), oracle)


def test_ties_with_density_one_and_one_model_is_that_model() -> None:
    base = randoms(1, (1000,), torch.bfloat16)[0]
    model = finetunes(base, 1)[0]
    assert torch.equal(ties(base, [model], [1], [1]), model)


def test_ties_with_the_base_listed_changes_nothing() -> None:
    base = randoms(1, (1000,), torch.bfloat16)[0]
    a, b = finetunes(base, 2)
    without = ties(base, [a, b], [0.7, 0.3], [0.5, 0.4])
    assert torch.equal(ties(base, [a, base, b], [0.7, 5.0, 0.3], [0.5, 0.9, 0.4]), without)
    assert torch.equal(ties(base, [base], [1], [0.5]), base)


def test_ties_with_the_same_model_twice_is_that_model() -> None:
    base = randoms(1, (1000,), torch.bfloat16)[0]
    model = finetunes(base, 1)[0]
    once = ties(base, [model], [1], [0.5])
    assert torch.equal(ties(base, [model, model], [0.4, 0.6], [0.5, 0.5]), once)


def test_ties_trims_in_the_dtype_of_its_arithmetic() -> None:
    """A float64 model beside a float32 one: its threshold is not rounded to float32."""
    base = torch.tensor([0.0, 2**-25 * 1.2, 0.0, 0.0])
    a = torch.tensor([1.0, 1.0, 0.5, 0.25])
    merged = ties(base, [a, base.double()], [1, 1], [0.25, 1], normalize=False, dtype=torch.float64)
    assert merged.tolist() == [1.0, float(base[1]), 0.0, 0.0]


@pytest.mark.parametrize("weight", [1e-300, 1e-46, 1e-40, 1e-38, 1e38, 1e39, 1e300])
def test_ties_of_one_normalised_model_does_not_depend_on_its_weight(weight: float) -> None:
    model = torch.tensor([1e-3, 1.0, -2.5])
    assert torch.equal(ties(torch.zeros(3), [model], [weight], [1.0]), model)


def test_ties_refuses_weights_beyond_float32() -> None:
    with pytest.raises(ValueError, match="weights up to 1e"):
        ties(torch.zeros(2), [torch.ones(2)], [1e39], [1.0], normalize=False)


def test_ties_needs_a_weight_for_each_model() -> None:
    with pytest.raises(ValueError, match="zip"):
        ties(torch.zeros(2), [torch.ones(2)], [1.0, 99.0], [1.0])


def test_parameters_of_modules_are_tensors_too() -> None:
    one, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))
    for result in (
        linear([one, other], [1, 1]),
        slerp([one, other], 0.5),
        ties(other, [one], [1], [0.5]),
    ):
        assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slerp_of_nearly_opposite_tensors_rounds_correctly(dtype: torch.dtype) -> None:
    a, noise = randoms(2, (33_000,), torch.float32)
    b = (-a + 0.034 * noise).to(dtype)
    a = a.to(dtype)
    assert ulps(slerp([a, b], 0.1), slerp_oracle(a, b, 0.1)).max() <= 0.51


def test_ties_counts_an_exact_tie_of_votes_as_plus() -> None:
    """0.3 * 5 = 0.5 * 3: rounded to float32 first, the votes would differ by their last bit."""
    base = torch.zeros(2)
    five, three = torch.tensor([5.0, 1.0]), torch.tensor([-3.0, 1.0])
    assert ties(base, [five, three], [0.3, 0.5], [1, 1], normalize=False)[0] == pytest.approx(1.5)
    assert ties(base, [-five, -three], [0.3, 0.5], [1, 1], normalize=False)[0] == pytest.approx(1.5)


def test_ties_with_negative_weights_subtracts() -> None:
    base, model = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert ties(base, [model], [-1], [1], normalize=False).tolist() == [-1.0, 2.0, -3.0]
    with pytest.raises(ValueError, match="negative weights"):
        ties(base, [model], [-1], [1])


@pytest.mark.parametrize("density", [-0.01, -0.5, 1.01, math.nan])
def test_ties_refuses_densities_outside_their_range(density: float) -> None:
    with pytest.raises(ValueError, match=r"densities in \[0, 1\]"):
        ties(torch.zeros(2), [torch.ones(2)], [1], [density])
