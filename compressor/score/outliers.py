"""Weights rated by their inputs: DLP and OWL, from one set of input norms."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.inputs import inputs_of
from compressor.ratings import Parts, mean, median, pieces, ratings, share_above
from compressor.records import Scores
from compressor.score.collector import Collector, Watcher
from compressor.walk import Step


class InputNorms(Watcher):
    """||X_j||_2 of every input channel j of every linear of the resident block.

    Over all tokens, divided by sqrt(N) for N windows, as the running mean over sequences in the
    code of Wanda, OWL and DLP. Linears that read one tensor share one reduction; squares are
    summed in float32 over some rows and in float64 over all.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Prepare for tokens (N, T)."""
        self._blocks, self._windows = decoder.blocks, len(tokens)
        self._squares: dict[str, Tensor] = {}
        self._index = -1

    @contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Add the squares of every input of one batch."""
        if step.index != self._index:
            self._squares, self._index = {}, step.index
        seen: list[Tensor] = []  # an input and the sums of its squares

        def see(name: str, x: Tensor) -> None:
            if not (seen and seen[0] is x):
                rows = pieces(x.reshape(-1, x.shape[-1]))
                sums = torch.stack([each.float().square().sum(0) for each in rows])
                seen[:] = x, sums.sum(0, dtype=torch.float64)
            self._squares[name] = self._squares.get(name, 0) + seen[1]

        with inputs_of(self._blocks.linears(step.index), see):
            yield

    def ratings(self, index: int) -> Parts:
        """Passes over A = |W| ||X|| of all linears of a resident block.

        Raises `NotApplicable` for a linear that the block's forward never runs.
        """
        linears = self._blocks.linears(index)
        for name in linears.keys() - self._squares.keys():
            raise NotApplicable(f"{name} is never run by its block's forward")
        norms = {name: (self._squares[name] / self._windows).sqrt().float() for name in linears}
        return functools.partial(ratings, linears, norms)


class Dlp(Collector):
    """DLP: S_l = median (or mean) of |W_ij| ||X_j||_2 over a block's linears (arXiv:2505.23807).

    S_l is unimportance, so the saliency is -S_l. The paper's text takes the median, the authors'
    code the mean. `compressor.sparsity.dlp_sparsities` turns S_l into sparsities.
    """

    shares = (InputNorms,)

    def __init__(
        self, decoder: Decoder, tokens: Tensor, inputs: InputNorms, *, statistic: str
    ) -> None:
        """Prepare for tokens (N, T)."""
        self._inputs, self._statistic = inputs, statistic
        self._saliency = [0.0] * len(decoder.blocks)

    def leave(self, index: int) -> None:
        """Gather one block."""
        parts = self._inputs.ratings(index)
        self._saliency[index] = -(median(parts) if self._statistic == "median" else mean(parts()))

    def result(self) -> Scores:
        """One saliency per block."""
        return Scores(num_blocks=len(self._saliency), block={"dlp": self._saliency})


class Owl(Collector):
    """OWL: share of a block's |W_ij| ||X_j||_2 above `multiple` times their mean.

    D_l in [0, 1] over all linears of the block together; more outliers mean more important
    (arXiv:2310.05175 section 3, where it is a percentage and the multiple is called M).
    `compressor.sparsity.owl_sparsities` turns D_l into sparsities.
    """

    shares = (InputNorms,)

    def __init__(
        self, decoder: Decoder, tokens: Tensor, inputs: InputNorms, *, multiple: float
    ) -> None:
        """Prepare for tokens (N, T)."""
        self._inputs, self._multiple = inputs, multiple
        self._saliency = [0.0] * len(decoder.blocks)

    def leave(self, index: int) -> None:
        """Gather one block."""
        self._saliency[index] = share_above(self._inputs.ratings(index), self._multiple)

    def result(self) -> Scores:
        """One saliency per block."""
        return Scores(num_blocks=len(self._saliency), block={"owl": self._saliency})
