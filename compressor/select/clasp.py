"""Dynamic programming over hidden states: which blocks the stream can do without."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compressor.records import Scores, Selection
from compressor.select.protect import cut, free_units, protected
from compressor.trial import Trial
from compressor.walk import Step, Stream, storage, walk


def clasp(scores: Scores, trial: Trial, *, n: int, protect: tuple[int, ...]) -> Selection:
    """Remove the n blocks on the path to g[L][n] of CLaSp's table, made static.

    g[l][m] are states (N, T, D) entering block l with m blocks skipped: g[l+1][m] is whichever of
    f_l(g[l][m]) (run) and g[l][m-1] (skip) has the higher mean cosine over tokens with the full
    model's h[l+1]; of equals, the block runs. One state per cell, so the path is good, not
    optimal. At most n + 1 forwards in one walk, in which every block is read once; n + 2 streams.
    The paper chooses per token; here all calibration tokens choose together, each stream with
    its own keys and values. Raises `SelectionError` for a budget that does not fit. Source:
    CLaSp (arXiv:2505.24196 section 3).
    """
    depth = scores.num_blocks
    free_units(scores, n, "block", protect)
    kept = protected(depth, protect)
    stream = Stream(trial.decoder, trial.tokens, trial.batch_size)
    cells: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
    ran = 0
    for step in walk(stream, "clasp"):
        before = storage(tuple(stream.x.shape), stream.x.dtype).copy_(stream.x)
        for _ in step.advance():
            pass
        cells[0] = before, ()
        for m in range(min(n, step.index + 1), 0, -1):
            choices = []
            if m in cells:
                choices.append((_run(step, cells[m][0]), cells[m][1]))
                ran += 1
            if m - 1 in cells and step.index not in kept:
                choices.append((cells[m - 1][0], (*cells[m - 1][1], step.index)))
            if choices:
                cells[m] = max(choices, key=lambda cell: _mean_cosine(cell[0], stream))
    if n == 0:
        return cut(depth, (), "nothing to remove", 1.0)
    state, path = cells[n]
    reason = f"the path of highest cosine, {_mean_cosine(state, stream):.4f} at last"
    return cut(depth, [("block", i) for i in path], reason, 1 + ran / depth)


def _run(step: Step, x: Tensor) -> Tensor:
    y = storage(tuple(x.shape), x.dtype)
    for rows in step.stream.batches:
        y[rows] = step.run(x[rows]).to(y.device)
    return y


def _mean_cosine(x: Tensor, stream: Stream) -> float:
    """Mean over all tokens of the cosine with the full model's stream, float32."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in stream.batches:
        total += cosine_similarity(x[rows].float(), stream.x[rows].float(), dim=-1).double().sum()
    return float(total / stream.tokens.numel())
