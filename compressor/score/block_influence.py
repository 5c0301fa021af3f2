"""Block influence: how much a block turns the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.walk import Step


class BlockInfluence:
    """BI_i = 1 - mean over tokens of cos(x_in, x_out) (ShortGPT, arXiv:2403.03853 section 3.1).

    x_in, x_out: residual stream (B, T, D) around block i; cosines in float32, sums in float64.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Prepare for tokens (N, T)."""
        self._sums = torch.zeros(len(decoder.blocks), dtype=torch.float64)
        self._count = tokens.numel()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        cosine = torch.cosine_similarity(x_in.float(), x_out.float(), dim=-1)
        self._sums[step.index] += cosine.double().sum()

    def result(self) -> Scores:
        """One saliency per block."""
        influence = (1 - self._sums / self._count).tolist()
        return Scores(num_blocks=len(influence), block={"block_influence": influence})
