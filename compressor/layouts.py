"""How a file holds a matrix of integers: two layouts, each written and read back bit by bit.

Both are one little-endian bit stream of u = q + 2^(b-1), element k in bits k b .. k b + b - 1,
along the inputs; they differ in which axis comes first and in what stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from compressor.errors import CheckpointError

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

    def size_bytes(self, rows: int, columns: int, groups: int, scale_bytes: int) -> int:
        """What the tensors of a linear (rows, columns) take, with scales of `scale_bytes`."""
        words = rows * math.ceil(columns * self.bits / 32)
        if not self.symmetric:
            words += math.ceil(rows * self.bits / 32) * groups
        return 4 * words + rows * groups * scale_bytes + 16

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
        """The codes that `tensors` hold; raises `CheckpointError` for words of another packing."""
        scale, shape = tensors["weight_scale"], torch.Size(tensors["weight_shape"].tolist())
        self._check(self.key, tensors, (shape[0], math.ceil(shape[1] * self.bits / 32)))
        integers = unpack_from_int32(tensors[self.key], self.bits, shape)
        zero_point = None
        if not self.symmetric:
            packed = tensors["weight_zero_point"]
            words = math.ceil(scale.shape[0] * self.bits / 32)
            self._check("weight_zero_point", tensors, (words, scale.shape[1]))
            zero_point = unpack_from_int32(packed, self.bits, scale.shape, packed_dim=0)
        return Codes(integers, scale, zero_point)

    def _check(self, name: str, tensors: Tensors, shape: tuple[int, int]) -> None:
        if (got := tuple(tensors[name].shape)) != shape:
            raise CheckpointError(
                f"its {name} is {got}, expected {shape} for {self.bits} bits; compressed-tensors "
                "before 0.18 packed 3, 5 and 6 bits otherwise: quantize again with a later one"
            )


@dataclass(frozen=True)
class Gptq:
    """GPTQ, of a linear (O, I) in G groups, for widths that divide 32.

    `qweight` int32 (I b / 32, O), packed along the inputs; `scales` float16 (G, O); `qzeros`
    int32 (G, O b / 32), z + 2^(b-1) packed along the outputs, less 1 in version 1;
    `g_idx` int32 (I,), the group of each input.
    """

    bits: int
    version: int

    key = "qweight"
    """What tells that a linear is stored so."""

    names = (key, "qzeros", "scales", "g_idx")
    """The tensors of a linear."""

    def size_bytes(self, rows: int, columns: int, groups: int, scale_bytes: int) -> int:
        """What the tensors of a linear (rows, columns) take, with scales of `scale_bytes`."""
        words = rows * (columns + groups) * self.bits // 32 + columns
        return 4 * words + rows * groups * scale_bytes

    def write(self, codes: Codes) -> Tensors:
        """The tensors that hold `codes`; in version 1 no zero point may be the lowest integer.

        Readers disagree there: some take 1 off a code with the carry, some without.
        """
        columns, groups = codes.integers.shape[1], codes.scale.shape[1]
        zero = codes.zero_point
        zero = torch.zeros_like(codes.scale, dtype=torch.int8) if zero is None else zero
        return {
            self.key: pack_to_int32(codes.integers, self.bits).T.contiguous(),
            "qzeros": pack_to_int32(zero.T - self._less, self.bits),
            "scales": codes.scale.T.contiguous(),
            "g_idx": (torch.arange(columns) // (columns // groups)).int(),
        }

    def read(self, tensors: Tensors) -> Codes:
        """The codes that `tensors` hold; raises `CheckpointError` for a column order."""
        scale, group = tensors["scales"].T, tensors["g_idx"]
        shape = torch.Size((scale.shape[0], len(group)))
        if not torch.equal(group, torch.arange(shape[1]) // (shape[1] // scale.shape[1])):
            raise CheckpointError("its g_idx reorders the inputs (desc_act), which is not read")
        integers = unpack_from_int32(tensors[self.key].T.contiguous(), self.bits, shape)
        zero = unpack_from_int32(tensors["qzeros"], self.bits, scale.T.shape) + self._less
        return Codes(integers, scale.contiguous(), zero.T.contiguous())

    @property
    def _less(self) -> int:
        return 2 - self.version
