"""Second thoughts once every column is quantized: better scales, then better integers."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.quantize.grid import Grid

_BLOCK = 16


def polish(
    weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """One round of descent on tr((W - Q) H (W - Q)^T), which never rises.

    Group by group, all others being fixed: each row's scale moves to the best place for its
    levels v = q - z, then each level in turn to the best for that scale. The slope (Q - W) H is
    formed once per group and follows every move, so that a round costs one product with H.
    weight, levels (O, I); hessian (I, I); scale, zero (O, G). Returns levels and scales.
    """
    count = scale.shape[1]
    steps, low, high = (each.T.contiguous() for each in (scale, *grid.bounds(zero)))
    columns = levels.T.clone(memory_format=torch.contiguous_format).unflatten(0, (count, -1))
    off = (columns * steps.unsqueeze(1)).flatten(0, 1).sub_(weight.T)
    span = columns.shape[1]
    for g, own in enumerate(columns):
        rows = slice(g * span, (g + 1) * span)
        gram, slope = hessian[rows, rows], hessian[rows] @ off
        change = rescale(slope, gram, own, steps[g], grid)
        steps[g] += change
        slope.addmm_(gram, own * change)
        moved = descend(slope.div_(steps[g]), gram, low[g] - own, high[g] - own)
        own += moved
        off[rows] = torch.addcmul(-weight.T[rows], own, steps[g])
    return columns.flatten(0, 1).T, steps.T


def rescale(slope: Tensor, gram: Tensor, levels: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """What to add to the steps (O,) of one group: -v^T p / v^T H v, rounded to what is stored.

    Zero where that would not lower the loss or would turn the grid around.
    slope p, levels v (S, O); gram H (S, S), that of the group's own inputs.
    """
    curve = ((gram @ levels) * levels).sum(0)
    pull = (slope * levels).sum(0)
    new = grid.storable(step - pull / curve.clamp(min=1e-30))
    change = new - step
    better = (change * (2 * pull + change * curve) < 0) & (new * step > 0)
    return torch.where(better, change, 0.0)


def descend(slope: Tensor, gram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whole steps (S, O) that each level of a group goes, one column after the other.

    Column j goes to -p_j / H_jj, rounded and kept within low .. high, and takes the slopes of
    the columns to come along: p_k += H_jk times its move.
    slope p, in steps, low and high (S, O); gram H (S, S).
    """
    diagonal = gram.diagonal().unsqueeze(1)
    best, ratios = slope / -diagonal, gram / diagonal
    moved = torch.empty_like(best)
    for start in range(0, len(best), _BLOCK):
        stop = min(start + _BLOCK, len(best))
        for j in range(start, stop):
            move = torch.round(best[j], out=moved[j]).clamp_(low[j], high[j])
            best[j + 1 : stop].addr_(ratios[j + 1 : stop, j], move, alpha=-1)
        best[stop:].addmm_(ratios[stop:, start:stop], moved[start:stop], alpha=-1)
    return moved
