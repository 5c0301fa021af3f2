"""How a file holds a matrix of integers, written and read back bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of one linear, by the last part of their names."""


@dataclass(frozen=True)
class Codes:
    """A matrix in integers, w = (q - z) s.

    Attributes:
        integers: q (O, I) int8, signed.
        scale: s (O, groups), as stored.
        zero_point: z (O, groups) int8, signed as the integers are; None where it is 0.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self) -> Tensor:
        """w (O, I) float32, which holds the product of 8 bits and a half exactly."""
        levels = self.integers.float().unflatten(1, (self.scale.shape[1], -1))
        if self.zero_point is not None:
            levels -= self.zero_point.float().unsqueeze(-1)
        return (levels * self.scale.float().unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Packed:
    """compressed-tensors `pack-quantized`, of a linear (O, I) in G groups.

    `weight_packed` int32 (O, ceil(I b / 32)); `weight_scale` (O, G); `weight_shape` int64 (2,);
    on asymmetric grids `weight_zero_point` int32 (ceil(O b / 32), G), z + 2^(b-1) packed
    along the outputs.
    """

    bits: int
    symmetric: bool

    key = "weight_packed"
    """What tells that a linear is stored so."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of a linear."""
        names = (self.key, "weight_scale", "weight_shape")
        return names if self.symmetric else (*names, "weight_zero_point")

    def write(self, codes: Codes) -> Tensors:
        """The tensors that hold `codes`."""
        tensors = {
            self.key: pack_to_int32(codes.integers, self.bits),
            "weight_scale": codes.scale,
            "weight_shape": torch.tensor(codes.integers.shape),
        }
        if codes.zero_point is not None:
            tensors["weight_zero_point"] = pack_to_int32(codes.zero_point, self.bits, packed_dim=0)
        return tensors

    def read(self, tensors: Tensors) -> Codes:
        """The codes that `tensors` hold."""
        scale, shape = tensors["weight_scale"], torch.Size(tensors["weight_shape"].tolist())
        integers = unpack_from_int32(tensors[self.key], self.bits, shape)
        zero_point = None
        if not self.symmetric:
            packed = tensors["weight_zero_point"]
            zero_point = unpack_from_int32(packed, self.bits, scale.shape, packed_dim=0)
        return Codes(integers, scale, zero_point)
