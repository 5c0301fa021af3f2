"""LAMP: layer-adaptive magnitude scores, gathered into one density per block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from compressor import progress
from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.records import Scores

_EDGES = np.concatenate([[0.0], np.geomspace(1e-14, 1.0, 2**16)])


def ascending_scores(weight: Tensor) -> np.ndarray:
    """LAMP scores of one tensor, ascending, float64: w_u^2 / sum of w_v^2 over v >= u.

    v runs over the weights that are not smaller in magnitude, u itself included
    (arXiv:2010.07611 eq. 3). The scores rise with the magnitude, so sorting the magnitudes
    sorts them; ties get different scores, the last of them the largest. The largest weight
    scores 1; a tensor of zeros scores 0. Sums run from the top in float64.
    """
    magnitudes = np.sort(weight.detach().abs().flatten().float().cpu().numpy())
    squares = magnitudes.astype(np.float64) ** 2
    above = np.cumsum(squares[::-1])[::-1]
    return np.divide(squares, above, out=np.zeros_like(squares), where=above > 0)


def lamp(decoder: Decoder, *, sparsity: float) -> Scores:
    """Density of each block after a global LAMP threshold; low means prunable.

    I_block = sum over its linears of #(score >= threshold) / sum of their sizes, where the
    threshold is the K-th largest score of all linears, K = round((1 - sparsity) n). Exact,
    in two passes over the weights with one tensor in memory: the first counts scores between
    65,536 edges, the second looks at the scores of the one interval that holds the K-th.
    """
    counts = np.zeros(len(_EDGES), dtype=np.int64)
    sizes = np.zeros(len(decoder.blocks), dtype=np.int64)
    for index, scores in _all_scores(decoder, "lamp: counting"):
        counts += len(scores) - np.searchsorted(scores, _EDGES)
        sizes[index] += len(scores)
    keep = max(1, round((1 - sparsity) * int(sizes.sum())))
    low = int(np.flatnonzero(counts >= keep).max())
    upper = _EDGES[low + 1] if low + 1 < len(_EDGES) else np.inf
    sure = np.zeros_like(sizes)
    inside: list[tuple[int, np.ndarray]] = []
    for index, scores in _all_scores(decoder, "lamp: threshold"):
        first, last = np.searchsorted(scores, [_EDGES[low], upper])
        sure[index] += len(scores) - last
        inside.append((index, scores[first:last].copy()))
    candidates = np.sort(np.concatenate([scores for _, scores in inside]))
    threshold = candidates[len(candidates) - (keep - int(sure.sum()))]
    for index, scores in inside:
        sure[index] += int((scores >= threshold).sum())
    return Scores(num_blocks=len(sizes), block={"lamp": (sure / sizes).tolist()})


def _all_scores(decoder: Decoder, label: str) -> Iterator[tuple[int, np.ndarray]]:
    for index in progress.track(range(len(decoder.blocks)), label, len(decoder.blocks)):
        with decoder.resident(index), torch.no_grad():
            for linear in decoder.blocks.linears(index).values():
                yield index, ascending_scores(weight_of(linear))
