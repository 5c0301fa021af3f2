"""Before anything is quantized: can the file be written, and who will load it."""

from __future__ import annotations

from torch import nn

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.quantize.formats import Grids
from compressor.quantize.plan import units
from compressor.quantize.readers import Shapes, Units, Verdict, in_words, verdicts

_GPTQ_BITS = (2, 4, 8)


def lint(decoder: Decoder, grids: Grids, form: str) -> list[Verdict]:
    """Check the plan `grids` of a file in the format `form`; says what each reader makes of it.

    Raises `QuantizationError` for linears that no reader takes as integers, groups that do
    not divide a width, fused linears that differ, and what the format has no code for.
    """
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
    shapes = {name: (w.shape[0], w.shape[1]) for name, m in linears.items() for w in [weight_of(m)]}
    check(grids, shapes, form)
    fused = units(decoder)
    check_units(grids, fused)
    return verdicts(grids, shapes, fused, form)


def check(grids: Grids, shapes: Shapes, form: str) -> None:
    """Raise `QuantizationError` for a linear that the format cannot hold on its grid."""
    for name, grid in grids.items():
        rows, columns = shapes[name]
        if grid.group_size and columns % grid.group_size:
            fits = [size for size in (256, 128, 64, 32, 16) if columns % size == 0]
            raise QuantizationError(
                f"{name}: its {columns} inputs are not a multiple of group_size "
                f"{grid.group_size}; use {' or '.join(map(str, [*fits, 0]))} (0: whole rows)"
            )
        if form != "gptq":
            continue
        if grid.bits not in _GPTQ_BITS:
            raise QuantizationError(
                f"{name}: {grid.bits} bits; the GPTQ format is read with 2, 4 or 8: use those, "
                "or format compressed-tensors"
            )
        if rows * grid.bits % 32 or columns * grid.bits % 32:
            raise QuantizationError(
                f"{name}: {rows} x {columns} codes of {grid.bits} bits do not fill whole 32-bit "
                "words along both axes, which the GPTQ format needs; use compressed-tensors"
            )


def check_units(grids: Grids, units: Units) -> None:
    """Raise `QuantizationError` when linears that servers load as one differ in their grid."""
    for unit in units:
        first = grids[unit[0]]
        for name in unit[1:]:
            if grids[name] != first:
                raise QuantizationError(
                    f"{unit[0]} has {in_words(first)}, {name} has {in_words(grids[name])}; "
                    f"servers load {', '.join(n.rpartition('.')[2] for n in unit)} as one "
                    "matrix, so they must agree"
                )
