"""Lengths and angles of the residual stream, taken once for every score that reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.score.collector import Watcher
from compressor.walk import Step

TINY = torch.finfo(torch.float32).tiny
"""Denominators are at least this, so that a state of zeros has cosine 0 with everything."""


class StreamNorms(Watcher):
    """Norms and cosine of the residual stream around a block, per token, in float32.

    Attributes:
        before, after: |x_in| and |x_out|, (B, T), of the batch that just passed.
        cosine: cos(x_in, x_out), (B, T).
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Prepare for tokens (N, T)."""
        self._norms = torch.empty(tokens.shape)

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """One block's output is the next one's input, so each norm is taken once."""
        self.before = norm(x_in) if step.index == 0 else self._norms[rows].clone()
        self.after = self._norms[rows] = norm(x_out)
        self.cosine = cosine(x_in, x_out, self.before, self.after)


def norm(x: Tensor) -> Tensor:
    """Euclidean norms (B, T) in float32 of states (B, T, D)."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def cosine(x: Tensor, y: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """Cosines (B, T) in float32 of states (B, T, D) whose norms are known."""
    return torch.linalg.vecdot(x.float(), y.float()) / (x_norm * y_norm).clamp(min=TINY)
