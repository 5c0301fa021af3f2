"""Quantizing a model: one walk, one group of linears at a time, on already compressed inputs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import progress
from compressor.blocks import weight_of
from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.quantize import METHODS, RtnParams
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.inputs import Group, input_gram, input_groups
from compressor.quantize.write import PackedWriter
from compressor.walk import Stream, walk

Quantizer = Callable[[Tensor, Tensor | None, Grid], QuantizedWeight]
REPORT = "quantization.json"


def quantize(
    source: Path,
    out: Path,
    tokens: Tensor | None,
    method: str,
    params: RtnParams,
    *,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Write `source` with every linear of its blocks in integers, block by block.

    With tokens (N, T), each group of linears sees inputs made by the already quantized
    ones before it (true sequential order). Per linear, `quantization.json` in `out` holds the
    relative error of its outputs ||(W - Q) X|| / ||W X|| (of its weights without text) and
    the ridge that was used. Returns average bits and the mean error.
    Raises `QuantizationError` before any work when a group size does not divide a width.
    """
    if Checkpoint(source).quantized:
        raise QuantizationError(f"{source}: already quantized; start from the dense checkpoint")
    decoder = Decoder(source, device)
    _check_widths(decoder, params.group_size)
    dtype = decoder.reader.checkpoint.dtype
    grid = Grid(params.bits, params.group_size, dtype, params.search, params.symmetric)
    extra = {k: v for k, v in dict(params).items() if k not in RtnParams.model_fields}
    quantizer = functools.partial(METHODS[method].load(), **extra)
    report: dict[str, dict[str, float]] = {}
    with PackedWriter(decoder, out, grid) as writer:
        for index, results in _blocks(decoder, tokens, quantizer, grid, batch_size):
            writer.block(index, {name: result for name, (result, _) in results.items()})
            for name, (result, error) in results.items():
                report[name] = {"relative_error": error, "damp": result.damp}
        bits = writer.finish()
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    errors = [row["relative_error"] for row in report.values()]
    raised = [name for name, row in report.items() if row["damp"] > extra.get("damp", row["damp"])]
    return {
        "bits": params.bits,
        "bits_per_weight": bits,
        "mean_relative_error": sum(errors) / len(errors),
        "raised_damp": raised,
    }


Results = dict[str, tuple[QuantizedWeight, float]]


def _blocks(
    decoder: Decoder, tokens: Tensor | None, quantizer: Quantizer, grid: Grid, batch_size: int
) -> Iterator[tuple[int, Results]]:
    if tokens is None:
        count = len(decoder.blocks)
        for index in progress.track(range(count), "quantize", count):
            with decoder.resident(index), torch.no_grad():
                results: Results = {}
                for linear in decoder.blocks.linears(index).items():
                    results |= _quantize_group([linear], None, quantizer, grid)
                yield index, results
        return
    stream = Stream(decoder, tokens, batch_size)
    decoder.embed(tokens[:1])  # masks for the single window that `input_groups` runs
    for step in walk(stream, "quantize"):
        results = {}
        for group in input_groups(step, decoder.blocks.linears(step.index)):
            gram = input_gram(step, group[0][1])
            results |= _quantize_group(group, gram, quantizer, grid)
        yield step.index, results


def _quantize_group(group: Group, gram: Tensor | None, quantizer: Quantizer, grid: Grid) -> Results:
    """Quantize linears that share inputs as one tall matrix; the block gets the result."""
    weights = [weight_of(linear).data for _, linear in group]
    try:
        stacked = quantizer(torch.cat(weights), gram, grid)
    except QuantizationError as error:
        raise QuantizationError(f"{group[0][0]}: {error}") from error
    results: Results = {}
    parts = stacked.split([len(weight) for weight in weights])
    for (name, _), weight, part in zip(group, weights, parts, strict=True):
        rounded = part.dequantize().to(weight.dtype)
        results[name] = (part, _relative_error(weight.float(), rounded.float(), gram))
        weight.copy_(rounded)
    return results


def _relative_error(weight: Tensor, rounded: Tensor, gram: Tensor | None) -> float:
    """||(W - Q) X|| / ||W X|| through the gram, or ||W - Q|| / ||W|| without one."""

    def energy(w: Tensor) -> Tensor:
        return (w * (w if gram is None else w @ gram)).sum().clamp(min=0)

    return float((energy(weight - rounded) / energy(weight).clamp(min=1e-30)).sqrt())


def _check_widths(decoder: Decoder, group_size: int) -> None:
    linears = {
        name: linear
        for index in range(len(decoder.blocks))
        for name, linear in decoder.blocks.linears(index).items()
    }
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise QuantizationError(
                f"{name} is a {type(linear).__name__}, which no runtime loads quantized; "
                "this family can be pruned and healed, not quantized"
            )
    widths = {name: weight_of(linear).shape[1] for name, linear in linears.items()}
    common = math.gcd(*widths.values())
    fits = [size for size in (256, 128, 64, 32, 16) if common % size == 0] or [common]
    for name, width in widths.items():
        if group_size and width % group_size:
            raise QuantizationError(
                f"{name}: its {width} inputs are not a multiple of group_size {group_size}; "
                f"use {' or '.join(map(str, fits))}, which divides every linear"
            )
