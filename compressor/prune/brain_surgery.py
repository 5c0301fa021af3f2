"""Optimal brain surgery: which columns of a matrix go, and how the others make up for them."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import CompressError

_SHARE = 16


def remove_units(
    weight: Tensor, gram: Tensor, size: int, count: int, damp: float
) -> tuple[Tensor, Tensor]:
    """(units that stay, ascending; their columns of the compensated weight), in float64.

    weight (O, I) in units of `size` consecutive columns; gram H = mean of x x^T (I, I), plus a
    ridge of damp mean(diag H). Greedy: the units of least score go, the others make up for them,
    and all are scored anew. A sixteenth of what is still to go leaves at a time: channels in
    shrinking batches, the last 31, like heads, one by one. Ends at the least-squares optimum for
    the units that stay: W H_:R H_RR^-1.
    Raises `CompressError` for a gram that is not positive definite.
    """
    hessian = gram.to(torch.float64, copy=True)
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise CompressError("the gram of its inputs is singular; use more text, or raise damp")
    inverse, weight = torch.cholesky_inverse(factor), weight.double()
    units = torch.arange(weight.shape[1] // size, device=weight.device)
    while count:
        batch = max(1, count // _SHARE)
        going = unit_scores(weight, inverse, size).topk(batch, largest=False).indices
        gone = torch.zeros_like(units, dtype=torch.bool)
        gone[going] = True
        weight, inverse = eliminate(weight, inverse, gone.repeat_interleave(size))
        units, count = units[~gone], count - batch
    return units, weight


def unit_scores(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Least increase of tr(dW H dW^T) that removing each unit takes, (units,).

    tr(W_G ([H^-1]_GG)^-1 W_G^T) = ||W_G L^-T||^2 with [H^-1]_GG = L L^T, all units factored in
    one batch: the sum over the unit's columns p, one after the other, of
    sum_r W_rp^2 / [H^-1]_pp (arXiv:2412.18110 section 3).
    """
    units = weight.shape[1] // size
    tiles = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.T.reshape(units, size, -1)
    lower = torch.linalg.cholesky(tiles)
    return torch.linalg.solve_triangular(lower, columns, upper=False).square().sum((1, 2))


def eliminate(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that stay, made up for those that go, and the inverse of what is left of H.

    W_R - W_G ([H^-1]_GG)^-1 [H^-1]_GR, and the same with H^-1 for W.
    """
    across = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, ~gone])
    left = inverse[~gone]
    return weight[:, ~gone] - weight[:, gone] @ across, left[:, ~gone] - left[:, gone] @ across
