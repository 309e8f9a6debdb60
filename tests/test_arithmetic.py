"""Selection, sums and chunks: exact, and the same whatever the chunks are."""

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from oracles import randoms
from torch import Tensor

from merge_methods import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    ram,
    ramplus_tl,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
from merging.arithmetic import chunks, memory, selection
from merging.arithmetic.likeness import LIKENESS_CHUNK
from merging.arithmetic.products import blocks
from merging.arithmetic.selection import trim_threshold
from merging.arithmetic.sums import cosine, gram_matrix, weighted_sum
from merging.arithmetic.weights import normalized

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# -------------------------------------------------------------------- the k-th largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.001, 0.33, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("small", [0, 10_000])
def test_ties_keeps_exactly_the_largest(
    small: int, density: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "SMALL", small)
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
    monkeypatch.setattr(selection, "SMALL", 0)
    monkeypatch.setattr(selection, "COUNT_CHUNK", 7001)
    monkeypatch.setattr(selection, "CPU_CHUNK", 7001)
    monkeypatch.setattr(selection, "SAMPLE", 14_000)  # of 40,000 entries: every third
    model = awkward_deltas(kind, 40_000)
    base = torch.zeros_like(model)
    k = max(1, math.floor(density * len(model)))
    kth = model.abs().sort(descending=True).values[k - 1]
    expected = float(torch.nextafter(kth, torch.zeros(())))
    counts: list[Tensor] = []
    bincount = torch.bincount  # which only counting needs, on a processor

    def counting(*given: Any, **options: Any) -> Tensor:
        counts.append(bincount(*given, **options))
        return counts[-1]

    monkeypatch.setattr(torch, "bincount", counting)
    sampled = trim_threshold(base, model, density, None, torch.float32)
    was_counted = bool(counts)
    monkeypatch.setattr(selection, "SMALL", 1 << 30)
    selected = trim_threshold(base.to(device), model.to(device), density, device, torch.float32)
    monkeypatch.setattr(selection, "SMALL", 0)
    monkeypatch.setattr(selection, "MOST_BETWEEN", -(1 << 40))  # so that a sample never helps
    counted = trim_threshold(base.to(device), model.to(device), density, device, torch.float32)
    streamed = trim_threshold(base, model, density, device, torch.float32)
    assert counts or device.type != "cpu"
    assert {repr(found) for found in (sampled, selected, counted, streamed)} == {repr(expected)}
    if kind in ("normal", "quantised", "one value"):
        assert not was_counted
    if kind == "misleading" and density == 0.2:
        assert was_counted


# -------------------------------------------------------------------- chunks


Merge = Callable[..., Tensor]  # of three tensors


def of_changes(method: Merge, *numbers: object, models: int = 2, **options: object) -> Merge:
    """Return a merge of what models changed of the first tensor."""
    return lambda tensors, **to: method(
        tensors[0], tensors[1 : 1 + models], *numbers, **options, **to
    )


W, D = [0.6, 0.3], [0.5, 0.2]
METHODS: dict[str, Merge] = {
    "linear": lambda tensors, **to: linear(tensors, [0.6, 0.3, 0.2], **to),
    "slerp": lambda tensors, **to: slerp([tensors[0], tensors[1]], 0.3, **to),
    "nuslerp": lambda tensors, **to: nuslerp([tensors[0], tensors[1]], W, **to),
    "nuslerp of changes": lambda tensors, **to: nuslerp(tensors[1:], W, base=tensors[0], **to),
    "multislerp": lambda tensors, **to: multislerp(tensors, [0.6, 0.3, 0.2], **to),
    "multislerp of changes": lambda tensors, **to: multislerp(
        tensors[1:], W, base=tensors[0], lambda_=0.7, **to
    ),
    "karcher": lambda tensors, **to: karcher(tensors, [0.6, 0.3, 0.2], **to),
    "task_arithmetic": of_changes(task_arithmetic, W, lambda_=0.7),
    "model_stock": of_changes(model_stock),
    "ties": of_changes(ties, W, D),
    "ties, thresholds": of_changes(ties, W, D, thresholds=[0.7, 0.2]),
    "ties, naive count": lambda tensors, **to: ties(
        tensors[0],
        [*tensors[1:], tensors[2]],
        [0.6, 0.3, 0.3],
        [0.5, 0.2, 0.2],
        naive_count=True,
        **to,
    ),
    "dare_linear": of_changes(dare_linear, W, D, [1, 2]),
    "dare_ties": of_changes(dare_ties, W, D, [1, 2]),
    "della_linear": of_changes(della_linear, W, D, [0.1, 0.1], [1, 2]),
    "della": of_changes(della, W, D, [0.1, 0.1], [1, 2]),
    "breadcrumbs": of_changes(breadcrumbs, W, D, [0.01, 0.1]),
    "breadcrumbs_ties": of_changes(breadcrumbs_ties, W, D, [0.01, 0.1]),
    "sce": of_changes(sce, select_topk=0.4),
    "ram": of_changes(ram, epsilon=0.3),
    "ramplus_tl": of_changes(ramplus_tl, epsilon=0.3),
    "nearswap": of_changes(nearswap, 0.3, models=1),
    "arcee_fusion": of_changes(arcee_fusion, models=1),
}
OF_TWO = ("slerp", "nuslerp", "nearswap", "arcee_fusion")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_streaming_to_a_device_gives_the_same_as_moving_there(
    method: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = randoms(3, (40_009,), dtype)
    whole = METHODS[method]([t.to(device) for t in tensors])
    monkeypatch.setattr(chunks, "DEVICE_CHUNK", 17_001)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 17_001)
    monkeypatch.setattr(selection, "CPU_CHUNK", 17_001)
    streamed = METHODS[method](tensors, device=device)
    assert streamed.device.type == "cpu"
    assert torch.equal(streamed, whole.cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtype, shape", [*((dtype, (40_009,)) for dtype in FLOATS), (torch.bfloat16, (251, 163))]
)
def test_chunks_and_threads_do_not_change_a_bit(
    method: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = randoms(3, shape, dtype)
    expected = METHODS[method](tensors)
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((3_000, 1), (17_001, 3), (1 << 24, 2)):
            monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
            monkeypatch.setattr(selection, "CPU_CHUNK", chunk)
            torch.set_num_threads(count)
            assert torch.equal(METHODS[method](tensors), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_used_memory_does_not_change_a_bit(method: str, reused: list[Tensor]) -> None:
    """Whatever it holds of an earlier merge, of another dtype, of the results and the scratch."""
    tensors = randoms(3, (251, 163), torch.float32)
    expected = METHODS[method](tensors)
    kept = expected.clone()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        memory.release(METHODS[method](randoms(3, (251, 163), dtype)))
        assert reused
        assert torch.equal(METHODS[method](tensors), kept)
        assert torch.equal(expected, kept)  # which nobody released


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Use all memory again, however little; give what is unused."""
    unused: list[Tensor] = []
    monkeypatch.setattr(memory, "SMALLEST", 1)
    monkeypatch.setattr(memory, "_unused", unused)
    return unused


def test_memory_is_used_again_where_it_fits(reused: list[Tensor]) -> None:
    cpu = torch.device("cpu")

    def empty(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return memory.empty(count, dtype, cpu)

    first, second = empty(1000), empty(1000)
    places = first.data_ptr(), second.data_ptr()
    assert places[0] != places[1]
    memory.release(first[200:300].view(10, 10))  # a view stands for all of its memory
    assert empty(1001).data_ptr() not in places
    assert empty(799).data_ptr() not in places  # four fifths, at least
    again = empty(1600, torch.bfloat16)
    assert (again.data_ptr(), again.shape, again.dtype) == (places[0], (1600,), torch.bfloat16)
    assert empty(1600, torch.bfloat16).data_ptr() not in places
    memory.release(again)
    assert empty(500, torch.float64).data_ptr() == places[0]
    assert not reused


def test_little_unused_memory_is_kept(
    reused: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 100)
    monkeypatch.setattr(memory, "KEPT", 1000)
    for nbytes in (99, 400, 500, 1001, 300, 200):
        memory.release(torch.empty(nbytes, dtype=torch.uint8))
    assert [block.nbytes for block in reused] == [500, 300, 200]
    memory.release(torch.empty(300, dtype=torch.uint8, device="meta"))
    memory.release(torch.empty(300, dtype=torch.uint8)[:0])
    assert len(reused) == 3


@pytest.mark.parametrize("method", METHODS)
def test_results_without_entries_are_no_views_of_inputs(method: str) -> None:
    wide = randoms(3, (40, 60), torch.float32)
    result = METHODS[method]([t[:, :0] for t in wide])
    assert result.shape == (40, 0)
    assert result.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("method", METHODS)
def test_views_give_the_same_as_copies(method: str) -> None:
    wide = randoms(3, (40, 60), torch.float32)
    views = [t.T[:, ::2] for t in wide]
    assert torch.equal(METHODS[method](views), METHODS[method]([v.contiguous() for v in views]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_not_modified(method: str, dtype: torch.dtype) -> None:
    tensors = randoms(3, (50, 40), dtype)
    before = [t.clone() for t in tensors]
    METHODS[method](tensors)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_reach_the_output(method: str, value: float) -> None:
    for position in range(3):
        tensors = randoms(3, (100,), torch.float32)
        tensors[position][3] = value
        result = METHODS[method](tensors)
        assert not result.isfinite().all() or (position == 2 and method in OF_TWO)


@pytest.mark.parametrize("method", METHODS)
def test_other_shapes_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="one shape"):
        METHODS[method]([torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3)])


# -------------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_matrix_holds_all_dot_products(dtype: torch.dtype, device: torch.device) -> None:
    tensors = randoms(3, (50, 401), dtype)
    gram = gram_matrix([t.to(device) for t in tensors])
    flat = torch.stack([t.double().flatten() for t in tensors])
    expected = flat @ flat.T
    torch.testing.assert_close(torch.tensor(gram, dtype=torch.float64), expected, rtol=1e-6, atol=1)
    cosines = expected / torch.outer(expected.diag().sqrt(), expected.diag().sqrt())
    assert cosine(gram, 0, 1) == pytest.approx(float(cosines[0, 1]), abs=1e-6)
    assert cosine(gram, 2, 2) == pytest.approx(1)


@pytest.mark.parametrize("work", [torch.float32, torch.float64])
def test_chunks_have_so_many_rows_that_numpy_lets_other_threads_run(work: torch.dtype) -> None:
    for size in (chunks.chunk_size(1 << 30, torch.device("cpu"), work=work), LIKENESS_CHUNK):
        (whole,) = blocks(torch.zeros(size, dtype=work))
        assert math.prod(whole.shape[:-1]) > 500  # NPY_BEGIN_THREADS_THRESHOLDED of numpy
        assert whole.size == size


def test_cosine_with_a_zero_vector_is_zero() -> None:
    assert cosine(gram_matrix([torch.zeros(3), torch.ones(3)]), 0, 1) == 0


def test_weighted_sums_are_rounded_once() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([2.0**-30])
    assert weighted_sum([a, b, a], [1, 1, -1]).tolist() == [2.0**-30]
    assert weighted_sum([a, b], [0.5, 0], torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_sums_of_16_bits_do_not_depend_on_fused_multiplication(dtype: torch.dtype) -> None:
    # Of such weights a hundred sums lie halfway between two results, but for the last digits.
    values = randoms(3, (300_001,), dtype)
    weights = [Fraction(round(Fraction(w) * 2**43), 2**43) for w in (0.3, 0.3, 0.4)]  # 42 digits
    products = [v.double().numpy() * float(w) for v, w in zip(values, weights, strict=True)]
    exact = [Fraction(v[7].item()) * w for v, w in zip(values, weights, strict=True)]
    assert [Fraction(product[7].item()) for product in products] == exact
    expected = torch.from_numpy(products[0] + products[1] + products[2]).to(dtype)
    assert torch.equal(weighted_sum(values, [0.3, 0.3, 0.4]), expected)
    assert weighted_sum(values, [math.nan, 0.3, 0.4]).isnan().all()


def test_weights_at_the_ends_of_their_range() -> None:
    x = torch.tensor([1.5, -2.0, 0.0], dtype=torch.bfloat16)
    largest = weighted_sum([x, x], [sys.float_info.max, 0.5])
    assert largest.tolist() == [math.inf, -math.inf, 0]
    assert weighted_sum([x, x], [-0.0, 0.0]).signbit().tolist() == [False] * 3


def test_weights_are_divided_by_their_sum_and_its_sign() -> None:
    assert normalized([1, 3]) == [0.25, 0.75]
    assert normalized([-1, -3]) == [0.25, 0.75]
    assert normalized([-3, 1]) == [1.5, -0.5]
    with pytest.raises(ValueError, match="sum to 0 and cannot be normalised"):
        normalized([1, -1])
