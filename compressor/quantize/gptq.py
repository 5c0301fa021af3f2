"""GPTQ: quantize column by column and fold each error into the columns to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.errors import QuantizationError
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.polish import polish as polished
from compressor.quantize.ridge import inverse_lower, ridged_cholesky

_BLOCK = 32

Nearest = Callable[[Tensor, int], Tensor]
"""Nearest grid values (O,) of a column, given all columns (I, O) as compensated so far."""


def gptq(
    weight: Tensor, gram: Tensor, grid: Grid, *, damp: float, act_order: bool, polish: int
) -> QuantizedWeight:
    """Minimise tr((W - Q) H (W - Q)^T) greedily (GPTQ, arXiv:2210.17323 section 3).

    weight (O, I); gram H = mean of x x^T (I, I), whose dtype (float32 or 64) is computed in.
    With `act_order`, columns go by falling diagonal of H and every scale comes from the
    original weights (static groups), so no column changes its group and no index is stored.
    Without, a group's scales come from its
    weights as compensated when the sweep gets there. Inputs that are always zero have no say:
    their columns are rounded to nearest (the original zeroes them, which trusts the
    calibration text more than it deserves). When H + damp mean(diag H) I is not positive
    definite the ridge grows tenfold up to 1 and the value used is recorded.
    Scales are searched with a column's weight 1 / [H^-1]_jj, what an error there costs after the
    other columns made up for it. Then `polish` rounds of coordinate descent on scales and levels.
    Raises `QuantizationError` for a gram that is not finite, is zero or cannot be factored.
    """
    weight, hessian = weight.to(gram.dtype), gram.clone()
    columns = weight.T.contiguous()
    energy = gram.diagonal()
    if not torch.isfinite(energy).all():
        raise QuantizationError("its inputs hold NaN or infinity; calibrate in float32")
    dead = energy == 0
    if dead.all():
        raise QuantizationError("its inputs are zero on all of the calibration text; use more text")
    hessian.diagonal()[dead] = energy[~dead].mean()
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = energy.argsort(descending=True, stable=True)
    factor, used = inverse_factor(hessian.index_select(0, order).index_select(1, order), damp)
    group = grid.span(weight.shape[1])
    importance = torch.zeros_like(energy)
    importance[order] = 1 / factor.square().sum(0)
    importance[dead] = 0
    scale, zero = grid.fit(weight, importance)
    steps, low, high = (each.T.contiguous() for each in (scale, *grid.bounds(zero)))
    levels = torch.empty_like(columns)
    home, rows = order.tolist(), levels.unbind()

    def nearest(columns: Tensor, index: int) -> Tensor:
        g = home[index] // group
        if not act_order and index % group == 0:
            chunk = slice(index, index + group)
            found = grid.fit(columns[chunk].T, importance[chunk])
            scale[:, g], zero[:, g] = found[0][:, 0], found[1][:, 0]
            steps[g] = scale[:, g]
            low[g], high[g] = grid.bounds(zero[:, g])
        level = torch.div(columns[index], steps[g], out=rows[home[index]]).round_()
        bounds = (grid.low, grid.high) if grid.symmetric else (low[g], high[g])
        return level.clamp_(*bounds) * steps[g]

    aligned = act_order or group % _BLOCK == 0  # a group must start on updated columns
    block = _BLOCK if aligned else max(group, _BLOCK // group * group)
    sweep(columns[order].T, factor, nearest, block)
    weight, levels = columns.T, levels.T
    hessian.diagonal().add_(used * hessian.diagonal().mean())
    for _ in range(polish):
        levels, scale = polished(weight, hessian, levels, scale, zero, grid)
    return grid.store(levels, scale, zero, used)


def sweep(weight: Tensor, factor: Tensor, nearest: Nearest, block: int = _BLOCK) -> Tensor:
    """The loop of GPTQ: returns Q (O, I) for columns in order, `factor` = U of H^-1 = U^T U.

    e = (w_j - q_j) / U_jj, then w_k -= e U_jk for every k > j. Updates within `block` columns
    are done at once, the rest in one product per block (section 3.3), all rows together.
    At the end W - Q = E U, so sum e^2 = tr((W - Q) H (W - Q)^T).
    """
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    ratios = factor / factor.diagonal().unsqueeze(1)
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            rounded = nearest(columns, j)
            error = torch.sub(columns[j], rounded, out=errors[j - start])
            columns[j] = rounded
            columns[j + 1 : stop].addr_(ratios[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(ratios[start:stop, stop:].T, errors, alpha=-1)
    return columns.T


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """(U, damp used): upper triangular U with U^T U = (H + damp mean(diag H) I)^-1.

    With H = R R^T, R upper triangular (the Cholesky factor of H read backwards), U = R^-1:
    one factorisation, and the inverse itself is never formed.
    """
    backwards = hessian.flip(0, 1)
    del hessian  # nothing of this size that is done with is kept, here and below
    lower, used = ridged_cholesky(backwards, damp)
    del backwards
    return inverse_lower(lower).flip(0, 1), used
