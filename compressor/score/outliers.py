"""Weights rated by their inputs: DLP and OWL, from one set of input norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.inputs import inputs_of
from compressor.records import Scores
from compressor.score.collector import Collector, Watcher
from compressor.score.pieces import count_above, pieces
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

    def ratings(self, index: int) -> Iterator[Tensor]:
        """A = |W| ||X|| of each linear of a resident block, in float32, some rows at a time.

        Raises `NotApplicable` for a linear that the block's forward never runs.
        """
        for name, linear in self._blocks.linears(index).items():
            if name not in self._squares:
                raise NotApplicable(f"{name} is never run by its block's forward")
            norm = (self._squares[name] / self._windows).sqrt().float()
            for rows in pieces(weight_of(linear)):
                yield rows.abs().float().mul_(norm)


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
            above += count_above(ratings, limit)
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

    Such numbers order as their bit patterns do: one pass counts the patterns by their upper half,
    the second those with the median's upper half by their lower one. Nothing is sorted and no
    more than a part is held.
    """
    ends = _ends(parts, lambda bits: bits.bitwise_right_shift(_LOWER), 1 << (31 - _LOWER))
    rank = (int(ends[-1]) - 1) // 2
    before = (int(torch.searchsorted(ends, rank, right=True)) << _LOWER) - 1
    width = (1 << _LOWER) + 2  # the patterns of that upper half, all below and all above
    ends = _ends(parts, lambda bits: bits.sub(before).clamp_(0, width - 1), width)
    bits = before + torch.searchsorted(ends, rank, right=True)
    return float(bits.int().view(torch.float32))


_LOWER = 16


def _ends(
    parts: Callable[[], Iterable[Tensor]], bin_of: Callable[[Tensor], Tensor], bins: int
) -> Tensor:
    """How many elements lie in each bin of their bit patterns or one before, (bins,) int64."""
    counts = torch.zeros(bins, dtype=torch.long)
    for part in parts():
        bits = part.flatten().view(torch.int32)
        counts += torch.bincount(bin_of(bits), minlength=bins).cpu()
    return counts.cumsum(0)
