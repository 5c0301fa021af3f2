"""Cholesky factors of grams that may not be positive definite."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import QuantizationError

MOST_DAMP = 1.0
_LEAST_DAMP = 1e-6
_LEAF = 64


def ridged_cholesky(gram: Tensor, damp: float) -> tuple[Tensor, float]:
    """(L, damp used): lower triangular L with L L^T = H + damp mean(diag H) I.

    gram H (I, I). Where that is not positive definite, the ridge grows tenfold (from 1e-6 when
    it was 0) up to the larger of 1 and `damp`. Raises `QuantizationError` when nothing helps.
    """
    mean = gram.diagonal().mean()
    most = max(MOST_DAMP, damp)
    while damp <= most:
        ridged = gram.clone()
        ridged.diagonal().add_(damp * mean)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(ridged, out=(ridged, failed))
        if not failed:
            return ridged, damp
        damp = max(10 * damp, _LEAST_DAMP)
    raise QuantizationError(
        f"the gram of its inputs is not positive definite even with a ridge of {most}; "
        "calibrate on more windows"
    )


def inverse_lower(lower: Tensor) -> Tensor:
    """L^-1 (I, I) of a lower triangular L: [[A, 0], [B, C]] gives [[A', 0], [-C' B A', C']].

    A solve against the identity would take three times as long, most of it on zeros.
    """
    half = len(lower) // 2
    if half < _LEAF:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = inverse_lower(lower[:half, :half])
    inverse[half:, half:] = inverse_lower(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
