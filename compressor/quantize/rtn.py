"""Round to nearest."""

from __future__ import annotations

from torch import Tensor

from compressor.quantize.grid import Grid, QuantizedWeight


def rtn(weight: Tensor, gram: Tensor | None, grid: Grid) -> QuantizedWeight:
    """q = clamp(round(w / s) + z) group by group; the gram weighs the search for scales only.

    weight (O, I); gram (I, I) or None without calibration text.
    """
    weight = weight.float()
    scale, zero = grid.fit(weight, None if gram is None else gram.diagonal())
    groups = weight.unflatten(1, (scale.shape[1], -1))
    levels = grid.levels(groups, scale.unsqueeze(-1), zero.unsqueeze(-1))
    return grid.store(levels.flatten(1), scale, zero)
