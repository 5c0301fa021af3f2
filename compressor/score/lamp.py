"""LAMP: layer-adaptive magnitude scores, gathered into one density per block."""

from __future__ import annotations

from functools import partial

from compressor.decoder import Decoder
from compressor.magnitude import lamp_survivors, linear_weights
from compressor.records import Scores


def lamp(decoder: Decoder, *, sparsity: float) -> Scores:
    """Density of each block after a global LAMP threshold; low means prunable.

    I_block = sum over its linears of #(score >= threshold) / sum of their sizes
    (arXiv:2010.07611 section 3; gathering it by block is ours).
    """
    survivors = lamp_survivors(partial(linear_weights, decoder, "lamp"), sparsity)
    densities = []
    for index in range(len(decoder.blocks)):
        counts = [survivors[name] for name in decoder.blocks.linears(index)]
        densities.append(sum(kept for kept, _ in counts) / sum(size for _, size in counts))
    return Scores(num_blocks=len(decoder.blocks), block={"lamp": densities})
