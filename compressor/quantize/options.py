"""What there is to choose from: the units of a model at every width, in bytes and in weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.layouts import Codes
from compressor.quantize import GptqParams, GridParams
from compressor.quantize.formats import FORMATS, patterns
from compressor.quantize.gptq import gptq
from compressor.quantize.grid import Grid
from compressor.quantize.lint import lint
from compressor.quantize.plan import grids, units, widths_by_block
from compressor.quantize.rtn import rtn
from compressor.records import BitPlan, Width
from compressor.units import Unit

_ENTRY = 110  # bytes of a tensor in a safetensors header at most, beside its module's name


class Options:
    """The widths that the linears of a checkpoint may have in a file.

    Attributes:
        units: what gets a width.
        widths: those that the format can hold.
        left_out: the others, and why.
        dense_bytes: everything in the weight files that is not in the units, headers at most.
    """

    def __init__(self, decoder: Decoder, params: GridParams, widths: Sequence[int]) -> None:
        """Find the units; `bits` and `scheme` of params do not count.

        Raises `QuantizationError` when the format can hold none of the widths.
        """
        self._decoder, self._params = decoder, params
        self._grids: dict[int, dict[str, Grid]] = {}
        self.left_out: dict[int, str] = {}
        for bits in sorted(set(widths)):
            plan = BitPlan(linears={"*": Width(bits=bits)})
            self._grids[bits] = grids(decoder, params, plan)
            try:
                lint(decoder, self._grids[bits], params.format)
            except QuantizationError as error:
                self.left_out[bits] = str(error)
        self.widths = [bits for bits in self._grids if bits not in self.left_out]
        if not self.widths:
            raise QuantizationError(next(iter(self.left_out.values())))
        self.units = [self._unit(names) for names in units(decoder)]
        self.dense_bytes = self._dense_bytes()

    def quantize(self, weight: Tensor, gram: Tensor, bits: int) -> Codes:
        """A unit's weight (O, I) as GPTQ leaves it at `bits`; gram of its inputs (I, I).

        Without polish, which takes as long again to lower the error by a few percent.
        """
        damp = GptqParams().damp
        return gptq(weight, gram, self._grid(bits), damp=damp, act_order=True, polish=0)

    def nearest(self, weight: Tensor, energy: Tensor, bits: int) -> Codes:
        """A unit's weight (O, I) to nearest; `energy` (I,), the mean square of each input."""
        return rtn(weight, energy.diag(), self._grid(bits))

    def _grid(self, bits: int) -> Grid:
        return next(iter(self._grids[bits].values()))

    def plan(self, bits: Sequence[int], reason: str) -> BitPlan:
        """The plan that gives each unit its bits."""
        names: dict[int, list[str]] = {}
        for unit, each in zip(self.units, bits, strict=True):
            names.setdefault(each, []).extend(unit.names)
        size, symmetric = self._params.group_size, self._params.symmetric
        linears = {
            f"re:{pattern}": Width(bits=each, group_size=size, symmetric=symmetric)  # type: ignore[arg-type]
            for each in sorted(names)
            for pattern in patterns(names[each], self._decoder.blocks)
        }
        return BitPlan(linears=linears, reason=reason)

    def by_block(self, bits: Sequence[int]) -> dict[str, str]:
        """The bits that each unit gets as a map of the model, a digit a block."""
        named = {
            name: each for unit, each in zip(self.units, bits, strict=True) for name in unit.names
        }
        return widths_by_block(named, self._decoder.blocks)

    def _unit(self, names: tuple[str, ...]) -> Unit:
        blocks = self._decoder.blocks
        index = int(names[0].removeprefix(f"{blocks.prefix}.").partition(".")[0])
        linears = blocks.linears(index)
        shapes = {name: weight_of(linears[name]).shape for name in names}
        sizes = dict.fromkeys(self.widths, 0)
        for bits in self.widths:
            plan = self._grids[bits]
            layout = FORMATS[self._params.format].layout(plan)
            for name, (rows, columns) in shapes.items():
                grid = plan[name]
                groups = columns // grid.span(columns)
                parts = layout(grid)
                sizes[bits] += parts.size_bytes(rows, columns, groups, grid.dtype.itemsize)
        return Unit(index, names, sum(shape.numel() for shape in shapes.values()), sizes)

    def _dense_bytes(self) -> int:
        reader = self._decoder.reader
        checkpoint, names = reader.checkpoint, [name for unit in self.units for name in unit.names]
        packed = {reader.locate(f"{name}.weight") for name in names}
        plan = self._grids[self.widths[0]]
        layout = FORMATS[self._params.format].layout(plan)
        total = sum(len(layout(plan[name]).names) * (len(name) + _ENTRY) for name in names)
        for name in checkpoint.names:
            if name not in packed:
                count = math.prod(checkpoint.shape(name))
                total += count * checkpoint.stored_dtype(name).itemsize + len(name) + _ENTRY
        return total
