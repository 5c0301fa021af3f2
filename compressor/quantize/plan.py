"""From a plan of widths to the grid of every linear."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch

from compressor.blocks import Blocks, weight_of
from compressor.decoder import Decoder
from compressor.errors import QuantizationError, did_you_mean
from compressor.quantize import GridParams
from compressor.quantize.formats import FORMATS
from compressor.quantize.grid import Grid
from compressor.quantize.inputs import input_groups
from compressor.records import BitPlan, Width

_PROBE = torch.zeros(1, 2, dtype=torch.long)


def grids(decoder: Decoder, params: GridParams, plan: BitPlan) -> dict[str, Grid]:
    """The grid of every linear of the blocks, by full name.

    Raises `QuantizationError` for a pattern of the plan that no linear is first matched by.
    """
    dtype = FORMATS[params.format].scale_dtype or decoder.reader.checkpoint.dtype
    names = [name for i in range(len(decoder.blocks)) for name in decoder.blocks.linears(i)]
    default = Width(bits=params.bits)
    used: set[str | None] = set()
    found = {}
    for name in names:
        pattern = next((p for p in plan.linears if _matches(p, name)), None)
        used.add(pattern)
        width = default if pattern is None else plan.linears[pattern]
        size = params.group_size if width.group_size is None else width.group_size
        symmetric = params.symmetric if width.symmetric is None else width.symmetric
        found[name] = Grid(width.bits, size, dtype, params.search, symmetric)
    idle = [pattern for pattern in plan.linears if pattern not in used]
    if idle:
        raise QuantizationError(
            f"scheme: {idle[0]!r} is the first match of no linear{did_you_mean(idle[0], names[:7])}"
        )
    return found


def units(decoder: Decoder) -> list[tuple[str, ...]]:
    """The linears that servers load as one matrix, so must share a grid, in the order they run.

    Those of one parent module that read the same tensor: q, k and v; gate and up. Found by
    running one block of each make and watching.
    """
    blocks, probe = decoder.blocks, decoder.embed(_PROBE)
    known: dict[tuple[tuple[str, torch.Size], ...], list[list[str]]] = {}
    found = []
    for index in range(len(blocks)):
        path = f"{blocks.prefix}.{index}."
        linears = blocks.linears(index).items()
        make = tuple((n.removeprefix(path), weight_of(m).shape) for n, m in linears)
        if make not in known:
            with torch.no_grad(), decoder.resident(index):
                groups = input_groups(decoder, probe, index)
            tails = [[name.removeprefix(path) for name in group] for group in groups]
            known[make] = [part for group in tails for part in _by_parent(group)]
        found += [tuple(path + tail for tail in tails) for tails in known[make]]
    return found


def widths_by_block(bits: Mapping[str, int], blocks: Blocks) -> dict[str, str]:
    """The bits of each linear, a digit a block and - where it is not: {"mlp.down_proj": "44-3"}."""
    rows: dict[str, str] = {}
    for name, each in bits.items():
        index, _, tail = name.removeprefix(f"{blocks.prefix}.").partition(".")
        rows[tail] = rows.get(tail, "").ljust(int(index), "-") + str(each)
    return {tail: row.ljust(len(blocks), "-") for tail, row in rows.items()}


def _by_parent(tails: list[str]) -> list[list[str]]:
    parents: dict[str, list[str]] = {}
    for tail in tails:
        parents.setdefault(tail.rpartition(".")[0], []).append(tail)
    return list(parents.values())


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)
