"""The methods that are weighted sums, against hand-computed cases and naive float64 oracles."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import (
    finetunes,
    karcher_oracle,
    model_stock_oracle,
    multislerp_oracle,
    nuslerp_oracle,
    randoms,
    task_arithmetic_oracle,
    wrong_sums,
)
from torch import Tensor

from merge_methods import (
    Undefined,
    karcher,
    model_stock,
    multislerp,
    nuslerp,
    slerp,
    task_arithmetic,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (301,), (13, 37), (3, 5, 17), (0,), (4, 0)]
WEIGHTS = [0.7, 0.2, 1.3, 0.4, 0.6]

# What each gives of a base and models, and what it should: (result, oracle).
Case = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]


def case(method: Callable[..., Tensor], oracle: Callable[..., Tensor], **options: Any) -> Case:
    """Return a case with the weights above, and with the base where its options name one."""

    def run(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        given = {"base": base} if options.get("base") else {}
        rest = {name: value for name, value in options.items() if name != "base"}
        weights = WEIGHTS[: len(models)]
        return method(models, weights, **given, **rest), oracle(models, weights, **given, **rest)

    return run


def added(normalize: bool, lambda_: float) -> Case:
    def run(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        weights = WEIGHTS[: len(models)]
        found = task_arithmetic(base, models, weights, normalize=normalize, lambda_=lambda_)
        return found, task_arithmetic_oracle(base, models, weights, normalize, lambda_)

    return run


def stocked(lambda_: float) -> Case:
    def run(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found = model_stock(base, models, lambda_=lambda_)
        return found, model_stock_oracle(base, models, lambda_)

    return run


CASES: dict[str, tuple[Case, int, int]] = {  # and the fewest and most models
    "task_arithmetic": (added(False, 1.0), 1, 5),
    "task_arithmetic, normalized, lambda": (added(True, 0.7), 1, 5),
    "nuslerp": (case(nuslerp, nuslerp_oracle), 2, 2),
    "nuslerp of changes": (case(nuslerp, nuslerp_oracle, base=True, lambda_=0.7), 2, 2),
    "multislerp": (case(multislerp, multislerp_oracle), 2, 5),
    "multislerp of changes": (case(multislerp, multislerp_oracle, base=True, lambda_=1.3), 2, 5),
    "karcher": (case(karcher, karcher_oracle), 2, 5),
    "model_stock": (stocked(1.0), 2, 5),
    "model_stock, lambda": (stocked(0.6), 2, 5),
}
COUNTS = [
    (name, count)
    for name, (_, fewest, most) in CASES.items()
    for count in (1, 2, 3, 5)
    if fewest <= count <= most
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name, count", COUNTS)
def test_rounds_correctly(name: str, count: int, dtype: torch.dtype, device: torch.device) -> None:
    base = randoms(1, (37, 811), dtype)[0].to(device)
    models = [m.to(device) for m in finetunes(base.cpu(), count)]
    tensors = [base.cpu(), *(m.cpu() for m in models)]
    result = CASES[name][0](base, models)[0].cpu()
    oracle = CASES[name][0](base.cpu(), [m.cpu() for m in models])[1]
    assert result.dtype == dtype
    assert wrong_sums(result, oracle, tensors) == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_rounds_correctly_where_models_differ_much(name: str, dtype: torch.dtype) -> None:
    run, _, most = CASES[name]
    base, *models = randoms(1 + min(3, most), (5_000,), dtype)
    result, oracle = run(base, models)
    assert wrong_sums(result, oracle, [base, *models]) == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str, dtype: torch.dtype) -> None:
    run, _, _ = CASES[name]
    for shape in SHAPES:
        base = randoms(1, shape, dtype, 5)[0]
        models = [base + d for d in randoms(2, shape, dtype, 6)]
        models = [m.abs() + base.abs() for m in models]  # so that one entry has one sign
        result, oracle = run(base, models)
        assert (result.shape, result.dtype) == (shape, dtype)
        assert wrong_sums(result, oracle, [base, *models]) == 0, shape


@pytest.mark.parametrize("name", CASES)
def test_mixed_dtypes_round_to_the_one_asked_for(name: str) -> None:
    run, _, _ = CASES[name]
    base = randoms(1, (3_000,), torch.float32)[0]
    models = [m.to(d) for m, d in zip(finetunes(base, 2), FLOATS[1:3], strict=True)]
    result, oracle = run(base, models)
    assert result.dtype == torch.float32
    assert wrong_sums(result, oracle, [base, *models]) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_output_dtype_may_be_another(dtype: torch.dtype) -> None:
    base = randoms(1, (1_000,), torch.float32)[0]
    models = finetunes(base, 2)
    oracle = karcher_oracle(models, [0.5, 0.2])
    result = karcher(models, [0.5, 0.2], dtype=dtype)
    assert result.dtype == dtype
    assert wrong_sums(result, oracle, models) == 0
    oracle = task_arithmetic_oracle(base, models, [0.5, 0.2], False, 1)
    result = task_arithmetic(base, models, [0.5, 0.2], dtype=dtype)
    assert result.dtype == dtype
    assert wrong_sums(result, oracle, [base, *models]) == 0


# -------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name in CASES if "task_arithmetic" not in name])
def test_equal_models_give_that_model(name: str, dtype: torch.dtype) -> None:
    """Or a part of its change of the base, where a lambda says so."""
    run, _, _ = CASES[name]
    base = randoms(1, (1_000,), dtype)[0]
    (model,) = finetunes(base, 1)
    result, oracle = run(base, [model, model])
    assert wrong_sums(result, oracle, [base, model, model]) == 0
    lambda_ = {"nuslerp of changes": 0.7, "multislerp of changes": 1.3, "model_stock, lambda": 0.6}
    delta = lambda_.get(name, 1.0) * (model.double() - base.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), base.double() + delta, rtol=eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "karcher"])
def test_models_equal_to_the_base_change_nothing(name: str, dtype: torch.dtype) -> None:
    run, _, _ = CASES[name]
    base = randoms(1, (1_000,), dtype)[0]
    result, _ = run(base, [base, base])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result, base, rtol=eps, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_one_model_equal_to_the_base(name: str) -> None:
    run, _, _ = CASES[name]
    base = randoms(1, (1_000,), torch.float32)[0]
    result, oracle = run(base, [finetunes(base, 1)[0], base])
    assert wrong_sums(result, oracle, [base, base, base]) == 0
    result, oracle = run(base, [base, finetunes(base, 1)[0]])
    assert wrong_sums(result, oracle, [base, base, base]) == 0


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize("name", CASES)
def test_zeros_give_zeros(name: str, shape: tuple[int, ...]) -> None:
    """A bias that no model uses must not stop a merge."""
    zeros = torch.zeros(shape)
    assert torch.equal(CASES[name][0](zeros, [zeros, zeros])[0], zeros)


@pytest.mark.parametrize("name", CASES)
def test_one_of_two_is_zero(name: str) -> None:
    run, _, _ = CASES[name]
    base = torch.zeros(400)
    model = randoms(1, (400,), torch.float32)[0]
    for models in ([model, base], [base, model]):
        result, oracle = run(base, models)
        assert wrong_sums(result, oracle, [model]) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_sizes_do_not_matter(name: str, dtype: torch.dtype, scale: float) -> None:
    """Squares of such numbers leave the range of float32, or are lost beside a constant."""
    run, _, _ = CASES[name]
    base, a, b = ((scale * t.double()).to(dtype) for t in randoms(3, (500,), torch.float32))
    result, oracle = run(base, [base + a, base + b])
    assert wrong_sums(result, oracle, [base, a, b]) == 0


# -------------------------------------------------------------------- by hand


def test_task_arithmetic_by_hand() -> None:
    base = torch.tensor([1.0, 2.0, -4.0])
    a, b = torch.tensor([2.0, 2.0, -8.0]), torch.tensor([1.0, 6.0, 0.0])
    assert task_arithmetic(base, [a, b], [1, 1]).tolist() == [2.0, 6.0, -4.0]
    assert task_arithmetic(base, [a, b], [1, -0.5]).tolist() == [2.0, 0.0, -10.0]
    assert task_arithmetic(base, [a, b], [1, 1], lambda_=2).tolist() == [3.0, 10.0, -4.0]
    assert task_arithmetic(base, [a, b], [3, 1], normalize=True).tolist() == [1.75, 3.0, -6.0]
    assert task_arithmetic(base, [a], [-1]).tolist() == [0.0, 2.0, 0.0]  # forgets a
    assert task_arithmetic(base, [a, b], [1, 1], lambda_=0).tolist() == base.tolist()
    with pytest.raises(ValueError, match="cannot be normalised"):
        task_arithmetic(base, [a, b], [1, -1], normalize=True)


def test_task_arithmetic_with_the_base_and_a_model_cancels_exactly() -> None:
    """base + 1 (model - base) is the model, whatever the base is."""
    base, model = torch.tensor([1e8, 1.0]), torch.tensor([1e-8, 3.0])
    assert torch.equal(task_arithmetic(base, [model], [1.0]), model)


def test_nuslerp_by_hand() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    # A third of the right angle: 30 degrees.
    third = torch.tensor([math.sqrt(3), 1.0])
    torch.testing.assert_close(nuslerp([a, b], [2, 1]), third)
    torch.testing.assert_close(nuslerp([a, b], [0.2, 0.1]), third)
    torch.testing.assert_close(nuslerp([a, b], [1, 2]), third.flip(0))
    base = torch.tensor([10.0, -10.0])
    torch.testing.assert_close(nuslerp([base + a, base + b], [2, 1], base=base), base + third)
    scaled = nuslerp([base + a, base + b], [2, 1], base=base, lambda_=0.5)
    torch.testing.assert_close(scaled, base + third / 2)


def test_nuslerp_takes_a_straight_line_where_there_is_no_arc() -> None:
    a = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(nuslerp([a, 5 * a], [3, 1]), 2 * a)
    torch.testing.assert_close(nuslerp([a, -a], [3, 1]), a / 2)
    torch.testing.assert_close(nuslerp([a, 0 * a], [3, 1]), 0.75 * a)


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.03])
def test_nuslerp_follows_short_arcs_too(angle: float) -> None:
    """A straight line would be too short, by the angle's square."""
    a, b = (torch.tensor([math.cos(x), math.sin(x)], dtype=torch.float64) for x in (0, angle))
    found = nuslerp([a, b], [1, 1])
    expected = [math.cos(angle / 2), math.sin(angle / 2)]
    assert found.tolist() == pytest.approx(expected, abs=2e-12 * angle, rel=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nuslerp_is_slerp(dtype: torch.dtype) -> None:
    a, b = randoms(2, (5_000,), dtype)
    torch.testing.assert_close(nuslerp([a, b], [0.75, 0.25]), slerp([a, b], 0.25))
    torch.testing.assert_close(nuslerp([a, b], [1, 0]), a)
    torch.testing.assert_close(nuslerp([a, b], [0, 1]), b)


def test_nuslerp_refuses_what_it_cannot_merge() -> None:
    a, b, c = randoms(3, (5,), torch.float32)
    with pytest.raises(ValueError, match="two"):
        nuslerp([a, b, c], [1, 1, 1])
    with pytest.raises(ValueError, match="cannot be normalised"):
        nuslerp([a, b], [1, -1])


def test_multislerp_by_hand() -> None:
    """Towards the weighted mean of the unit vectors, and as long as the weighted mean length."""
    axes = [torch.tensor(v) for v in ([3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 6.0])]
    diagonal = torch.full((3,), 4 / math.sqrt(3))
    torch.testing.assert_close(multislerp(axes, [1, 1, 1]), diagonal)
    slanted = torch.tensor([3.0, 1.0, 0.0]) / math.sqrt(10)
    torch.testing.assert_close(multislerp(axes[:2], [3, 1]), 3 * slanted)
    base = torch.tensor([1.0, 2.0, 3.0])
    found = multislerp([base + v for v in axes[:2]], [3, 1], base=base, lambda_=0.5)
    torch.testing.assert_close(found, base + 1.5 * slanted)


def test_multislerp_of_two_equal_weights_is_half_way_on_the_arc() -> None:
    a, b = (v / v.norm() for v in randoms(2, (1_000,), torch.float64))
    torch.testing.assert_close(multislerp([a, b], [1, 1]), slerp([a, b], 0.5))


def test_multislerp_does_not_depend_on_the_order_of_models() -> None:
    a, b, c = randoms(3, (1_000,), torch.bfloat16)
    found = multislerp([a, b, c], [0.2, 0.3, 0.5])
    torch.testing.assert_close(multislerp([c, a, b], [0.5, 0.2, 0.3]), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_multislerp_of_a_change_of_a_single_tiny_entry(dtype: torch.dtype) -> None:
    base, step = randoms(2, (30, 20), dtype)
    base[0, 0] = 0
    a, b = (base + step / 16).to(dtype), base.clone()
    b[0, 0] = 1e-20
    delta = a.double() - base.double()
    along = torch.zeros(30, 20, dtype=torch.float64)
    along[0, 0] = 1
    mean = delta / delta.norm() + along
    expected = base.double() + mean / mean.norm() * (delta.norm() + float(b[0, 0])) / 2
    torch.testing.assert_close(multislerp([a, b], [1.0, 1.0], base=base), expected.to(dtype))


def test_multislerp_of_sixteen_bits_where_directions_all_but_cancel() -> None:
    """The mean is so short, 0.0008, that sums in float32 would be wrong by a hundredth of it."""
    a = randoms(1, (20_000,), torch.bfloat16)[0]
    b = -(1.37 * a)
    found, exact = multislerp([a, b], [1, 1]), multislerp_oracle([a, b], [1, 1])
    assert (found.double() - exact).norm() < 2**-8 * exact.norm()


def test_multislerp_refuses_vectors_without_a_mean() -> None:
    a = randoms(1, (50,), torch.float32)[0]
    with pytest.raises(Undefined, match="mean"):
        multislerp([a, -a], [1, 1])
    with pytest.raises(Undefined, match="mean"):
        multislerp([a + 1, 1 - a], [1, 1], base=torch.ones(50))
    with pytest.raises(ValueError, match="cannot be normalised"):
        multislerp([a, 2 * a], [1, -1])
    # Where one weighs more, there is one.
    torch.testing.assert_close(multislerp([a, -a], [3, 1]), a)


def test_karcher_by_hand() -> None:
    """Between two vectors, the point that divides their angle as the weights say."""
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 6.0])
    length = (2 * 2 + 1 * 6) / 3
    expected = length * torch.tensor([math.sqrt(3) / 2, 0.5])
    torch.testing.assert_close(karcher([a, b], [2, 1]), expected)
    axes = [torch.tensor(v) for v in ([3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 6.0])]
    torch.testing.assert_close(karcher(axes, [1, 1, 1]), torch.full((3,), 4 / math.sqrt(3)))


@pytest.mark.parametrize("degrees", [1e-4, 1.0, 60.0, 120.0, 170.0, 179.0, 179.9])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_karcher_of_two_is_on_the_arc(share: float, degrees: float) -> None:
    angle = math.radians(degrees)
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    found = karcher([a, b], [1 - share, share])
    at = share * angle
    expected = torch.tensor([math.cos(at), math.sin(at)], dtype=torch.float64)
    lost = 1 / (1 + math.cos(angle))  # of nearly opposite vectors, large multiples cancel
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15 * (10 + lost))


@pytest.mark.parametrize("count", [3, 5])
def test_karcher_is_where_the_weighted_logs_cancel(count: int) -> None:
    """The property that defines the mean, seen from the result."""
    tensors = randoms(count, (300,), torch.float64)
    mean = karcher(tensors, WEIGHTS[:count])
    mean = mean / mean.norm()
    total = torch.zeros_like(mean)
    for weight, tensor in zip(WEIGHTS, tensors, strict=False):
        unit = tensor / tensor.norm()
        away = unit - (unit @ mean) * mean
        total += weight * torch.acos(unit @ mean) * away / away.norm()
    assert float(total.norm()) < 1e-12


def test_karcher_leaves_vectors_of_norm_zero_out_of_the_direction() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    found = karcher([a, torch.zeros(2), b], [1, 2, 1])
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(2) / 2))


def test_karcher_refuses_opposite_directions() -> None:
    """Which have no one mean; unless one of them has no weight."""
    a = randoms(1, (50,), torch.float32)[0]
    for tensors, weights in (([a, -a], [1, 1]), ([a, -2 * a], [3, 1]), ([a, a, -a], [1, 1, 1])):
        with pytest.raises(Undefined, match="opposite directions"):
            karcher(tensors, weights)
    torch.testing.assert_close(karcher([a, -a], [1, 0]), a)
    with pytest.raises(ValueError, match="at least 0"):
        karcher([a, 2 * a], [1, -0.5])
    with pytest.raises(ValueError, match="cannot be normalised"):
        karcher([a, 2 * a], [0, 0])


def test_model_stock_by_hand() -> None:
    base = torch.tensor([1.0, 1.0])
    # Changes (2, 0) and (1, sqrt 3): 60 degrees, so t = 2 * 0.5 / 1.5 = 2/3 of their mean.
    models = [base + torch.tensor([2.0, 0.0]), base + torch.tensor([1.0, math.sqrt(3)])]
    expected = base + 2 / 3 * torch.tensor([1.5, math.sqrt(3) / 2])
    torch.testing.assert_close(model_stock(base, models), expected)
    # Three: the mean cosine of all pairs, here 0.5, gives t = 3 * 0.5 / 2.
    three = [torch.tensor(v) for v in ([1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0])]
    torch.testing.assert_close(model_stock(torch.zeros(3), three), 0.75 * torch.full((3,), 2 / 3))


def test_model_stock_of_opposed_changes_is_the_base() -> None:
    base, a = randoms(2, (1_000,), torch.float32)
    assert torch.equal(model_stock(base, [base + a, base - a]), base)
    right = torch.eye(2)
    assert torch.equal(model_stock(torch.zeros(2), list(right)), torch.zeros(2))


@pytest.mark.parametrize("method", [multislerp, karcher, nuslerp])
def test_a_weight_for_each_model(method: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="zip|weights|models|tensors"):
        method(randoms(2, (4,), torch.float32), [1.0])


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_modules_are_tensors_too(name: str) -> None:
    base, one, other = (torch.nn.Parameter(t) for t in randoms(3, (6,), torch.float32))
    with torch.no_grad():  # for the oracle
        result, _ = CASES[name][0](base, [one, other])
    assert not result.requires_grad
