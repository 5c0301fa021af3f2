"""ZD: how many of a block's weights lie far above their mean."""

from __future__ import annotations

from torch import Tensor

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.ratings import count_above, pieces
from compressor.records import Scores
from compressor.score.collector import Collector


class ZScoreDistribution(Collector):
    """ZD_i = share of the weights of a block's linears with z > 1 (arXiv:2406.17415 section 3).

    z = (w - mean) / std over all of them together, population std. A smaller ZD means more
    important, so the saliency is -ZD, in [-1, 0]. sides="two" counts |z| > 1 instead. Weights of
    a normal distribution give 0.159 (one side) or 0.317 (two) whatever their scale.
    """

    def __init__(self, decoder: Decoder, *, sides: str) -> None:
        """Prepare for the blocks of a model."""
        self._blocks = decoder.blocks
        self._two_sided = sides == "two"
        self._saliency = [0.0] * len(decoder.blocks)

    def leave(self, index: int) -> None:
        """Count one block's weights."""
        linears = self._blocks.linears(index).values()
        weights = [rows for linear in linears for rows in pieces(weight_of(linear))]
        self._saliency[index] = -far_share(weights, two_sided=self._two_sided)

    def result(self) -> Scores:
        """One saliency per block."""
        return Scores(num_blocks=len(self._saliency), block={"zd": self._saliency})


def far_share(weights: list[Tensor], *, two_sided: bool) -> float:
    """Share of all weights whose z, or |z|, is above 1; 0 when all weights are equal."""
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.float().sum()) for w in weights) / count
    std = (sum(float((w.float() - mean).square_().sum()) for w in weights) / count) ** 0.5
    far = sum(count_above(w.float(), mean + std) for w in weights)
    if two_sided:
        far += sum(count_above(-w.float(), std - mean) for w in weights)
    return far / count
