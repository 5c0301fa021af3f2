"""The grid of integers a weight may take, and the scales that place it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SHRINKS = [1 - step / 50 for step in range(35)]
_CACHED = 2**18  # weights searched together: few enough to stay in a core's cache


@dataclass(frozen=True)
class Grid:
    """Symmetric integers -2^(b-1) .. 2^(b-1) - 1, one scale per group of inputs.

    Attributes:
        dtype: what scales are stored in; they are rounded to it before anything is
            quantized, so what is measured is what is shipped.
        search: shrink each scale to the least error of its group.
    """

    bits: int
    group_size: int
    dtype: torch.dtype = torch.float16
    search: bool = True

    @property
    def low(self) -> int:
        """Lowest integer."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """Highest integer."""
        return (1 << self.bits - 1) - 1

    def scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """One scale per row and group: (O, I / group_size) float32, exact in `dtype`.

        s = 2 max |w| / (2^b - 1), which clips the largest positive weight by half a step and
        wastes no level. With `search`, the best of 35 shrunk scales (1, 0.98, .. 0.32) by
        sum of importance * (q(w) - w)^2, `importance` being the mean square of each input
        (I,): the error of the output as far as inputs are uncorrelated.
        """
        groups = weight.float().unflatten(1, (-1, self.group_size))
        full = groups.abs().amax(-1) * 2 / (2**self.bits - 1)
        full = torch.where(full > 0, full, 1.0)
        if not self.search:
            return self._storable(full)
        if importance is None:
            importance = torch.ones(weight.shape[1], device=weight.device)
        shares = importance / importance.mean().clamp(min=1e-30)
        shares = shares.unflatten(0, (-1, self.group_size))
        rows = max(1, _CACHED // weight.shape[1])
        parts = zip(groups.split(rows), full.split(rows), strict=True)
        return torch.cat([self._search(*part, shares) for part in parts])

    def quantize(self, columns: Tensor, scale: Tensor) -> Tensor:
        """Nearest integers, as floats: clamp(round(w / s)); half to even."""
        return (columns / scale).round_().clamp_(self.low, self.high)

    def _search(self, groups: Tensor, full: Tensor, shares: Tensor) -> Tensor:
        best = torch.full_like(full, torch.inf)
        chosen = full
        for shrink in _SHRINKS:
            scale = self._storable(full * shrink)
            step = scale.unsqueeze(-1)
            off = self.quantize(groups, step).mul_(step).sub_(groups)
            error = off.square_().mul_(shares).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, scale, chosen)
        return chosen

    def _storable(self, scale: Tensor) -> Tensor:
        stored = scale.to(self.dtype).float()
        return torch.where(stored > 0, stored, torch.finfo(self.dtype).tiny)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix in integers.

    Attributes:
        integers: (O, I) int8 within the grid.
        scale: (O, I / group_size) in the grid's dtype.
        damp: ridge that was used, as a share of the mean diagonal; 0 without one.
    """

    integers: Tensor
    scale: Tensor
    damp: float = 0.0

    def dequantize(self) -> Tensor:
        """w = q s, (O, I) float32, which holds the product of 8 bits and a half exactly."""
        groups = self.integers.float().unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale.float().unsqueeze(-1)).flatten(1)

    def split(self, rows: list[int]) -> Iterator[QuantizedWeight]:
        """Yield the matrices that were stacked, `rows` outputs each."""
        for integers, scale in zip(self.integers.split(rows), self.scale.split(rows), strict=True):
            yield QuantizedWeight(integers, scale, self.damp)
