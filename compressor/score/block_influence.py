"""How much a block turns the residual stream: block influence and LIM."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.score.stream import StreamNorms
from compressor.walk import Step


class BlockInfluence(Collector):
    """BI_i = 1 - mean over tokens of cos(x_in, x_out) (ShortGPT, arXiv:2403.03853 section 3.1).

    x_in, x_out: residual stream (B, T, D) around block i; cosines in float32, sums in float64.
    """

    shares = (StreamNorms,)

    def __init__(self, decoder: Decoder, tokens: Tensor, stream: StreamNorms) -> None:
        """Prepare for tokens (N, T)."""
        self._stream = stream
        self._sums = torch.zeros(len(decoder.blocks), dtype=torch.float64)
        self._count = tokens.numel()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        self._sums[step.index] += self._stream.cosine.double().sum()

    def result(self) -> Scores:
        """One saliency per block."""
        influence = (1 - self._sums / self._count).tolist()
        return Scores(num_blocks=len(influence), block={"block_influence": influence})


class LayerInputModification(Collector):
    """LIM_i = -cos(x_in, x_out), in [-1, 1] (arXiv:2406.17415 section 3).

    cosine="token" averages over tokens, which orders blocks exactly as block influence does;
    "window" takes the cosine of each window's states as one vector of T D numbers, so tokens
    with large norms count for more, and averages over windows. x_in, x_out: (B, T, D).
    """

    shares = (StreamNorms,)

    def __init__(
        self, decoder: Decoder, tokens: Tensor, stream: StreamNorms, *, cosine: str
    ) -> None:
        """Prepare for tokens (N, T)."""
        self._stream = stream if cosine == "token" else None
        self._sums = torch.zeros(len(decoder.blocks), dtype=torch.float64)
        self._count = tokens.numel() if self._stream else len(tokens)

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        if self._stream:
            cosine = self._stream.cosine
        else:
            x, y = x_in.float().flatten(1), x_out.float().flatten(1)
            cosine = torch.cosine_similarity(x, y, dim=-1)
        self._sums[step.index] += cosine.double().sum()

    def result(self) -> Scores:
        """One saliency per block."""
        lim = (-self._sums / self._count).tolist()
        return Scores(num_blocks=len(lim), block={"lim": lim})
