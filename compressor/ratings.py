"""Statistics over all weights of a block, rated by their inputs or not, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from compressor.blocks import weight_of

Parts = Callable[[], Iterable[Tensor]]
"""Starts a pass over float32 tensors; each is needed only until the next one comes."""

_CACHED = 2**18
"""Numbers in a piece on the CPU: fresh memory for more costs more than the arithmetic on it."""

_LAUNCHED = 2**24
"""Numbers in a piece elsewhere, where every piece is a launch; so many ones add up exactly."""


def pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    """Consecutive rows of a matrix (rows, columns), all of them in order."""
    size = _CACHED if matrix.device.type == "cpu" else _LAUNCHED
    return matrix.split(max(1, size // matrix.shape[1]))


def count_above(piece: Tensor, limit: float) -> int:
    """How many numbers of a float32 piece exceed `limit`.

    Zeros and ones are made as floats: the CPU compares and adds these several times as fast as
    it makes and counts booleans.
    """
    return int(torch.gt(piece, limit, out=torch.empty_like(piece)).sum())


def ratings(linears: Mapping[str, nn.Module], norms: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """A = |W_ij| ||X_j||_2 of each linear, in float32, some rows at a time; norms (I,)."""
    for name, linear in linears.items():
        for rows in pieces(weight_of(linear)):
            yield rows.abs().float().mul_(norms[name])


def share_above(parts: Parts, multiple: float) -> float:
    """Share of all elements of all parts above `multiple` times their mean: OWL's D_l in [0, 1]."""
    limit = multiple * mean(parts())
    above = count = 0
    for part in parts():
        above += count_above(part, limit)
        count += part.numel()
    return above / count


def mean(parts: Iterable[Tensor]) -> float:
    """Mean of all elements of all parts; sums in float32 within a part, in float64 over parts."""
    total, count = 0.0, 0
    for part in parts:
        total += float(part.sum())
        count += part.numel()
    return total / count


def median(parts: Parts) -> float:
    """The exact lower median of all elements of all parts, which are float32 and not negative.

    Such numbers order as their bit patterns do: one pass counts the patterns by their upper half,
    the second those with the median's upper half by their lower one. Nothing is sorted and no
    more than a part is held.
    """
    ends = _ends(parts, lambda bits: bits.bitwise_right_shift(_LOWER), 1 << (31 - _LOWER))
    rank = (int(ends[-1]) - 1) // 2
    least = int(torch.searchsorted(ends, rank, right=True)) << _LOWER
    beyond = 1 << _LOWER  # smaller patterns count as the least of that half, larger as this
    ends = _ends(parts, lambda bits: bits.sub(least).clamp_(0, beyond), beyond + 1)
    bits = least + torch.searchsorted(ends, rank, right=True)
    return float(bits.int().view(torch.float32))


_LOWER = 16


def _ends(parts: Parts, bin_of: Callable[[Tensor], Tensor], bins: int) -> Tensor:
    """How many elements lie in each bin of bit patterns or one before it, (bins,) int64."""
    counts = torch.zeros(bins, dtype=torch.long)
    for part in parts():
        bits = part.flatten().view(torch.int32)
        counts += torch.bincount(bin_of(bits), minlength=bins).cpu()
    return counts.cumsum(0)
