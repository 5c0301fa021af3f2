"""AWQ: inputs divided and columns multiplied by one scale each before anything is rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.blocks import weight_of
from compressor.inputs import inputs_of
from compressor.moments import Gram
from compressor.quantize.folds import Fold, find_fold, multiply
from compressor.quantize.formats import Grids
from compressor.quantize.grid import Grid
from compressor.quantize.inputs import input_groups
from compressor.quantize.rtn import rtn
from compressor.walk import Step

BETAS = [step / 20 for step in range(20)]
_SMALLEST = 1e-4


class Scaled(NamedTuple):
    """What scaling did to a block.

    Attributes:
        betas: the exponent that each linear got whose inputs' scales fold, by full name.
        dense: tensors beside the matrices that are others now, by full name, as stored.
    """

    betas: dict[str, float]
    dense: dict[str, Tensor]


def scale_block(step: Step, probe: Tensor, grids: Grids) -> Scaled:
    """Scale what each group of a resident block reads; the block computes what it did.

    s_j = (mean |x_j|)^beta (AWQ, arXiv:2306.00978 section 3.2), W s instead of W and x / s
    instead of x, which is folded into what makes x (`find_fold`); beta by `best_beta` on the
    stream as it enters the block. Where s folds into nothing, the group is left alone.
    probe (B, T, D) is a small stream of a shape that was embedded before.
    """
    decoder, index = step.stream.decoder, step.index
    groups, folds = input_groups(decoder, probe, index), {}
    for place, group in enumerate(groups):
        fold = find_fold(decoder, probe, index, groups[:place], group)
        if fold:
            folds[group.leader] = fold
    seen = _statistics(step, {g.leader: g[g.leader] for g in groups if g.leader in folds})
    scaled = Scaled({}, {})
    for group in groups:
        if group.leader not in folds:
            continue
        fold, (gram, size) = folds[group.leader], seen[group.leader]
        sizes = fold.mean(size)
        weights = [(weight_of(linear).data, grids[name]) for name, linear in group.items()]
        beta = best_beta(weights, gram, sizes, fold)
        scaled.betas.update(dict.fromkeys(group, beta))
        if beta:
            reader, name = decoder.reader, f"{fold.name}.weight"
            dtype = reader.checkpoint.stored_dtype(reader.locate(name) or name)
            multiply(group, fold.divide(scales(sizes, beta), dtype))
            scaled.dense.update(fold.vectors(dtype))
    return scaled


def best_beta(weights: list[tuple[Tensor, Grid]], gram: Tensor, sizes: Tensor, fold: Fold) -> float:
    """The exponent, of 0, 0.05 .. 0.95, with the least tr((W - Q / s) H (W - Q / s)^T).

    Q is W s rounded to nearest on its own grid, from minimum to maximum. weights: matrices
    (O, I) that share inputs; gram H (I, I); sizes, mean |x| of each row of the fold (R,).
    """

    def lost(beta: float) -> float:
        scale = scales(sizes, beta)[fold.rows]
        total = 0.0
        for weight, grid in weights:
            rounded = rtn(weight * scale, None, replace(grid, search=False)).dequantize()
            off = weight - rounded / scale
            total += float(((off @ gram) * off).sum())
        return total

    return min(BETAS, key=lost)


def scales(sizes: Tensor, beta: float) -> Tensor:
    """s = sizes^beta over sqrt(max s min s), as far above 1 as below; 1 everywhere for beta 0."""
    scale = sizes.pow(beta).clamp(min=_SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def _statistics(step: Step, linears: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """(mean of x x^T, mean of |x|), (I, I) and (I,), of what each linear reads."""
    grams: dict[str, Gram] = {}
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        grams.setdefault(name, Gram(x.shape[1], x.device)).add(x)
        sums[name] = sums.get(name, torch.zeros_like(x[0])) + x.abs().sum(0)

    with inputs_of(linears, add):
        for x in step.inputs():
            step.run(x)
    count = step.stream.tokens.numel()
    return {name: (grams[name].mean, sums[name] / count) for name in linears}
