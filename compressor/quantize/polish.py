"""Second thoughts once every column is quantized: better scales, then better integers."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.quantize.grid import Grid

_PRODUCTS = 2**21  # numbers of the largest intermediate, so that wide layers go in parts
_BLOCK = 128
_HOLD = 1e-4


def refit_scales(
    weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, grid: Grid
) -> Tensor:
    """Scales (O, G) that minimise tr((W - Q) H (W - Q)^T) for given levels v = q - z.

    Q is linear in a row's scales, so each row solves A s = b with A_gk = v_g H_gk v_k^T and
    b_g = v_g H_g: w^T, all groups together; a slight pull towards the old scale covers groups
    whose levels are all zero. Rounded to what is stored; a row keeps its old scales where the
    new ones are not better, or would turn a grid around.
    weight, levels (O, I); hessian (I, I).
    """
    count = scale.shape[1]
    rows = max(1, _PRODUCTS // (count * len(hessian)))
    parts = zip(weight.split(rows), levels.split(rows), scale.split(rows), strict=True)
    return torch.cat([_refit(*part, hessian, grid) for part in parts])


def _refit(weight: Tensor, levels: Tensor, scale: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    count = scale.shape[1]
    groups = levels.unflatten(1, (count, -1)).transpose(0, 1)
    pulled = torch.bmm(groups, hessian.unflatten(0, (count, -1))).transpose(0, 1)  # (O, G, I)
    normal = (pulled.unflatten(2, (count, -1)) * levels.unflatten(1, (1, count, -1))).sum(-1)
    right = torch.bmm(pulled, weight.unsqueeze(-1)).squeeze(-1)
    hold = _HOLD * normal.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-30)
    held = normal + hold.unsqueeze(-1) * torch.eye(count, dtype=scale.dtype, device=scale.device)
    solved = grid.storable(torch.linalg.solve(held, right + hold * scale))

    def loss(s: Tensor) -> Tensor:
        return ((normal @ s.unsqueeze(-1)).squeeze(-1) * s - 2 * right * s).sum(-1)

    better = (loss(solved) < loss(scale)) & (solved * scale > 0).all(-1)
    return torch.where(better.unsqueeze(-1), solved, scale)


def descend(
    weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> Tensor:
    """Levels (O, I) after one sweep of coordinate descent on tr((W - Q) H (W - Q)^T).

    Column by column, each integer moves to the best place given all others: the grid value
    nearest to q_j - [(Q - W) H]_j / H_jj. The objective never rises.
    weight, levels (O, I); hessian (I, I); scale, zero (O, G).
    """
    span = grid.span(weight.shape[1])
    steps, zeros = (each.T.contiguous() for each in (scale, zero))
    columns = levels.T.clone(memory_format=torch.contiguous_format)
    off = columns * steps.repeat_interleave(span, dim=0) - weight.T
    diagonal = hessian.diagonal().tolist()
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, start + _BLOCK)
        slope = hessian[block] @ off
        for j in range(start, min(start + _BLOCK, len(columns))):
            step, old = steps[j // span], columns[j]
            best = torch.addcmul(slope[j - start] / -diagonal[j], old, step)
            new = grid.levels(best, step, zeros[j // span])
            change = (new - old).mul_(step)
            columns[j] = new
            off[j] += change
            slope.addr_(hessian[block, j], change)
    return columns.T
