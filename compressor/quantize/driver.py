"""Quantizing a model: one walk, one group of linears at a time, on already compressed inputs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import progress
from compressor.blocks import weight_of
from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder, all_finite
from compressor.errors import QuantizationError
from compressor.memory import freed_memory_kept, release
from compressor.moments import energies
from compressor.quantize import METHODS, Forwards, GridParams, Kind, PropagatingParams
from compressor.quantize.error_propagation import propagate_difference, propagate_error
from compressor.quantize.formats import Grids
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.inputs import Group, input_groups, stream_writers
from compressor.quantize.kinds import kind_of
from compressor.quantize.lint import lint
from compressor.quantize.plan import grids, widths_by_block
from compressor.quantize.precision import exactly, products_in
from compressor.quantize.results import BlockResult
from compressor.quantize.resume import Saves, identity_of
from compressor.quantize.scaling import Scaled, scale_block
from compressor.quantize.teacher import Guide, Teacher, Twin
from compressor.quantize.turns import Catching, Moments, quantize_in_turn
from compressor.quantize.write import IntegerWriter
from compressor.records import BitPlan
from compressor.walk import Step, Stream, walk

Quantizer = Callable[[Tensor, Tensor | None, Grid], QuantizedWeight]
REPORT = "quantization.json"
_LAST = ("o", "down")
_PROBE = 8  # tokens that show which linears share inputs
_INPUT_BYTES = 2**28  # of the widest linear's inputs that go through a block at once


@dataclass(frozen=True)
class Recipe:
    """How linears are quantized: each on which grid, by what, corrected how much, scaled or not."""

    grids: Grids
    quantizer: Quantizer
    strengths: dict[Kind, tuple[float, float]] = field(default_factory=dict)
    catching: Catching = field(default_factory=Catching)
    forwards: Forwards = "float32"
    scales: bool = False

    @classmethod
    def of(cls, decoder: Decoder, method: str, params: GridParams) -> Recipe:
        """The recipe of a method's parameters for the linears of `decoder`."""
        known = {*GridParams.model_fields, *PropagatingParams.model_fields}
        own = {name: value for name, value in dict(params).items() if name not in known}
        quantizer = functools.partial(METHODS[method].load(), **own)
        plan = grids(decoder, params, params.scheme or BitPlan())
        if isinstance(params, PropagatingParams):
            scales = params.scaling == "awq"
            strengths, catching = params.strengths(), Catching(*params.catching())
            return cls(plan, quantizer, strengths, catching, params.forwards, scales)
        return cls(plan, quantizer)

    @property
    def widest(self) -> int:
        """The most bits that any linear gets."""
        return max(grid.bits for grid in self.grids.values())

    @property
    def propagates(self) -> bool:
        """Whether anything is corrected, so that the original's stream is needed."""
        return any(alpha > 0 for alpha, _ in self.strengths.values())


def quantize(
    source: Path,
    out: Path,
    tokens: Tensor | None,
    method: str,
    params: GridParams,
    *,
    work: Path | None = None,
    teacher: Teacher | None = None,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Write `source` with every linear of its blocks in integers, block by block.

    With tokens (N, T), each group of linears sees inputs made by the already quantized ones
    before it (true sequential order), and is corrected towards the inputs it has in `teacher`, or
    had in `source` itself. A killed run goes on from what it saved in `work`, to the same bits.
    `quantization.json` in `out` holds the report of every linear, the drift of the residual
    stream by depth and who can load the file. Returns these in short.
    Raises `QuantizationError` before any work when the file could not be loaded.
    """
    _refuse(Checkpoint(source))
    release()  # what the tokenizer took
    decoder = Decoder(source, device)
    recipe = Recipe.of(decoder, method, params)
    readers = lint(decoder, recipe.grids, params.format)
    saves = Saves(
        work, lambda: identity_of(source, tokens, method, params, teacher, device, batch_size)
    )
    report: dict[str, dict[str, float]] = {}
    drifts: list[float] = []
    with IntegerWriter(decoder, out, recipe.grids, params.format) as writer:
        for result in quantize_blocks(decoder, tokens, recipe, batch_size, teacher, saves):
            writer.block(result.weights, result.dense)
            report |= result.report
            drifts += [] if result.drift is None else [result.drift]
        bits = writer.finish()
    loads = [verdict._asdict() for verdict in readers]
    text = json.dumps({"linears": report, "drift": drifts, "readers": loads}, indent=1)
    (out / REPORT).write_text(text + "\n", encoding="utf-8")
    errors = [row["relative_error"] for row in report.values()]
    asked = dict(params).get("damp", math.inf)
    widths = {name: grid.bits for name, grid in recipe.grids.items()}
    mixed = len(set(widths.values())) > 1
    left = [name for name, row in report.items() if recipe.scales and "beta" not in row]
    return {
        "bits": "mixed" if mixed else next(iter(widths.values())),
        "bits_per_weight": bits,
        "mean_relative_error": sum(errors) / len(errors),
        "drift": drifts[-1] if drifts else None,
        "raised_damp": [name for name, row in report.items() if row["damp"] > asked],
        **({"widths": widths_by_block(widths, decoder.blocks)} if mixed else {}),
        **({"unscaled": left} if left else {}),
        "readers": {verdict.reader: f"{verdict.speed}: {verdict.why}" for verdict in readers},
    }


def _refuse(checkpoint: Checkpoint) -> None:
    source = checkpoint.folder
    if checkpoint.quantized:
        raise QuantizationError(f"{source}: already quantized; start from the dense checkpoint")
    if checkpoint.shares:
        raise QuantizationError(
            f"{source}: some sublayers run with another block's weights, whose inputs are several "
            "blocks'; this is not quantized yet, prune without re-use"
        )


def quantize_blocks(
    decoder: Decoder,
    tokens: Tensor | None,
    recipe: Recipe,
    batch_size: int = 4,
    teacher: Teacher | None = None,
    saves: Saves | None = None,
) -> Iterator[BlockResult]:
    """Quantize block after block in memory; each is resident, quantized, when it is yielded.

    Those that `saves` holds come first and are not resident. Without tokens (N, T), from weights
    alone. With them, batches are made as large as `_INPUT_BYTES` allows, and at least
    `batch_size` windows.
    """
    saves = saves or Saves()
    if tokens is None:
        decoder.drop_shell()
        count, done = len(decoder.blocks), saves.restore(())
        yield from saves.blocks(recipe.grids)
        for index in progress.track(range(done, count), "quantize", count, done):
            with decoder.resident(index), torch.no_grad():
                result = BlockResult()
                for name, linear in decoder.blocks.linears(index).items():
                    _quantize_group(Group({name: linear}), None, recipe, result)
                saves.add(result, ())
                yield result
        return
    widest = max(weight_of(linear).shape[1] for linear in decoder.blocks.linears(0).values())
    fits = _INPUT_BYTES // (4 * widest * tokens.shape[1])
    stream = Stream(decoder, tokens, max(batch_size, fits))
    truth: Guide | Twin | None = None
    if recipe.propagates:
        truth = Guide(teacher, stream) if teacher else Twin(stream)
    probe = decoder.embed(tokens[:1, :_PROBE])
    decoder.drop_shell()
    release()
    streams = [stream.x, truth.stream.x] if truth else [stream.x]
    done = saves.restore(streams)
    yield from saves.blocks(recipe.grids)
    with freed_memory_kept():
        for step in walk(stream, "quantize", done):
            scaled = scale_block(step, probe, recipe.grids) if recipe.scales else Scaled({}, {})
            forwards = products_in(recipe.forwards, decoder.device, recipe.widest)
            with forwards, truth.beside(step) if truth else nullcontext() as original:
                result = _quantize_block(step, original, probe, recipe)
            result.dense = scaled.dense
            for name, beta in scaled.betas.items():
                result.report[name]["beta"] = beta
            saves.add(result, streams)
            yield result


def _quantize_block(
    step: Step, original: Step | None, probe: Tensor, recipe: Recipe
) -> BlockResult:
    """Quantize the block of a step and move both streams past it."""
    decoder, result = step.stream.decoder, BlockResult()

    def take(group: Group, moments: Moments) -> None:
        alpha, ridge = recipe.strengths.get(kinds[group.leader], (0.0, 0.0))
        for grid in dict.fromkeys(recipe.grids[name] for name in group):
            same = Group({n: linear for n, linear in group.items() if recipe.grids[n] == grid})
            _quantize_group(same, moments, recipe, result, alpha=alpha, ridge=ridge)

    groups = input_groups(decoder, probe, step.index)
    leaders = [group.leader for group in groups]
    kinds = {name: kind_of(name, leaders, decoder.blocks, step.index) for name in leaders}
    last = {g.leader: g[g.leader] for g in groups if kinds[g.leader] in _LAST and len(g) == 1}
    catches = any(recipe.catching) and original is not None
    writers = stream_writers(decoder, probe, step.index, last) if catches else ()
    quantize_in_turn(step, original, groups, take, dict.fromkeys(writers, recipe.catching))
    for _ in step.advance():
        pass
    if original:
        for _ in original.advance():
            pass
        result.drift = original.stream.relative_error(step.stream)
    return result


def _quantize_group(
    group: Group,
    moments: Moments | None,
    recipe: Recipe,
    result: BlockResult,
    *,
    alpha: float = 0.0,
    ridge: float = 0.0,
) -> None:
    """Quantize linears that share inputs as one tall matrix; the block gets the result."""
    weights = [weight_of(linear).data for linear in group.values()]
    gram, cross, lack = moments or (None, None, None)
    stacked, used = torch.cat(weights).float(), 0.0
    try:
        if not all(all_finite(each) for each in (gram, cross, lack) if each is not None):
            raise QuantizationError("its inputs hold NaN or infinity; calibrate in float32")
        with exactly(stacked.device):
            if alpha and gram is not None and cross is not None:
                stacked, used = propagate_difference(stacked, cross, gram, alpha=alpha, damp=ridge)
            if alpha and gram is not None and lack is not None:
                stacked, used = propagate_error(stacked, lack, gram, alpha=alpha, damp=ridge)
            quantized = recipe.quantizer(stacked, gram, recipe.grids[group.leader])
    except QuantizationError as error:
        raise QuantizationError(f"{group.leader}: {error}") from error
    rounded, rows = quantized.dequantize(), [len(weight) for weight in weights]
    lost = _sizes(stacked - rounded, gram).split(rows)
    whole = _sizes(stacked, gram).split(rows)
    parts = zip(group, weights, quantized.split(rows), rounded.split(rows), strict=True)
    for index, (name, weight, part, values) in enumerate(parts):
        share = float((lost[index].sum() / whole[index].sum().clamp(min=1e-30)).sqrt())
        result.weights[name] = part
        result.report[name] = {"relative_error": share, "damp": part.damp, "ridge": used}
        weight.copy_(values)


def _sizes(weight: Tensor, gram: Tensor | None) -> Tensor:
    """||w X||^2 of each row w of weight (O, I) through the gram, or ||w||^2 without one, (O,)."""
    return weight.square().sum(1) if gram is None else energies(weight, gram)
