"""LAMP scores and the global threshold over them: weights only, one tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from compressor import progress
from compressor.blocks import weight_of
from compressor.decoder import Decoder

_EDGES = np.concatenate([[0.0], np.geomspace(1e-14, 1.0, 2**16)])

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Starts a pass over (name, weight); each weight is needed only until the next one comes."""


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


def lamp_survivors(weights: Weights, sparsity: float) -> dict[str, tuple[int, int]]:
    """{name: (#(score >= threshold), size)} for one threshold over the scores of all tensors.

    The threshold is the K-th largest score, K = round((1 - sparsity) n), so ties may keep a few
    more than K. Exact, in two passes with one tensor in memory: the first counts scores between
    65,536 edges, the second looks at the scores of the one interval that holds the K-th.
    """
    counts = np.zeros(len(_EDGES), dtype=np.int64)
    sizes: dict[str, int] = {}
    for name, weight in weights():
        scores = ascending_scores(weight)
        counts += len(scores) - np.searchsorted(scores, _EDGES)
        sizes[name] = len(scores)
    keep = max(1, round((1 - sparsity) * sum(sizes.values())))
    low = int(np.flatnonzero(counts >= keep).max())
    upper = _EDGES[low + 1] if low + 1 < len(_EDGES) else np.inf
    sure: dict[str, int] = {}
    inside: dict[str, np.ndarray] = {}
    for name, weight in weights():
        scores = ascending_scores(weight)
        first, last = np.searchsorted(scores, [_EDGES[low], upper])
        sure[name] = len(scores) - int(last)
        inside[name] = scores[first:last].copy()
    candidates = np.sort(np.concatenate(list(inside.values())))
    threshold = candidates[len(candidates) - (keep - sum(sure.values()))]
    return {
        name: (sure[name] + int((inside[name] >= threshold).sum()), size)
        for name, size in sizes.items()
    }


def linear_weights(decoder: Decoder, label: str) -> Iterator[tuple[str, Tensor]]:
    """(full name, weight (O, I)) of every linear of the blocks, one block resident at a time."""
    count = len(decoder.blocks)
    for index in progress.track(range(count), label, count):
        with decoder.resident(index), torch.no_grad():
            for name, linear in decoder.blocks.linears(index).items():
                yield name, weight_of(linear)
