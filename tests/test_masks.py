"""What dare and della keep: the right share, by chance alone, and the same whatever computes it."""

import itertools
import math

import pytest
import torch
from oracles import della_probabilities, randoms
from torch import Tensor

from merge_methods import dare_linear, dare_ties, della, della_linear
from merging.arithmetic import chunks
from merging.arithmetic.masks import random_numbers
from merging.recipes.recipe import random_key

MANY = 1 << 20
FAR = 5.5  # standard deviations that chance does not reach, in all of these tests together


def kept(key: int, density: float, count: int = MANY) -> Tensor:
    """Return which entries of a tensor dare keeps."""
    zeros = torch.zeros(count)
    return dare_linear(zeros, [zeros + 1], [1], [density], [key], rescale=False) != 0


def deviations(hits: float, count: int, chance: float) -> float:
    """Return how far a count is from what is expected, in standard deviations."""
    return (float(hits) - count * chance) / math.sqrt(count * chance * (1 - chance))


def correlation(a: Tensor, b: Tensor, density: float) -> float:
    """Return how far the covariance of two masks is from none, in standard deviations."""
    covariance = float(((a.double() - density) * (b.double() - density)).sum())
    return covariance / (math.sqrt(len(a)) * density * (1 - density))


# -------------------------------------------------------------------- shares


@pytest.mark.parametrize("density", [1e-5, 0.0003, 0.01, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 1e-5])
def test_the_share_kept_is_the_density(density: float) -> None:
    total = sum(int(kept(key, density, 1 << 22).sum()) for key in (0, 1, 2**40, 2**63 + 11))
    assert abs(deviations(total, 4 << 22, density)) < FAR


def test_a_density_is_not_rounded_to_sixteen_bits() -> None:
    """A share of 2.5 / 65536 is neither 2 nor 3 of them."""
    density = 2.5 / 65536
    total = sum(int(kept(key, density, 1 << 24).sum()) for key in range(3))
    assert abs(deviations(total, 3 << 24, density)) < FAR


def test_more_density_keeps_more_of_the_same() -> None:
    half, most = kept(5, 0.5), kept(5, 0.8)
    assert bool((half <= most).all())
    assert bool(kept(5, 1.0).all())


@pytest.mark.parametrize("density, epsilon", [(0.5, 0.15), (0.5, 0.499), (0.1, 0.05), (0.8, 0.0)])
def test_della_keeps_each_rank_with_its_probability(density: float, epsilon: float) -> None:
    delta = randoms(1, (40_000, 8), torch.float32)[0]
    zeros = torch.zeros_like(delta)
    found = della_linear(zeros, [delta], [1], [density], [epsilon], [17], rescale=False) != 0
    ranks = delta.abs().argsort(1).argsort(1)
    for rank in range(8):
        chance = density - epsilon + 2 * epsilon * rank / 7
        hits = float(found[ranks == rank].sum())
        assert abs(deviations(hits, 40_000, chance)) < FAR


@pytest.mark.parametrize("shape", [(200_000,), (4, 50_000), (2, 2, 50_000)])
def test_della_keeps_the_density_on_average(shape: tuple[int, ...]) -> None:
    delta = randoms(1, shape, torch.float32)[0]
    found = della(torch.zeros_like(delta), [delta], [1], [0.3], [0.2], [4], rescale=False) != 0
    chance = della_probabilities(delta, 0.3, 0.2)
    spread = math.sqrt(float((chance * (1 - chance)).sum()))
    assert abs(float(found.sum() - chance.sum())) < FAR * spread
    largest = chance > 0.4
    spread = math.sqrt(float((chance * (1 - chance))[largest].sum()))
    assert abs(float(found[largest].sum() - chance[largest].sum())) < FAR * spread


# -------------------------------------------------------------------- means


def test_the_mean_over_keys_is_the_change() -> None:
    """Rescaled, both are unbiased, entry by entry and as a whole."""
    delta = randoms(1, (4, 250), torch.float64)[0]
    zeros, keys = torch.zeros_like(delta), range(1_000)
    chance = della_probabilities(delta, 0.4, 0.3)
    dared = sum(dare_linear(zeros, [delta], [1], [0.4], [key]) for key in keys) / len(keys)
    della_ = sum(della_linear(zeros, [delta], [1], [0.4], [0.3], [key]) for key in keys) / len(keys)
    for mean, p in ((dared, torch.full_like(delta, 0.4)), (della_, chance)):
        spread = delta.abs() * ((1 - p) / p / len(keys)).sqrt()
        scores = (mean - delta) / spread
        assert float(scores.abs().max()) < FAR
        assert abs(float(scores.mean())) * math.sqrt(delta.numel()) < FAR
        assert abs(float((scores**2).mean()) - 1) * math.sqrt(delta.numel() / 2) < FAR


# -------------------------------------------------------------------- independence


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_keys_that_differ_in_one_bit_are_independent(density: float) -> None:
    one = kept(0x1234_5678_9ABC_DEF0, density, 1 << 18)
    for bit in range(64):
        other = kept(0x1234_5678_9ABC_DEF0 ^ (1 << bit), density, 1 << 18)
        assert abs(correlation(one, other, density)) < FAR, bit


def test_keys_that_follow_each_other_are_independent() -> None:
    masks = [kept(key, 0.5, 1 << 18) for key in (0, 1, 2, 3, 255, 256, 2**32, 2**32 + 1)]
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation(a, b, 0.5)) < FAR
    # Nor are three: two of them do not tell the third.
    for a, b, c in itertools.combinations(masks, 3):
        odd = float((a ^ b ^ c).sum())
        assert abs(deviations(odd, 1 << 18, 0.5)) < FAR


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 256, 4096])
def test_no_mask_is_another_one_shifted(lag: int) -> None:
    """As it would be if a key were only added to the index, or xor-ed with it."""
    masks = [kept(key, 0.5, 1 << 18) for key in (0, 1, 2, lag, lag + 1, 1 << 32)]
    places = torch.arange(1 << 18)
    lower = places[places < places ^ lag]  # of each pair that xor makes, one
    for a, b in itertools.product(masks, repeat=2):
        assert abs(correlation(a[lag:], b[:-lag], 0.5)) < FAR
        assert abs(correlation(a[lower ^ lag], b[lower], 0.5)) < FAR


LAGS = [1, 2, 3, 5, 7, 8, 31, 1000, 2048, 5632, 11008, *(1 << p for p in range(4, 19))]


@pytest.mark.parametrize("key", [0, 1, 0xDEAD_BEEF_0000_0001])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_an_entry_does_not_tell_of_another(density: float, key: int) -> None:
    mask = kept(key, density)
    for lag in LAGS:
        assert abs(correlation(mask[lag:], mask[:-lag], density)) < FAR, lag
    for one, two in itertools.combinations([1, 2, 3, 64, 4096], 2):
        odd = (mask ^ mask.roll(one) ^ mask.roll(two)).sum() if density == 0.5 else MANY / 2
        assert abs(deviations(float(odd), MANY, 0.5)) < FAR, (one, two)


@pytest.mark.parametrize("key", [0, 99])
def test_patterns_of_eight_entries_are_equally_frequent(key: int) -> None:
    bits = kept(key, 0.5).view(-1, 8).long()
    counts = (bits << torch.arange(8)).sum(1).bincount(minlength=256).double()
    expected = len(bits) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < FAR * math.sqrt(2 * 255)


@pytest.mark.parametrize("block", [64, 1000, 4096])
def test_blocks_vary_as_chance_has_it(block: int) -> None:
    """Neither more nor less: a sequence that fills gaps evenly is none."""
    mask = kept(12, 0.3)[: MANY // block * block]
    counts = mask.view(-1, block).sum(1).double()
    scores = (counts - 0.3 * block) ** 2 / (block * 0.3 * 0.7)
    assert abs(float(scores.mean()) - 1) < FAR * math.sqrt(2 / len(counts)) + 0.5 / block


# -------------------------------------------------------------------- the same bytes


def test_a_mask_does_not_depend_on_what_it_is_of() -> None:
    """Of the tensor's dtype, its neighbours, its shape or how long it is."""
    mask = kept(8, 0.4, 6_000)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        base, model = randoms(2, (60, 100), dtype)
        model = model + 8
        found = dare_ties(base, [base, model, model], [1, 1, 0], [0.5, 0.4, 0.1], [1, 8, 2])
        assert torch.equal((found != base).flatten(), mask)
    assert torch.equal(kept(8, 0.4, 700), mask[:700])


def test_a_seed_gives_the_same_masks_in_every_version() -> None:
    """Numbers that must never change: models are made again by their seeds."""

    def numbers(key: int, start: int) -> list[int]:
        scratch = chunks.Scratch(4, torch.device("cpu"))
        return random_numbers(key, slice(start, start + 4), scratch).tolist()

    assert random_key(0, "model.norm.weight", 0) == 17729460177700975032
    assert random_key(1, "model.norm.weight", 1) == 14933110064474684048
    assert numbers(0, 0) == [1751558192, 428357321, 2018081222, 212931375]
    assert numbers(5, 0) == [834999122, 1400757968, 1042054231, 404771119]
    far = numbers((1 << 63) + 9, (1 << 32) - 2)
    assert far == [479381333, 977723335, 136791556, 2053325914]


def test_indices_beyond_32_bits_have_numbers_of_their_own() -> None:
    """As tensors of more entries have."""
    edge, width = 1 << 32, 4_096

    def numbers(start: int, stop: int) -> Tensor:
        scratch = chunks.Scratch(stop - start, torch.device("cpu"))
        return random_numbers(6, slice(start, stop), scratch).clone()

    across = numbers(edge - width, edge + width)
    assert torch.equal(across[:width], numbers(edge - width, edge))
    assert torch.equal(across[width:], numbers(edge, edge + width))
    assert torch.equal(across[100:-100], numbers(edge - width + 100, edge + width - 100))
    for start in (0, 2 * edge):  # none repeats another
        assert int((across[width:] == numbers(start, start + width)).sum()) < 3


@pytest.mark.parametrize("shape", [(7, 43_000), (3, 100, 501)])
def test_chunks_and_threads_do_not_change_a_bit(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, a, b = randoms(3, shape, torch.bfloat16)
    numbers = ([0.6, 0.4], [0.5, 0.3])

    def merged() -> list[Tensor]:
        return [
            dare_ties(base, [a, b], *numbers, [1, 2]),
            della(base, [a, b], *numbers, [0.15, 0.2], [3, 4]),
        ]

    expected = merged()
    threads = torch.get_num_threads()
    try:
        for size, count in ((1_000, 1), (99_991, 2), (1 << 24, 3)):
            monkeypatch.setattr(chunks, "CPU_CHUNK", size)
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(merged(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_masks_of_a_device_are_those_of_the_processor(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "DEVICE_CHUNK", 10_001)
    base, model = randoms(2, (30, 2_000), torch.float32)
    there = [t.to(device) for t in (base, model)]
    found = dare_linear(there[0], there[1:], [1], [0.3], [5])
    assert torch.equal(found.cpu(), dare_linear(base, [model], [1], [0.3], [5]))
    found = della_linear(there[0], there[1:], [1], [0.3], [0.1], [5])
    assert torch.equal(found.cpu(), della_linear(base, [model], [1], [0.3], [0.1], [5]))
