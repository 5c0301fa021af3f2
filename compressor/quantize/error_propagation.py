"""Quantization error propagation: correct a matrix for the error its inputs already carry."""

from __future__ import annotations

from torch import Tensor

from compressor.quantize.ridge import ridged_cholesky


def propagate_error(
    weight: Tensor, cross: Tensor, gram: Tensor, *, alpha: float, damp: float
) -> tuple[Tensor, float]:
    """(W + alpha W C H^-1, damp used) (QEP, arXiv:2504.09629 section 5).

    With inputs X of the original model and X' of the compressed one, C = (X - X') X'^T and
    H = X' X'^T + damp mean(diag H) I, alpha = 1 minimises ||W X - W* X'||^2 plus the ridge
    damp mean(diag H) ||W* - W||^2, and smaller alphas go part of the way.

    weight (O, I); cross, gram (I, I), both as sums or both as means over the same tokens.
    Raises `QuantizationError` when H cannot be factored.
    """
    lower, used = ridged_cholesky(gram, damp)
    pull = (weight.to(cross.dtype) @ cross).T
    return weight + alpha * pull.cholesky_solve(lower).T, used
