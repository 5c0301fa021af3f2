"""Angular distance between residual streams, for every block l and every run of n blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.walk import Step, storage

_CHUNK = 2**19
"""Numbers that are compared at a time; few enough to stay in the cache."""

_TINY = torch.finfo(torch.float64).tiny


class AngularDistance(Collector):
    """d(l, n) = arccos(cos(h_l, h_{l+n})) / pi, averaged over windows (arXiv:2403.17887 eq. 6).

    h_l is the residual stream entering block l, h_L the one before the final norm. With
    positions="last" (the paper) only the last token of each window counts, and N x (L+1) x D
    numbers are kept; with "all", every token does, and N x T x (L+1) x D numbers are kept, in
    a file when they are many. The L(L+1)/2 pairs are the output itself, so this is quadratic
    in L by definition; each pair costs one dot product per kept token, in float64, which leaves
    errors of 1e-8 where arccos is steep.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, *, positions: str) -> None:
        """Prepare for tokens (N, T)."""
        self._first = tokens.shape[1] - 1 if positions == "last" else 0
        self._shape = (len(decoder.blocks) + 1, len(tokens), tokens.shape[1] - self._first)
        self._states: Tensor | None = None

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Keep the residual stream around one block."""
        if self._states is None:
            self._states = storage((*self._shape, x_in.shape[-1]), torch.float32)
        if step.index == 0:
            self._states[0, rows] = x_in[:, self._first :].float()
        self._states[step.index + 1, rows] = x_out[:, self._first :].float()

    def result(self) -> Scores:
        """All distances, in units of pi; the saliency of block l is d(l, 1)."""
        assert self._states is not None
        states = self._states.flatten(1, 2)
        blocks, tokens = len(states) - 1, states.shape[1]
        angles = torch.zeros(blocks + 1, blocks + 1, dtype=torch.float64)
        for chunk in states.split(max(1, _CHUNK // (len(states) * states.shape[2])), dim=1):
            x = chunk.transpose(0, 1).double()
            dots = x @ x.mT
            norms = dots.diagonal(dim1=1, dim2=2).sqrt().clamp_(min=_TINY)
            cosines = dots / norms[:, :, None] / norms[:, None, :]
            angles += cosines.clamp_(-1, 1).arccos_().sum(0)
        distances = angles / (tokens * math.pi)
        rows = [distances.diagonal(n).tolist() for n in range(1, blocks + 1)]
        return Scores(num_blocks=blocks, block={"angular_distance": rows[0]}, distances=rows)
