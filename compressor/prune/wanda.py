"""Wanda: zero the weights of every output that its inputs make least of."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.inputs import input_norms
from compressor.prune.sparse import open_dense, write_masked
from compressor.ratings import median, ratings, share_above
from compressor.sparsity import dlp_sparsities, owl_sparsities
from compressor.walk import Stream, walk


def wanda(
    source: Path,
    out: Path,
    tokens: Tensor,
    *,
    sparsity: float,
    allocation: str,
    alpha: float,
    outlier: float,
    pattern: str,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Zero, in every row, the weights of least |W_ij| ||X_j||_2 (arXiv:2306.11695 section 3).

    tokens (N, T). Every block sees inputs made by the already pruned blocks before it; inside a
    block all linears are judged on its dense forward, as in the authors' code. With `allocation`
    dlp or owl, a walk over the dense model first gives each block its own sparsity of mean
    `sparsity`. Costs 2 forwards, with an allocation 3. Returns the share of zeros and the blocks'
    sparsities. Raises `CheckpointError` for a quantized source and `NotApplicable` for linears
    whose inputs do not split into the runs of `pattern`.
    """
    decoder = open_dense(source, device)
    _check_runs(decoder, pattern)
    shares = [sparsity] * len(decoder.blocks)
    if allocation != "uniform":
        statistics = block_statistics(Stream(decoder, tokens, batch_size), outlier)
        median, outliers = zip(*statistics, strict=True)
        shares = (
            dlp_sparsities(median, sparsity, alpha)
            if allocation == "dlp"
            else owl_sparsities(outliers, sparsity, alpha)
        )
    masks = _masks(Stream(decoder, tokens, batch_size), shares, pattern)
    return write_masked(decoder, out, masks) | {"block_sparsity": shares}


def _masks(stream: Stream, shares: list[float], pattern: str) -> Iterator[tuple[str, Tensor]]:
    for step in walk(stream, "wanda"):
        linears = stream.decoder.blocks.linears(step.index)
        norms = input_norms(linears, (step.run(x) for x in step.inputs()))
        for name, linear in linears.items():
            weight = weight_of(linear).data
            keep = kept(weight.float().abs() * norms[name], shares[step.index], pattern)
            weight.masked_fill_(~keep, 0)
            yield name, keep


def _check_runs(decoder: Decoder, pattern: str) -> None:
    for index in range(len(decoder.blocks)):
        for name, linear in decoder.blocks.linears(index).items():
            width = weight_of(linear).shape[1]
            if pattern != "unstructured" and width % int(pattern.split(":")[1]):
                raise NotApplicable(
                    f"{name}: its {width} inputs do not split into the runs of {pattern}"
                )


def kept(metric: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """Bool mask (O, I) of the weights that stay, from |W_ij| ||X_j|| (O, I).

    Unstructured: each row loses its round(sparsity I) smallest. With `pattern` "n:m", each run
    of m inputs of a row keeps its n largest. Of equal ones the last stay.
    """
    rows = metric
    count = round(sparsity * metric.shape[1])
    if pattern != "unstructured":
        keep, run = map(int, pattern.split(":"))
        rows, count = metric.reshape(-1, run), run - keep
    lowest = rows.argsort(dim=1, stable=True)[:, :count]
    mask = torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False)
    return mask.view(metric.shape)


def block_statistics(stream: Stream, outlier: float) -> list[tuple[float, float]]:
    """(median of A, share of A above `outlier` times its mean) of each block, one dense walk.

    A = |W_ij| ||X_j||_2 of all linears of the block, concatenated: DLP's S_l
    (arXiv:2505.23807) and OWL's D_l (arXiv:2310.05175 section 3; there in percent).
    """
    found = []
    for step in walk(stream, "sparsity of blocks"):
        linears = stream.decoder.blocks.linears(step.index)
        norms = input_norms(linears, step.advance())
        parts = functools.partial(ratings, linears, norms)
        found.append((median(parts), share_above(parts, outlier)))
    return found
