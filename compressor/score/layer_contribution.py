"""Layer contribution: what the output distribution loses when one block is bypassed."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.score.leave_one_out import Bypass, LeaveOneOut


class LayerContribution(LeaveOneOut):
    """LC_i = KL(p || p_without_i) in nats per token (ShortV, ICCV 2025, for text models).

    direction="skip_full" is KL(p_without_i || p), the order of ShortV's code, which looks at the
    last position of each window only.
    """

    name = "layer_contribution"

    def __init__(
        self,
        decoder: Decoder,
        tokens: Tensor,
        bypass: Bypass,
        *,
        max_windows: int,
        positions: str,
        direction: str,
    ) -> None:
        """Prepare for the first `max_windows` of tokens (N, T)."""
        super().__init__(bypass, tokens, max_windows, positions)
        self._full_skip = direction == "full_skip"

    def compare(self, full: Tensor, skip: Tensor, following: Tensor) -> float:
        """Sum over tokens of the divergence, from log-probabilities (K, V)."""
        p, q = (full, skip) if self._full_skip else (skip, full)
        return divergence(p, q)


def divergence(p: Tensor, q: Tensor) -> float:
    """Sum over tokens of KL(p || q) = sum p (log p - log q), of log-probabilities (K, V); nats."""
    return float(torch.linalg.vecdot(p.exp(), p - q).double().sum())
