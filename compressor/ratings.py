"""Statistics over all weights of a block, rated by their inputs or not, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
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
    """The exact lower median of all elements of all parts, which are not negative.

    A sorted sample of m brackets it with 2 sqrt(m) ranks, four standard deviations, to either
    side: one pass counts what lies at or below the bracket and keeps what lies inside, of which
    the element of the median's rank is taken. When that rank is not inside, which the counts
    tell, everything but zeros is kept.
    """
    sample = np.sort(np.concatenate([_numbers(part)[::_EVERY] for part in parts()]))
    middle, margin = len(sample) // 2, 2 * math.isqrt(len(sample)) + 1
    if margin <= middle < len(sample) - margin:
        found = _within(parts, sample[middle - margin], sample[middle + margin])
        if found is not None:
            return found
    found = _within(parts, 0.0, np.inf)
    assert found is not None
    return found


_EVERY = 127
"""One number in so many is sampled; a prime, so that all columns of a matrix have their turn."""


def _within(parts: Parts, low: float, high: float) -> float | None:
    """The lower median if it lies in (low, high], or if it is zero and so is low."""
    below = count = 0
    inside: list[NDArray[np.float32]] = []
    for part in parts():
        x = _numbers(part)
        below += int(np.count_nonzero(x <= low))
        inside.append(x[(x > low) & (x <= high)])
        count += len(x)
    rank = (count - 1) // 2 - below
    if rank < 0 and low == 0:
        return 0.0
    kept = np.concatenate(inside)
    return float(np.partition(kept, rank)[rank]) if 0 <= rank < len(kept) else None


def _numbers(part: Tensor) -> NDArray[np.float32]:
    return part.flatten().cpu().numpy()
