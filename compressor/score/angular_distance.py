"""Angular distance between residual streams, for every block l and every run of n blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.walk import Step, storage


class AngularDistance:
    """d(l, n) = arccos(cos(h_l, h_{l+n})) / pi, averaged over windows (arXiv:2403.17887 eq. 6).

    h_l is the residual stream entering block l, h_L the one before the final norm. With
    positions="last" (the paper) only the last token of each window counts, and N x (L+1) x D
    numbers are kept; with "all", every token does, and N x T x (L+1) x D numbers are kept, in
    a file when they are many. The L(L+1)/2 pairs are the output itself, so this is quadratic
    in L by definition; each pair costs one dot product per kept token.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, *, positions: str) -> None:
        """Prepare for tokens (N, T)."""
        self._first = tokens.shape[1] - 1 if positions == "last" else 0
        self._shape = (len(decoder.blocks) + 1, len(tokens), tokens.shape[1] - self._first)
        self._units: Tensor | None = None

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Keep the directions of the residual stream around one block."""
        if self._units is None:
            self._units = storage((*self._shape, x_in.shape[-1]), torch.float32)
        if step.index == 0:
            self._units[0, rows] = self._direction(x_in)
        self._units[step.index + 1, rows] = self._direction(x_out)

    def _direction(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x[:, self._first :].double(), dim=-1).float()

    def result(self) -> Scores:
        """All distances, in units of pi; the saliency of block l is d(l, 1)."""
        units = self._units
        assert units is not None
        blocks = len(units) - 1
        rows = [[0.0] * (blocks - n + 1) for n in range(1, blocks + 1)]
        for window in range(units.shape[1]):
            for first, distances in self._pairs(units[:, window]):
                for n, distance in enumerate(distances.tolist(), start=1):
                    rows[n - 1][first] += distance / units.shape[1]
        return Scores(num_blocks=blocks, block={"angular_distance": rows[0]}, distances=rows)

    @staticmethod
    def _pairs(units: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (l, d(l, 1..L-l)) of one window from unit vectors (L+1, T, D).

        arccos(u.v) = 2 atan2(|u - v|, |u + v|), which keeps its digits near 0 and pi.
        """
        units = units.double()
        for first in range(len(units) - 1):
            u, v = units[first], units[first + 1 :]
            angle = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
            yield first, angle.mean(-1) / math.pi
