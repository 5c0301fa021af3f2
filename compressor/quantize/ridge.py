"""Cholesky factors of grams that may not be positive definite."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import QuantizationError

MOST_DAMP = 1.0
_LEAST_DAMP = 1e-6


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
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if not failed:
            return lower, damp
        damp = max(10 * damp, _LEAST_DAMP)
    raise QuantizationError(
        f"the gram of its inputs is not positive definite even with a ridge of {most}; "
        "calibrate on more windows"
    )
