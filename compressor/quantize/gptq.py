"""GPTQ: quantize column by column and fold each error into the columns to come."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from compressor.errors import QuantizationError
from compressor.quantize.grid import Grid, QuantizedWeight

_BLOCK = 128
_MOST_DAMP = 1.0


class Rounder(Protocol):
    """What GPTQ needs of a grid: the nearest point of a column."""

    def __call__(self, column: Tensor, index: int) -> Tensor:
        """Nearest grid values of a column (O,) of weights at input `index`."""


def gptq(
    weight: Tensor, gram: Tensor, grid: Grid, *, damp: float, act_order: bool
) -> QuantizedWeight:
    """Minimise tr((W - Q) H (W - Q)^T) greedily (GPTQ, arXiv:2210.17323 section 3).

    weight (O, I); gram H = mean of x x^T (I, I). Scales come from the original columns
    before anything moves (static groups), so with `act_order` (columns by falling diagonal
    of H) no column changes its group and no index is stored. Inputs that are always zero
    get zero weights. When H + damp * mean(diag H) I is not positive definite the ridge grows
    tenfold up to 1 and the value used is recorded.
    Raises `QuantizationError` for a gram that is not finite or cannot be factored.
    """
    weight, hessian = weight.float().clone(), gram.float().clone()
    if not torch.isfinite(hessian).all():
        raise QuantizationError("the inputs hold NaN or infinity; calibrate in float32")
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    scale = grid.scales(weight, gram.diagonal().float())
    order = hessian.diagonal().argsort(descending=True, stable=True)
    if not act_order:
        order = torch.arange(len(hessian), device=hessian.device)
    factor, used = inverse_factor(hessian[order][:, order], damp)
    spread = scale.repeat_interleave(grid.group_size, dim=1)[:, order]

    def nearest(column: Tensor, index: int) -> Tensor:
        return grid.quantize(column, spread[:, index]) * spread[:, index]

    rounded = sweep(weight[:, order], factor, nearest)
    integers = torch.empty_like(weight, dtype=torch.int8)
    integers[:, order] = (rounded / spread).round().to(torch.int8)
    return QuantizedWeight(integers, scale, used)


def sweep(weight: Tensor, factor: Tensor, nearest: Rounder) -> Tensor:
    """The loop of GPTQ: returns Q (O, I) for columns in order, `factor` = U of H^-1 = U^T U.

    e = (w_j - q_j) / U_jj, then W_k -= e U_jk for every k > j. Updates within 128 columns are
    done at once, the rest in one product per 128 (section 3.3), all rows together.
    """
    weight = weight.clone()
    quantized = torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:stop])
        for j in range(start, stop):
            quantized[:, j] = nearest(weight[:, j], j)
            error = (weight[:, j] - quantized[:, j]) / factor[j, j]
            weight[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return quantized


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """(U, damp used): upper Cholesky factor of (H + damp mean(diag H) I)^-1."""
    mean = hessian.diagonal().mean()
    while damp <= _MOST_DAMP:
        ridged = hessian.clone()
        ridged.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper, damp
        damp *= 10
    raise QuantizationError(
        f"the gram of its inputs is not positive definite even with a ridge of {_MOST_DAMP}; "
        "calibrate on more windows"
    )
