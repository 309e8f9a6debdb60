"""The tensor maths, against hand-computed cases and a naive float64 oracle."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import merge_methods
from merge_methods import linear, slerp, ties

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (301,), (13, 37), (3, 5, 17), (0,), (4, 0)]


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


# -------------------------------------------------------------------- linear


def test_linear_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([3.0, 6.0, 8.0])
    assert linear([a, b], [1, 3]).tolist() == [2.5, 5.0, 5.0]
    assert linear([a, b], [1, 3], normalize=False).tolist() == [10.0, 20.0, 20.0]
    assert linear([a, b], [2, -1]).tolist() == [-1.0, -2.0, -16.0]
    assert linear([a], [0.25]).tolist() == a.tolist()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(0.6, 0.2), (0.3, 0.3, 0.1), (1.7, -0.4), (0.1,) * 5])
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


# -------------------------------------------------------------------- slerp


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    half = math.sqrt(2)
    torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([half, half]))
    third = slerp(a, 3 * b, 1 / 3)  # orthogonal, of different length: 30 degrees of the way
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
    result = slerp(a.to(device), b.to(device), t).cpu()
    oracle = slerp_oracle(a, b, t)
    distinct = oracle.abs() > 1e-9
    assert (ulps(result, oracle)[distinct] <= 0.51).all()
    assert (result[~distinct].abs() < 1e-8).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_slerp_shapes_and_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = randoms(2, shape, dtype)
    result = slerp(a, b, 0.3)
    assert (result.shape, result.dtype) == (shape, dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), slerp_oracle(a, b, 0.3), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", FLOATS)
def test_slerp_at_its_ends_is_its_models(dtype: torch.dtype) -> None:
    a, b = randoms(2, (1000,), dtype)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a, rtol=1e-15, atol=0)


def test_slerp_keeps_the_norm_of_equally_long_vectors() -> None:
    a, b = (v / v.norm() for v in randoms(2, (1000,), torch.float64))
    for t in (0.2, 0.5, 0.9):
        assert float(slerp(a, b, t).norm()) == pytest.approx(1, abs=1e-12)


def test_slerp_of_tiny_values_does_not_underflow() -> None:
    a, b = (1e-30 * v for v in randoms(2, (1000,), torch.float32))
    torch.testing.assert_close(
        slerp(a, b, 0.4).double() * 1e30, slerp_oracle(a.double() * 1e30, b.double() * 1e30, 0.4)
    )


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_slerp_refuses_t_outside_its_range(t: float) -> None:
    with pytest.raises(ValueError, match=r"t in \[0, 1\]"):
        slerp(torch.ones(2), torch.ones(2), t)


# -------------------------------------------------------------------- ties


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.001, 0.33, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("small", [0, 10_000])
def test_ties_keeps_exactly_the_largest(
    small: int, density: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_methods, "SMALL", small)
    base = torch.zeros(5000, dtype=dtype)
    model = randoms(1, (5000,), dtype)[0]
    k = max(1, math.floor(density * 5000))
    kth = model.abs().sort(descending=True).values[k - 1]
    expected = torch.where(model.abs() >= kth, model, 0)
    assert torch.equal(ties(base, [model], [1], [density]), expected)


def awkward_deltas(kind: str, count: int) -> Tensor:
    values = randoms(1, (count,), torch.float32)[0]
    if kind == "quantised":  # as fine-tunes in bfloat16 are: few values, each of them often
        return (values * 4).round()
    if kind == "sparse":
        return values * (values.abs() > 1.5)
    if kind == "one value":
        return torch.full((count,), 0.25)
    if kind == "misleading":  # what a sample of every third entry sees is not what there is
        return values.abs() + 10.0 * (torch.arange(count) % 3 != 0)
    if kind == "non-finite":
        return torch.where(values > 1, math.inf, torch.where(values < -2, math.nan, values))
    return values


@pytest.mark.parametrize(
    "kind", ["normal", "quantised", "sparse", "one value", "misleading", "non-finite"]
)
@pytest.mark.parametrize("density", [1e-9, 0.001, 0.2, 0.5, 0.999])
def test_every_way_finds_the_kth_largest(
    kind: str, density: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_methods, "SMALL", 0)
    monkeypatch.setattr(merge_methods, "CPU_CHUNK", 7001)
    monkeypatch.setattr(merge_methods, "SAMPLE", 14_000)  # of 40,000 entries: every third
    model = awkward_deltas(kind, 40_000)
    base = torch.zeros_like(model)
    k = max(1, math.floor(density * len(model)))
    expected = float(model.abs().sort(descending=True).values[k - 1])
    counted = merge_methods._kth_by_counting(
        base.to(device), model.to(device), k, torch.float32, device
    )
    streamed = merge_methods._kth_by_counting(base, model, k, torch.float32, device)
    sampled = merge_methods._kth_by_sample(base, model, k, torch.float32)
    found = {repr(counted), repr(streamed), repr(sampled)}
    assert found <= {repr(expected), "None"}
    if kind in ("normal", "quantised", "one value"):
        assert repr(sampled) == repr(expected)
    if kind == "misleading" and density == 0.2:
        assert sampled is None


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
        slerp(one, other, 0.5),
        ties(other, [one], [1], [0.5]),
    ):
        assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slerp_of_nearly_opposite_tensors_rounds_correctly(dtype: torch.dtype) -> None:
    a, noise = randoms(2, (33_000,), torch.float32)
    b = (-a + 0.034 * noise).to(dtype)
    a = a.to(dtype)
    assert ulps(slerp(a, b, 0.1), slerp_oracle(a, b, 0.1)).max() <= 0.51


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


@pytest.mark.parametrize("density", [0.0, -0.5, 1.01, math.nan])
def test_ties_refuses_densities_outside_their_range(density: float) -> None:
    with pytest.raises(ValueError, match=r"densities in \(0, 1\]"):
        ties(torch.zeros(2), [torch.ones(2)], [1], [density])


# -------------------------------------------------------------------- all methods

METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda tensors, **to: linear(tensors, [0.6, 0.3, 0.2], **to),
    "slerp": lambda tensors, **to: slerp(tensors[0], tensors[1], 0.3, **to),
    "ties": lambda tensors, **to: ties(tensors[0], tensors[1:], [0.6, 0.3], [0.5, 0.2], **to),
    "ties, naive count": lambda tensors, **to: ties(
        tensors[0],
        [*tensors[1:], tensors[2]],
        [0.6, 0.3, 0.3],
        [0.5, 0.2, 0.2],
        naive_count=True,
        **to,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_streaming_to_a_device_gives_the_same_as_moving_there(
    method: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = randoms(3, (250_007,), dtype)
    whole = METHODS[method]([t.to(device) for t in tensors])
    monkeypatch.setattr(merge_methods, "DEVICE_CHUNK", 99_991)
    monkeypatch.setattr(merge_methods, "CPU_CHUNK", 99_991)
    streamed = METHODS[method](tensors, device=device)
    assert streamed.device.type == "cpu"
    assert torch.equal(streamed, whole.cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_not_modified(method: str, dtype: torch.dtype) -> None:
    tensors = randoms(3, (50, 40), dtype)
    before = [t.clone() for t in tensors]
    METHODS[method](tensors)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_chunks_and_threads_do_not_change_a_bit(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = randoms(3, (250_007,), dtype)
    expected = METHODS[method](tensors)
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((10_000, 1), (99_991, 3), (1 << 24, 2)):
            monkeypatch.setattr(merge_methods, "CPU_CHUNK", chunk)
            torch.set_num_threads(count)
            assert torch.equal(METHODS[method](tensors), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_views_give_the_same_as_copies(method: str) -> None:
    wide = randoms(3, (40, 60), torch.float32)
    views = [t.T[:, ::2] for t in wide]
    assert torch.equal(METHODS[method](views), METHODS[method]([v.contiguous() for v in views]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_reach_the_output(method: str, value: float) -> None:
    for position in range(3):
        tensors = randoms(3, (100,), torch.float32)
        tensors[position][3] = value
        result = METHODS[method](tensors)
        assert not result.isfinite().all() or (position == 2 and method == "slerp")


@pytest.mark.parametrize("method", METHODS)
def test_other_shapes_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="one shape"):
        METHODS[method]([torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3)])
