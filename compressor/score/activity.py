"""L2 activity: for how many tokens a block adds to the length of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.score.stream import StreamNorms
from compressor.walk import Step


class Activity(Collector):
    """Share of tokens for which a block is no void (L2 adaptive computation, arXiv:2505.14467).

    delta_l = |h_{l+1}| - |h_l| of one token; block l is a void for it when
    delta_l < alpha (max - min of delta_0..delta_{l-1}), where the span of fewer than two deltas
    is 0. The paper skips voids token by token; the saliency here is 1 - the share of void tokens.
    """

    shares = (StreamNorms,)

    def __init__(
        self, decoder: Decoder, tokens: Tensor, stream: StreamNorms, *, alpha: float
    ) -> None:
        """Prepare for tokens (N, T)."""
        self._stream, self._alpha = stream, alpha
        self._active = torch.zeros(len(decoder.blocks), dtype=torch.float64)
        self._low = torch.full(tokens.shape, torch.inf)
        self._high = torch.full(tokens.shape, -torch.inf)

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Compare one batch's change of length with the changes before."""
        delta = self._stream.after - self._stream.before
        low, high = self._low[rows], self._high[rows]
        span = (high - low).clamp(min=0)  # before the first delta it is -inf
        self._active[step.index] += (delta >= self._alpha * span).sum()
        self._low[rows], self._high[rows] = low.minimum(delta), high.maximum(delta)

    def result(self) -> Scores:
        """One saliency per block."""
        activity = (self._active / self._low.numel()).tolist()
        return Scores(num_blocks=len(activity), block={"activity": activity})
