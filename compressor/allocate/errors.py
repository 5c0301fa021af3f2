"""What every method starts from: each unit quantized at each width, and what that does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import CompressError, QuantizationError
from compressor.moments import Gram
from compressor.records import Scores
from compressor.units import Unit

Costs = list[dict[int, float]]
"""Per unit, what each width costs."""


@dataclass(frozen=True)
class Probe:
    """What a method may ask of the model.

    Attributes:
        tokens: calibration windows (N, T).
        units: what gets a width.
        widths: bits they may get.
        quantize: from a weight (O, I), the gram of its inputs (I, I) and bits to the weight (O, I)
            as it will be read back.
        scores: of the score stage before; None without one.
        batch_size: windows that go through the model together.
    """

    decoder: Decoder
    tokens: Tensor
    units: Sequence[Unit]
    widths: Sequence[int]
    quantize: Callable[[Tensor, Tensor, int], Tensor]
    scores: Scores | None = None
    batch_size: int = 4

    def linears(self, unit: Unit) -> dict[str, nn.Module]:
        """The linears of a unit by full name, with weights while their block is resident."""
        every = self.decoder.blocks.linears(unit.block)
        return {name: every[name] for name in unit.names}

    def of_block(self, index: int) -> dict[int, Unit]:
        """The units of a block by their place among all."""
        return {i: unit for i, unit in enumerate(self.units) if unit.block == index}

    def row_errors(self, unit: Unit, gram: Tensor) -> dict[int, Tensor]:
        """Per width, mean square error of each output: e_i = D_i H D_i^T, D = W - Q, (O,) float64.

        gram H: mean of x x^T of the unit's inputs (I, I). Raises `QuantizationError` naming the
        unit when it cannot be quantized, `CompressError` when its inputs are not finite.
        """
        if not torch.isfinite(gram).all():
            raise CompressError(
                f"{unit.names[0]}: its inputs hold NaN or infinity; compute in float32"
            )
        weight = stacked(self.linears(unit))
        found = {}
        for bits in self.widths:
            try:
                off = weight - self.quantize(weight, gram, bits)
            except QuantizationError as error:
                raise QuantizationError(f"{unit.names[0]}: {error}") from error
            found[bits] = energy(off, gram)
        return found


class Grams:
    """The gram of what each unit of a block reads, batch by batch."""

    def __init__(self) -> None:
        """Start empty."""
        self._grams: dict[str, Gram] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add inputs (..., I) of the unit whose first linear is `name`."""
        if name not in self._grams:
            self._grams[name] = Gram(x.shape[-1], x.device)
        self._grams[name].add(x.detach())

    def mean(self, unit: Unit) -> Tensor:
        """H of a unit, (I, I)."""
        return self._grams[unit.names[0]].mean


def stacked(linears: dict[str, nn.Module]) -> Tensor:
    """The weights of a unit's linears one above the other, (O, I) float32."""
    return torch.cat([weight_of(linear).detach() for linear in linears.values()]).float()


def energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Mean square of each output of weight (O, I) on inputs of gram (I, I): (O,) float64."""
    return ((weight @ gram) * weight).sum(1, dtype=torch.float64).clamp(min=0)
