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
from compressor.score.pieces import pieces
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
            above += int((ratings > limit).sum())
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

    Such numbers order as their bit patterns do. The first pass counts the elements by their upper
    bits (exponent and five bits of mantissa, a bin of 3 %), the second keeps the few that share
    the median's; nothing is sorted and no more than a part is held.
    """
    size = 1 << (31 - _LOWER_BITS)
    counts = torch.zeros(size, dtype=torch.long)
    for part in parts():
        counts += torch.bincount(_bits(part) >> _LOWER_BITS, minlength=size).cpu()
    ends = counts.cumsum(0)
    rank = (int(ends[-1]) - 1) // 2
    upper = int(torch.searchsorted(ends, rank, right=True))
    near = torch.cat([b[b >> _LOWER_BITS == upper] for b in map(_bits, parts())])
    found = near.kthvalue(rank - int(ends[upper] - counts[upper]) + 1).values
    return float(found.view(torch.float32))


_LOWER_BITS = 18


def _bits(part: Tensor) -> Tensor:
    return part.flatten().view(torch.int32)
