"""What the residual stream looks like at every depth: length, tails, change."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.walk import Step

_TINY = torch.finfo(torch.float32).tiny


class Residual(Collector):
    """Diagnostics of h_0..h_L, means over tokens, to be read and not selected by.

    residual_norm: |h_l|. residual_kurtosis: mean over channels of ((h - mean) / std)^4, 3 for a
    normal distribution. residual_change: |h_{l+1} - h_l| / |h_l| of each block. Low norms in late
    blocks foretell large errors of low-bit weights (arXiv:2506.12044 section 4).
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Prepare for tokens (N, T)."""
        depths = len(decoder.blocks) + 1
        self._norm, self._kurtosis, self._change = torch.zeros(3, depths, dtype=torch.float64)
        self._count = tokens.numel()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        x_in, x_out = x_in.float(), x_out.float()
        if step.index == 0:
            self._see(0, x_in)
        self._see(step.index + 1, x_out)
        before, change = (torch.linalg.vector_norm(x, dim=-1) for x in (x_in, x_out - x_in))
        self._change[step.index] += (change / before.clamp(min=_TINY)).double().sum()

    def _see(self, depth: int, x: Tensor) -> None:
        squares = (x - x.mean(-1, keepdim=True)).square_()
        kurtosis = squares.square().mean(-1) / squares.mean(-1).square().clamp(min=_TINY)
        self._norm[depth] += torch.linalg.vector_norm(x, dim=-1).double().sum()
        self._kurtosis[depth] += kurtosis.double().sum()

    def result(self) -> Scores:
        """Three rows by depth: two of L+1 numbers and one of L."""
        depth = {
            "residual_norm": self._norm,
            "residual_kurtosis": self._kurtosis,
            "residual_change": self._change[:-1],
        }
        rows = {name: (sums / self._count).tolist() for name, sums in depth.items()}
        return Scores(num_blocks=len(self._change) - 1, depth=rows)
