"""From a statistic of every block to the sparsity each block gets: pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.errors import ConfigError


def dlp_sparsities(statistic: Sequence[float], p: float, alpha: float) -> list[float]:
    """Layer-wise sparsities of DLP: a large statistic S_l means more is removed.

    I_l = 1 - S_l / sum S, d_l = 2 alpha (I_l - min I) / (max I - min I),
    R_l = p + mean d - d_l (arXiv:2505.23807, as in the authors' code). The mean of R is p, its
    span 2 alpha; equal statistics give p everywhere. The sum cancels, so S need not be positive.
    Raises `ConfigError` when a sparsity would leave [0, 1).
    """
    return _around(p, alpha, [-s for s in statistic])


def owl_sparsities(outlier_ratio: Sequence[float], p: float, alpha: float) -> list[float]:
    """Layer-wise sparsities of OWL: a block with more outliers D_l keeps more of its weights.

    d_l = 2 alpha (D_l - min D) / (max D - min D), R_l = p + mean d - d_l (arXiv:2310.05175
    section 3, as in the authors' code, where alpha is called lambda). The mean of R is p.
    Raises `ConfigError` when a sparsity would leave [0, 1).
    """
    return _around(p, alpha, outlier_ratio)


def _around(p: float, alpha: float, importance: Sequence[float]) -> list[float]:
    """Sparsities of mean p and span 2 alpha that fall with importance."""
    low, high = min(importance), max(importance)
    if low == high:
        return [p] * len(importance)
    rank = [(i - low) / (high - low) for i in importance]
    offset = [2 * (sum(rank) / len(rank) - r) for r in rank]
    room = min((p if o < 0 else 1 - p) / abs(o) for o in offset if o)
    sparsities = [p + alpha * o for o in offset]
    if not all(0 <= s < 1 for s in sparsities):
        raise ConfigError(
            f"alpha {alpha} around a sparsity of {p} asks blocks for {min(sparsities):.3f} to "
            f"{max(sparsities):.3f}, but sparsities lie in [0, 1); use an alpha below {room:.3f}"
        )
    return sparsities
