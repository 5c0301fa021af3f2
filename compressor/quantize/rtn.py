"""Round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.quantize.grid import Grid, QuantizedWeight


def rtn(weight: Tensor, gram: Tensor | None, grid: Grid) -> QuantizedWeight:
    """q = clamp(round(w / s)) group by group; the gram is not looked at."""
    scale = grid.scales(weight)
    spread = scale.repeat_interleave(grid.group_size, dim=1)
    integers = grid.quantize(weight.float(), spread).to(torch.int8)
    return QuantizedWeight(integers, scale.to(grid.dtype))
