"""The grid of integers a weight may take, and the scales and zero points that place it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import QuantizationError
from compressor.layouts import Codes

_SHRINKS = [1 - step / 25 for step in range(18)]
_CACHED = 2**18  # weights searched together, so that wide layers go in parts

Bound = Tensor | int


@dataclass(frozen=True)
class Grid:
    """Integers q in -2^(b-1) .. 2^(b-1) - 1, one scale s per group of inputs: w = (q - z) s.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: inputs that share a scale; None or 0: all of a row (per channel).
        dtype: what scales are stored in; they are rounded to it before anything is
            quantized, so what is measured is what is shipped.
        search: place each group's grid where its error is least.
        symmetric: z = 0 everywhere and nothing is stored for it. A scale may be negative,
            which gives the one level that has no opposite to the side that needs it.
    """

    bits: int
    group_size: int | None
    dtype: torch.dtype = torch.float16
    search: bool = True
    symmetric: bool = True

    @property
    def low(self) -> int:
        """Lowest integer."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """Highest integer."""
        return (1 << self.bits - 1) - 1

    def span(self, width: int) -> int:
        """Inputs in a group of a matrix of `width` inputs.

        Raises `QuantizationError` when the group size does not divide the width.
        """
        span = self.group_size or width
        if width % span:
            fits = [size for size in (256, 128, 64, 32, 16) if width % size == 0]
            raise QuantizationError(
                f"its {width} inputs are not a multiple of group_size {span}; "
                f"use {' or '.join(map(str, fits)) or 0} (0: one scale per row)"
            )
        return span

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales, exact in `dtype`, and zero points, (O, groups) each, of weight (O, I).

        The grid covers the group from lo to hi (zero included): asymmetric s = (hi - lo) /
        (2^b - 1) and z = round(-lo / s) - 2^(b-1) (arXiv:2210.17323's code); symmetric
        s = 2 max |w| / (2^b - 1), which clips the largest weight by half a step and wastes no
        level. With `search`, the best of shrunk grids (1, 0.96, .. 0.32), moved
        by a level or turned around, by the sum of
        importance * (q(w) - w)^2, `importance` (I,) being the mean square of each input:
        the error of the output as far as inputs are uncorrelated.
        """
        groups = weight.unflatten(1, (-1, self.span(weight.shape[1])))
        if importance is None:
            importance = weight.new_ones(weight.shape[1])
        shares = importance / importance.mean().clamp(min=1e-30)
        shares = shares.unflatten(0, (-1, groups.shape[-1]))
        rows = max(1, _CACHED // weight.shape[1])
        parts = [self._best(part, shares) for part in groups.split(rows)]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])

    def levels(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest levels q - z as floats: clamp(round(w / s)); half to even; shapes broadcast."""
        return (weight / scale).round_().clamp_(*self.bounds(zero))

    def bounds(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest level q - z."""
        return self.low - zero, self.high - zero

    def store(
        self, levels: Tensor, scale: Tensor, zero: Tensor, damp: float = 0.0
    ) -> QuantizedWeight:
        """What is kept of levels (O, I) with scales and zero points (O, groups)."""
        integers = levels.unflatten(1, (scale.shape[1], -1)) + zero.unsqueeze(-1)
        kept = None if self.symmetric else zero.to(torch.int8)
        return QuantizedWeight(
            integers.flatten(1).to(torch.int8), scale.to(self.dtype), kept, self, damp
        )

    def _best(self, groups: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The best candidate for each group of (O, groups, span)."""
        lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale, zero = self._place(lo, hi)
        if not self.search:
            return scale, zero
        least, roots = torch.full_like(scale, torch.inf), shares.sqrt()
        for shrink in _SHRINKS:
            placed = self._place(lo * shrink, hi * shrink)
            exact = groups / placed[0].unsqueeze(-1)
            rounded = exact.round()
            for turned, moved, low, high in self._candidates(*placed):
                off = rounded.clamp(low, high).sub_(exact).mul_(roots)  # type: ignore[arg-type]
                error = torch.linalg.vector_norm(off, dim=-1).mul_(turned.abs())
                better = error < least
                least = torch.where(better, error, least)
                scale = torch.where(better, turned, scale)
                zero = torch.where(better, moved, zero)
        return scale, zero

    def _candidates(
        self, scale: Tensor, zero: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Bound, Bound]]:
        """Scales and zero points that share w / |s|, with the least and most it may round to."""
        if self.symmetric:
            yield scale, zero, self.low, self.high
            yield -scale, zero, -self.high, -self.low
            return
        for moved in (zero, (zero + 1).clamp(max=self.high), (zero - 1).clamp(min=self.low)):
            low, high = self.bounds(moved.unsqueeze(-1))
            yield scale, moved, low, high

    def _place(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The grid that covers lo .. hi."""
        if self.symmetric:
            scale = self.storable(torch.maximum(-lo, hi) * 2 / (2**self.bits - 1))
            return scale, torch.zeros_like(scale)
        scale = self.storable((hi - lo) / (2**self.bits - 1))
        return scale, (self.low - (lo / scale).round()).clamp(self.low, self.high)

    def storable(self, scale: Tensor) -> Tensor:
        """Scales as they will be read back, never zero; 1 where a group is all zero."""
        stored = torch.where(scale != 0, scale, 1.0).to(self.dtype).to(scale.dtype)
        return torch.where(stored != 0, stored, torch.finfo(self.dtype).tiny)


@dataclass(frozen=True)
class QuantizedWeight(Codes):
    """A matrix in integers and how it came about.

    Attributes:
        grid: where the integers and the dtype of the scale come from.
        damp: ridge that was used, as a share of the mean diagonal; 0 without one.
    """

    grid: Grid
    damp: float = 0.0

    def split(self, rows: list[int]) -> Iterator[QuantizedWeight]:
        """Yield the matrices that were stacked, `rows` outputs each."""
        integers, scale = self.integers.split(rows), self.scale.split(rows)
        zeros = [None] * len(rows) if self.zero_point is None else self.zero_point.split(rows)
        for part in zip(integers, scale, zeros, strict=True):
            yield QuantizedWeight(*part, self.grid, self.damp)
