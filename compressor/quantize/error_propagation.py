"""Quantization error propagation: correct a matrix for the error its inputs already carry."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.quantize.ridge import ridged_cholesky


def propagate_error(
    weight: Tensor, lack: Tensor, gram: Tensor, *, alpha: float, damp: float
) -> tuple[Tensor, float]:
    """(W + alpha L H^-1, damp used) (QEP, arXiv:2504.09629 section 5, where L = W C).

    With inputs X of the original model and X' of the compressed one, L = W (X - X') X'^T and
    H = X' X'^T + damp mean(diag H) I, alpha = 1 minimises ||W X - W* X'||^2 plus the ridge
    damp mean(diag H) ||W* - W||^2, and smaller alphas go part of the way. Where the output is
    added to a residual stream, h in the original model and h' in the compressed one,
    L = (h + W X - h' - W X') X'^T makes it ||(h + W X) - (h' + W* X')||^2: the matrix then also
    makes up for what the stream has lost so far.

    weight, lack (O, I); gram (I, I), all as sums or all as means over the same tokens.
    Raises `QuantizationError` when H cannot be factored.
    """
    lower, used = ridged_cholesky(gram, damp)
    half = torch.linalg.solve_triangular(lower.T, lack, upper=True, left=False)
    step = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return weight + alpha * step, used


def propagate_difference(
    weight: Tensor, cross: Tensor, gram: Tensor, *, alpha: float, damp: float
) -> tuple[Tensor, float]:
    """As `propagate_error` for L = W C, cross C = mean (X - X') X'^T (I, I).

    Of W C H^-1 the cheaper product is formed first: C H^-1 where W has more outputs than inputs.
    """
    if len(weight) < len(cross):
        return propagate_error(weight, weight @ cross, gram, alpha=alpha, damp=damp)
    step, used = propagate_error(torch.zeros_like(cross), cross, gram, alpha=alpha, damp=damp)
    return torch.addmm(weight, weight, step), used
