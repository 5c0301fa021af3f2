"""Second thoughts once every column is quantized: better scales, then better integers."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.quantize.grid import Bound, Grid

_BLOCK = 16


def polish(
    weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """One round of descent on tr((W - Q) H (W - Q)^T), which never rises.

    Group by group, all others being fixed: each row's scale moves to the best place for its
    levels v = q - z, then each level in turn to the best for that scale. The slope (Q - W) H is
    formed once per group and follows every move, so that a round costs one product with H.
    weight, levels (O, I), quickest when their columns are contiguous; hessian (I, I); scale,
    zero (O, G). Returns levels and scales.
    """
    count = scale.shape[1]
    steps, low, high = (each.T.contiguous() for each in (scale, *grid.bounds(zero)))
    columns = levels.T.clone(memory_format=torch.contiguous_format).unflatten(0, (count, -1))
    target = weight.T.contiguous().unflatten(0, (count, -1))
    off = (columns * steps.unsqueeze(1)).sub_(target)
    span = columns.shape[1]
    for g, own in enumerate(columns):
        rows = slice(g * span, (g + 1) * span)
        gram, slope = hessian[rows, rows], hessian[rows] @ off.flatten(0, 1)
        curve = gram @ own
        change = rescale(slope, curve, own, steps[g], grid)
        steps[g] += change
        slope.addcmul_(curve, change).div_(steps[g])
        bounds = (grid.low, grid.high) if grid.symmetric else (low[g], high[g])
        own.copy_(descend(slope, gram, own, *bounds))
        torch.mul(own, steps[g], out=off[g]).sub_(target[g])
    return columns.flatten(0, 1).T, steps.T


def rescale(slope: Tensor, curve: Tensor, levels: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """What to add to the steps (O,) of one group: -v^T p / v^T H v, rounded to what is stored.

    Zero where that would not lower the loss or would turn the grid around.
    slope p, curve H v for the gram H of the group's own inputs, levels v, each (S, O).
    """
    bend, pull = ((each * levels).sum(0) for each in (curve, slope))
    new = grid.storable(step - pull / bend.clamp(min=1e-30))
    change = new - step
    better = (change * (2 * pull + change * bend) < 0) & (new * step > 0)
    return torch.where(better, change, 0.0)


def descend(slope: Tensor, gram: Tensor, levels: Tensor, low: Bound, high: Bound) -> Tensor:
    """Levels (S, O) of a group after each went to its best place, one column after the other.

    Column j goes to v_j - p_j / H_jj, rounded and kept within low .. high, and takes the slopes
    of the columns to come along: p_k += H_jk times its move. Written for the new levels u alone,
    column j goes to (sum_{k <= j} H_jk v_k - p_j - sum_{k < j} H_jk u_k) / H_jj.
    slope p, in steps, levels v (S, O); gram H (S, S); low and high (O,) or numbers.
    """
    ratios = gram / gram.diagonal().unsqueeze(1)
    best = torch.addmm(slope / -gram.diagonal().unsqueeze(1), ratios.tril(), levels)
    new = torch.empty_like(best)
    here, found, across = best.unbind(), new.unbind(), ratios.T.contiguous()
    for start in range(0, len(best), _BLOCK):
        stop = min(start + _BLOCK, len(best))
        for j in range(start, stop):
            torch.round(here[j], out=found[j]).clamp_(low, high)  # type: ignore[arg-type]
            best[j + 1 : stop].addr_(across[j, j + 1 : stop], found[j], alpha=-1)
        best[stop:].addmm_(ratios[stop:, start:stop], new[start:stop], alpha=-1)
    return new
