"""Keep entries at random, by a counter: whether one is kept depends on a key and its index alone.

So masks do not depend on threads, chunks or devices. The generator mixes the index, a number of 32
bits, with both halves of the key, by products and shifts (as in Murmur3's finalizer, Appleby 2011);
the upper 31 bits of what comes out are compared with the probability.
"""

import torch
from torch import Tensor

from merging.arithmetic.chunks import BITS, Scratch

RANGE = 1 << 31  # of the random numbers


def _signed(number: int) -> int:
    """Return the int32 that has the lowest 32 bits of a number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _mixed_key(key: int) -> int:
    """Spread what differs between keys over 64 bits (splitmix64, Steele, Lea and Flood 2014)."""
    key = (key + 0x9E3779B97F4A7C15) % (1 << 64)
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    key = (key ^ key >> 27) * 0x94D049BB133111EB % (1 << 64)
    return key ^ key >> 31


def random_numbers(key: int, part: slice, scratch: Scratch) -> Tensor:
    """Return numbers from 0 to 2^31 - 1, evenly distributed, for the entries of a slice."""
    bits = scratch("random", torch.int32, part.stop - part.start)
    middle = (part.stop - 1 >> 32 << 32) - part.start  # where the upper half of indices changes
    for piece in (slice(0, max(0, middle)), slice(max(0, middle), len(bits))):
        if piece.start < piece.stop:
            _fill(bits[piece], key, part.start + piece.start, scratch)
    return bits


def _fill(bits: Tensor, key: int, start: int, scratch: Scratch) -> None:
    """Fill in the numbers of entries from `start`, whose indices have one upper half."""
    mixed = _mixed_key(key + (start >> 32) * 0xD1342543DE82EF95)
    shifted = scratch("shifted", torch.int32, len(bits))
    torch.arange(len(bits), out=bits)
    bits.add_(_signed(start + mixed)).mul_(_signed(0x85EBCA6B))
    _fold(bits, 16, shifted)
    bits.mul_(_signed(0xC2B2AE35))
    _fold(bits, 15, shifted)
    bits.add_(_signed(mixed >> 32)).mul_(_signed(0x27D4EB2F))
    _fold(bits, 15, shifted)
    bits.mul_(_signed(0x165667B1))
    bits.bitwise_right_shift_(1).bitwise_and_(RANGE - 1)


def _fold(bits: Tensor, shift: int, shifted: Tensor) -> None:
    """Add the upper bits to the lower ones, without a carry."""
    torch.bitwise_right_shift(bits, shift, out=shifted)  # which fills in the sign
    bits.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1))


def _keep_below(delta: Tensor, numbers: Tensor, limits: int | Tensor) -> None:
    """Make zeros of the entries whose number is not below its limit."""
    keep = numbers.sub_(limits).bitwise_right_shift_(31)  # all bits, or none
    as_bits = delta.view(BITS[delta.dtype])
    as_bits.bitwise_and_(keep.to(as_bits.dtype))


def _limit(density: float) -> int:
    """Return how many of the random numbers are below a probability's limit."""
    return min(RANGE - 1, round(density * RANGE))


def keep_at_random(
    delta: Tensor, density: float, key: int, part: slice, rescale: bool, scratch: Scratch
) -> None:
    """Keep each entry with the probability `density`, and divide what is kept by that."""
    if density < 1:
        _keep_below(delta, random_numbers(key, part, scratch), _limit(density))
        if rescale and density > 0:
            delta.mul_(1 / density)


def keep_by_rank(
    delta: Tensor,
    row_length: int,
    density: float,
    epsilon: float,
    key: int,
    part: slice,
    rescale: bool,
    scratch: Scratch,
) -> None:
    """Keep each entry with a probability by its rank in its row; divide what is kept by that.

    From density - epsilon for the smallest magnitude of a row to density + epsilon for the largest,
    evenly; of equal magnitudes, later ones are larger. The only one of a row has `density`. A
    density of 0 or 1 is that of all entries.
    """
    if density in {0, 1}:
        delta.mul_(density)
        return
    by_rank = torch.arange(row_length, dtype=torch.float64, device=delta.device)
    if row_length > 1:
        by_rank.mul_(2 * epsilon / (row_length - 1)).add_(density - epsilon)
    else:
        by_rank.fill_(density)
    rows = delta.view(-1, row_length)
    order = _order(rows, scratch)
    limits = scratch("limits", torch.int32, len(delta)).view(rows.shape)
    limits_by_rank = by_rank.mul(RANGE).round_().clamp_(max=RANGE - 1).to(torch.int32)
    limits.scatter_(1, order, limits_by_rank.expand(rows.shape))
    _keep_below(delta, random_numbers(key, part, scratch), limits.view(-1))
    if rescale:
        factors = scratch("factors", delta.dtype, len(delta)).view(rows.shape)
        factors_by_rank = by_rank.reciprocal_().to(delta.dtype)
        rows.mul_(factors.scatter_(1, order, factors_by_rank.expand(rows.shape)))


def _order(rows: Tensor, scratch: Scratch) -> Tensor:
    """Return the places of each row's entries, from the smallest magnitude to the largest."""
    if rows.dtype == torch.float64:
        return rows.abs().sort(dim=1, stable=True).indices
    # The bits of a magnitude, which are ordered like it, and the place, sorted as one number.
    pairs = scratch("pairs", torch.int64, rows.numel()).view(rows.shape)
    pairs.copy_(rows.view(torch.int32)).bitwise_and_(0x7FFFFFFF).bitwise_left_shift_(32)
    pairs.add_(torch.arange(rows.shape[1], device=rows.device))
    if pairs.device.type == "cpu":
        pairs.numpy().sort(axis=1)  # several times as fast as torch's
    else:
        pairs = pairs.sort(dim=1).values
    return pairs.bitwise_and_(0xFFFFFFFF)
