"""What every method starts from: each unit quantized at each width, and what that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.layouts import Codes
from compressor.records import Scores
from compressor.units import Unit

Costs = list[dict[int, float]]
"""Per unit, what each width costs."""

Rounding = Callable[[Tensor, Tensor, int], Codes]
"""A weight (O, I) in codes of some bits, given what is known of its inputs."""


@dataclass(frozen=True)
class Probe:
    """What a method may ask of the model.

    Attributes:
        tokens: calibration windows (N, T).
        units: what gets a width.
        widths: bits they may get.
        quantize: codes of a weight (O, I) with the care of the final quantizer, from the gram of
            its inputs (I, I) and bits.
        nearest: the same by rounding to nearest, from the mean square of each input (I,) and bits.
        scores: of the score stage before; None without one.
        batch_size: windows that go through the model together.
        energies: mean square of each input (I,) of the units measured so far, by first linear.
    """

    decoder: Decoder
    tokens: Tensor
    units: Sequence[Unit]
    widths: Sequence[int]
    quantize: Rounding
    nearest: Rounding
    scores: Scores | None = None
    batch_size: int = 4
    energies: dict[str, Tensor] = field(default_factory=dict)

    def linears(self, unit: Unit) -> dict[str, nn.Module]:
        """The linears of a unit by full name, with weights while their block is resident."""
        every = self.decoder.blocks.linears(unit.block)
        return {name: every[name] for name in unit.names}

    def of_block(self, index: int) -> dict[int, Unit]:
        """The units of a block by their place among all."""
        return {i: unit for i, unit in enumerate(self.units) if unit.block == index}

    def differences(self, unit: Unit, gram: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (bits, W - Q) for every width, (O, I) float32; gram: mean of x x^T (I, I).

        Raises `QuantizationError` naming the unit when it cannot be quantized.
        """
        weight = stacked(self.linears(unit))
        self.energies[unit.names[0]] = gram.diagonal().clone()
        for bits in self.widths:
            try:
                codes = self.quantize(weight, gram, bits)
            except QuantizationError as error:
                raise QuantizationError(f"{unit.names[0]}: {error}") from error
            yield bits, weight - codes.dequantize()

    def round(self, unit: Unit, weight: Tensor, bits: int) -> Codes:
        """A measured unit's weight (O, I) to nearest, its scales weighted by its inputs."""
        return self.nearest(weight, self.energies[unit.names[0]], bits)


def stacked(linears: dict[str, nn.Module]) -> Tensor:
    """The weights of a unit's linears one above the other, (O, I) float32."""
    return torch.cat([weight_of(linear).detach() for linear in linears.values()]).float()
