"""What the residual stream looks like at every depth: length, tails, change."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.ratings import pieces
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.score.stream import TINY, StreamNorms, norm
from compressor.walk import Step


class Residual(Collector):
    """Diagnostics of h_0..h_L, means over tokens, to be read and not selected by.

    residual_norm: |h_l|. residual_kurtosis: mean over channels of ((h - mean) / std)^4, 3 for a
    normal distribution. residual_change: |h_{l+1} - h_l| / |h_l| of each block. Low norms in late
    blocks foretell large errors of low-bit weights (arXiv:2506.12044 section 4).
    """

    shares = (StreamNorms,)

    def __init__(self, decoder: Decoder, tokens: Tensor, stream: StreamNorms) -> None:
        """Prepare for tokens (N, T)."""
        depths = len(decoder.blocks) + 1
        self._stream = stream
        self._norm, self._kurtosis, self._change = torch.zeros(3, depths, dtype=torch.float64)
        self._count = tokens.numel()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        if step.index == 0:
            self._norm[0] += self._stream.before.double().sum()
            self._kurtosis[0] += kurtosis(x_in).double().sum()
        self._norm[step.index + 1] += self._stream.after.double().sum()
        self._kurtosis[step.index + 1] += kurtosis(x_out).double().sum()
        change = norm(x_out - x_in) / self._stream.before.clamp(min=TINY)
        self._change[step.index] += change.double().sum()

    def result(self) -> Scores:
        """Three rows by depth: two of L+1 numbers and one of L."""
        depth = {
            "residual_norm": self._norm,
            "residual_kurtosis": self._kurtosis,
            "residual_change": self._change[:-1],
        }
        rows = {name: (sums / self._count).tolist() for name, sums in depth.items()}
        return Scores(num_blocks=len(self._change) - 1, depth=rows)


def kurtosis(x: Tensor) -> Tensor:
    """Fourth central moment over squared variance of each state's channels, (B, T) float32."""
    return torch.cat([_kurtosis(rows) for rows in pieces(x.flatten(0, 1))]).view(x.shape[:2])


def _kurtosis(x: Tensor) -> Tensor:
    squares = (x.float() - x.mean(-1, keepdim=True, dtype=torch.float32)).square_()
    fourth = torch.linalg.vecdot(squares, squares) / x.shape[-1]
    return fourth / squares.mean(-1).square().clamp(min=TINY)
