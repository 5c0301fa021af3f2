"""Which inputs a compressed model fails on: the added loss window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WORST = 5
_TAIL = 10.0
_CORRELATED = -0.5
_ENOUGH = 12
"""Windows from which on a rank correlation of -0.5 is below zero at 5 % (one-sided)."""


def describe(added: Sequence[float], norms: Sequence[float]) -> dict[str, Any]:
    """How the loss that compression added spreads over windows.

    added: per window, nats per token above the original's loss; norms: per window, the mean
    over tokens of ||h_L||, the original's residual stream after the last block.

    Returns mean, p50, p95 and p99 (linear between order statistics), `worst`, the windows that
    lost most, and `norm_correlation`, Spearman's of norms and added loss, None where either is
    constant or there are fewer than three windows. `flags` says in words what deserves a look:
    a tail (p99 above ten medians), and losses that fall on windows of small residual norm
    (correlation below -0.5 over at least 12 windows): the final norm amplifies errors there, as
    found for low-bit models ("Which inputs break low-bit quantization", EMNLP 2025).
    """
    values = torch.tensor(added, dtype=torch.float64)
    p50, p95, p99 = values.quantile(torch.tensor([0.5, 0.95, 0.99]).double()).tolist()
    correlation = spearman(torch.tensor(norms, dtype=torch.float64), values)
    flags = []
    if p50 > 0 and p99 > _TAIL * p50:
        flags.append(f"a few windows lose most: p99 is {p99 / p50:.1f} times the median")
    if correlation is not None and correlation < _CORRELATED and len(values) >= _ENOUGH:
        flags.append(f"windows of small residual norm lose most: correlation {correlation:.2f}")
    return {
        "mean": float(values.mean()),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "worst": values.argsort(descending=True, stable=True)[:_WORST].tolist(),
        "norm_correlation": correlation,
        "flags": flags,
    }


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of the ranks of x and y (N,), ties averaged; None where undefined."""
    a, b = (rank - rank.mean() for rank in (_ranks(x), _ranks(y)))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 and len(x) > 2 else None


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()
