"""Quantizing a model: one walk, one group of linears at a time, on already compressed inputs."""

from __future__ import annotations

import functools
import json
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
from compressor.moments import Gram
from compressor.quantize import METHODS, RtnParams
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.write import PackedWriter
from compressor.walk import Step, Stream, walk

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
    grid = Grid(params.bits, params.group_size, dtype, params.search)
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
                linears = decoder.blocks.linears(index)
                yield index, _quantize_group(list(linears.items()), None, quantizer, grid)
        return
    for step in walk(Stream(decoder, tokens, batch_size), "quantize"):
        results: Results = {}
        for group in input_groups(step, decoder.blocks.linears(step.index)):
            gram = _gram(step, group[0][1])
            results |= _quantize_group(group, gram, quantizer, grid)
        yield step.index, results


def _quantize_group(
    group: list[tuple[str, nn.Module]], gram: Tensor | None, quantizer: Quantizer, grid: Grid
) -> Results:
    """Quantize linears that share inputs and put the result into the resident block."""
    results: Results = {}
    for name, linear in group:
        weight = weight_of(linear)
        try:
            result = quantizer(weight.data, gram, grid)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
        rounded = result.dequantize()
        results[name] = (result, _relative_error(weight.data.float(), rounded, gram))
        weight.data.copy_(rounded)
    return results


def _relative_error(weight: Tensor, rounded: Tensor, gram: Tensor | None) -> float:
    """||(W - Q) X|| / ||W X|| through the gram, or ||W - Q|| / ||W|| without one."""

    def energy(w: Tensor) -> Tensor:
        return (w * (w if gram is None else w @ gram)).sum().clamp(min=0)

    return float((energy(weight - rounded) / energy(weight).clamp(min=1e-30)).sqrt())


class _Seen(Exception):  # noqa: N818 - control flow: the input we waited for has come
    """Stops a block's forward once the awaited input was seen."""


def input_groups(step: Step, linears: dict[str, nn.Module]) -> list[list[tuple[str, nn.Module]]]:
    """Linears of a block in the order they run, grouped by sharing one input tensor.

    Found by running one batch and watching, so no family has to declare it.
    """
    groups: list[list[tuple[str, nn.Module]]] = []
    inputs: list[Tensor] = []

    def watch(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for group, x in zip(groups, inputs, strict=True):
            if x is args[0]:
                group.append((name, module))
                return
        inputs.append(args[0])
        groups.append([(name, module)])

    handles = [
        module.register_forward_pre_hook(functools.partial(_call, watch, name))
        for name, module in linears.items()
    ]
    try:
        step.run(next(step.inputs()))
    finally:
        for handle in handles:
            handle.remove()
    silent = linears.keys() - {name for group in groups for name, _ in group}
    if silent:
        raise QuantizationError(f"{sorted(silent)[0]} is never run by its block's forward")
    return groups


def _call(
    watch: Callable[[str, nn.Module, tuple[Tensor, ...]], None],
    name: str,
    module: nn.Module,
    args: tuple[Tensor, ...],
) -> None:
    watch(name, module, args)


def _gram(step: Step, linear: nn.Module) -> Tensor:
    """Gram of a linear's inputs over the whole stream; forwards stop once they are seen."""
    gram = Gram(weight_of(linear).shape[1], weight_of(linear).device)

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.add(args[0])
        raise _Seen

    handle = linear.register_forward_pre_hook(take)
    try:
        for x in step.inputs():
            try:
                step.run(x)
            except _Seen:
                continue
    finally:
        handle.remove()
    return gram.mean


def _check_widths(decoder: Decoder, group_size: int) -> None:
    for index in range(len(decoder.blocks)):
        for name, linear in decoder.blocks.linears(index).items():
            if not isinstance(linear, nn.Linear):
                raise QuantizationError(
                    f"{name} is a {type(linear).__name__}, which no runtime loads quantized; "
                    "this family can be pruned and healed, not quantized"
                )
            width = linear.in_features
            if width % group_size:
                fits = [g for g in (16, 32, 64, 96, 128, 192, 256) if width % g == 0]
                raise QuantizationError(
                    f"{name}: its {width} inputs are not a multiple of group_size {group_size}; "
                    f"use one of {fits}"
                )
