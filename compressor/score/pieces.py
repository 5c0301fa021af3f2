"""Large matrices a few rows at a time, so that what is made of them is small."""

from __future__ import annotations

import torch
from torch import Tensor

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
