"""Weights rated by their inputs: DLP and OWL, from one set of input norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.records import Scores
from compressor.score.collector import Collector, Watcher
from compressor.walk import Step


class InputNorms(Watcher):
    """||X_j||_2 of every input channel j of every linear of the resident block.

    Over all tokens, divided by sqrt(N) for N windows, as the running mean over sequences in the
    code of Wanda, OWL and DLP. Linears that read one tensor share one reduction; squares are
    summed in float32 within a batch and in float64 over batches.
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

        def hook(name: str) -> Any:
            def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                if not (seen and seen[0] is x):
                    squares = x.reshape(-1, x.shape[-1]).float().square().sum(0)
                    seen[:] = x, squares.double()
                self._squares[name] = self._squares.get(name, 0) + seen[1]

            return see

        linears = self._blocks.linears(step.index)
        handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ratings(self, index: int) -> Iterator[Tensor]:
        """A = |W| ||X|| of each linear of a resident block, (O, I) float32, one at a time.

        Raises `NotApplicable` for a linear that the block's forward never runs.
        """
        for name, linear in self._blocks.linears(index).items():
            if name not in self._squares:
                raise NotApplicable(f"{name} is never run by its block's forward")
            norm = (self._squares[name] / self._windows).sqrt().float()
            yield weight_of(linear).abs().float() * norm


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
        if self._statistic == "median":
            self._saliency[index] = -median(lambda: self._inputs.ratings(index))
        else:
            self._saliency[index] = -mean(self._inputs.ratings(index))

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
        limit = self._multiple * mean(self._inputs.ratings(index))
        above = count = 0
        for ratings in self._inputs.ratings(index):
            above += int(torch.count_nonzero(ratings > limit))
            count += ratings.numel()
        self._saliency[index] = above / count

    def result(self) -> Scores:
        """One saliency per block."""
        return Scores(num_blocks=len(self._saliency), block={"owl": self._saliency})


def mean(parts: Iterable[Tensor]) -> float:
    """Mean of all elements of all parts; sums in float32 within a part, in float64 over parts."""
    total, count = 0.0, 0
    for part in parts:
        total += float(part.sum())
        count += part.numel()
    return total / count


def median(parts: Callable[[], Iterable[Tensor]]) -> float:
    """The exact lower median of all elements of all parts, which are float32 and not negative.

    Such numbers order as their bit patterns do, so two passes find it without sorting or holding
    more than one part: the first counts upper halves, the second counts the lower halves of those
    that share the median's upper half.
    """
    upper = sum(torch.bincount(_bits(part) >> 16, minlength=1 << 15).cpu() for part in parts())
    assert isinstance(upper, Tensor)
    top, rank = _holding(upper, (int(upper.sum()) - 1) // 2)
    lower = torch.zeros(1 << 16, dtype=torch.long)
    for part in parts():
        bits = _bits(part)
        lower += torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16).cpu()
    bottom, _ = _holding(lower, rank)
    return float(torch.tensor(top << 16 | bottom, dtype=torch.int32).view(torch.float32))


def _bits(part: Tensor) -> Tensor:
    return part.flatten().view(torch.int32)


def _holding(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the element of a rank from 0, and its rank within the bin."""
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends, rank, right=True))
    return index, rank - int(ends[index] - counts[index])
