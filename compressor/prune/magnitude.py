"""Magnitude pruning, each tensor at the density a global LAMP threshold gives it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.magnitude import lamp_survivors, linear_weights
from compressor.prune.sparse import open_dense, write_masked


def magnitude(source: Path, out: Path, *, sparsity: float) -> dict[str, Any]:
    """Zero the smallest weights of every linear of the blocks (arXiv:2010.07611 section 3).

    A tensor keeps #(LAMP score >= the K-th largest of all), K = round((1 - sparsity) n), and
    those are its largest by magnitude. No tensor is emptied while K is at least the number of
    tensors, since the largest weight of each scores 1. Reads the weights three times and returns
    the share of zeros. Raises `CheckpointError` for a quantized source.
    """
    decoder = open_dense(source)
    return write_masked(decoder, out, _masks(decoder, sparsity))


def _masks(decoder: Decoder, sparsity: float) -> Iterator[tuple[str, Tensor]]:
    survivors = lamp_survivors(partial(linear_weights, decoder, "lamp threshold"), sparsity)
    for name, weight in linear_weights(decoder, "prune"):
        yield name, largest(weight, survivors[name][0])


def largest(weight: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest magnitudes; of equal ones the last in memory stay."""
    magnitudes = weight.abs().flatten()
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[magnitudes.argsort(stable=True)[: len(magnitudes) - count]] = False
    return keep.view(weight.shape)
