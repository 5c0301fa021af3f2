"""The checkpoint's own integers, moved into the layout of `com.microsoft.MatMulNBits`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ExportError
from compressor.layouts import Codes
from compressor.runtimes.session import load_onnxruntime

log = logging.getLogger(__name__)

CONTAINER = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Width of the operator that holds integers of each width."""

SINCE = {2: (1, 24), 4: (1, 23), 8: (1, 23)}
"""First onnxruntime whose CPU kernels multiply integers of each width (measured, 1.20 to 1.32)."""

_LARGEST = 256
_BLOCKS = (128, 64, 32, 16)
_ROWS = 4096  # of a head rounded at once: a vocabulary in float32, several times over, is large


@dataclass(frozen=True)
class NBits:
    """One matrix (N, K) of the operator, y = x W^T with w = (u - z) s.

    Attributes:
        b: u uint8 (N, blocks, block * bits / 8), a little-endian bit stream along K.
        scales: s (N, blocks), in the checkpoint's dtype.
        zero_points: z uint8 (N, ceil(blocks * bits / 8)), or None for 2^(bits - 1).
        k, bits, block: inputs, container width, inputs per scale.
        nominal_bytes: what integers, scales and zero points take at their own width.
    """

    b: Tensor
    scales: Tensor
    zero_points: Tensor | None
    k: int
    bits: int
    block: int
    nominal_bytes: float

    @property
    def form(self) -> tuple[int, int, int, bool]:
        """What two matrices must share to be stacked."""
        return self.k, self.bits, self.block, self.zero_points is None

    @property
    def container_bytes(self) -> int:
        """What is stored."""
        zero = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.b.nbytes + self.scales.nbytes + zero


def pack(codes: Codes, bits: int, where: str = "") -> NBits:
    """The operator's layout of `codes` of `bits` bits.

    Signed integers are the same in every width: u = q + 2^(c-1), z_u = z + 2^(c-1) in a
    container of c bits. Groups that are no block of the operator are cut into blocks that
    repeat their scale. Raises `ExportError` where no block fits.
    """
    container, (rows, k) = CONTAINER[bits], codes.integers.shape
    span = k // codes.scale.shape[1]
    block = block_size(span, k, where)
    blocks, half = -(-k // block), 1 << container - 1
    integers = torch.nn.functional.pad(codes.integers, (0, blocks * block - k))
    u = (integers.to(torch.int16) + half).to(torch.uint8).view(rows, blocks, block)
    repeats = -(-span // block)
    zero = codes.zero_point
    zero_points = None
    if zero is not None:
        z = (zero.to(torch.int16) + half).to(torch.uint8).repeat_interleave(repeats, 1)
        per = 8 // container
        zero_points = bit_stream(torch.nn.functional.pad(z, (0, -z.shape[1] % per)), container)
    nominal = (rows * k + (0 if zero is None else zero.numel())) * bits / 8 + codes.scale.nbytes
    scales = codes.scale.repeat_interleave(repeats, 1)
    return NBits(bit_stream(u, container), scales, zero_points, k, container, block, nominal)


def stack(parts: list[NBits]) -> NBits:
    """One matrix of several that share their form, outputs one below the other."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    first = parts[0]
    return NBits(
        torch.cat([part.b for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        first.k,
        first.bits,
        first.block,
        sum(part.nominal_bytes for part in parts),
    )


def block_size(span: int, k: int, where: str = "") -> int:
    """Inputs per block of the operator for groups of `span` inputs of a matrix of `k`.

    A power of two from 16; one that divides the group where the group is none itself.
    Raises `ExportError` when there is none.
    """
    if 16 <= span <= _LARGEST and span & (span - 1) == 0:
        return span
    fits = [block for block in _BLOCKS if span % block == 0]
    if not fits and span < k:
        raise ExportError(
            f"{where}: groups of {span} inputs; MatMulNBits takes multiples of 16: quantize "
            "again with group_size 16, 32, 64 or 128, or set export.formats to [safetensors]"
        )
    return fits[0] if fits else _BLOCKS[-1]


def bit_stream(values: Tensor, bits: int) -> Tensor:
    """uint8 values below 2^bits packed along the last axis, low bits first."""
    per = 8 // bits
    stream, *rest = values.unflatten(-1, (-1, per)).unbind(-1)
    for place, part in enumerate(rest, 1):
        stream = stream | part << place * bits
    return stream.contiguous()


def round_to_nearest(weight: Tensor, bits: int, block: int = 32) -> Codes:
    """A new rounding, for embeddings and heads that no quantizer has seen.

    Symmetric; the largest weight of each block of inputs, with its sign, is -2^(b-1) s.
    """
    parts = [_rounded(rows, bits, block) for rows in weight.split(_ROWS)]
    integers, scales = zip(*parts, strict=True)
    return Codes(torch.cat(integers), torch.cat(scales), None)


def _rounded(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Integers (N, K) and scales (N, blocks) of some rows."""
    width = weight.shape[1]
    groups = weight.float().unflatten(1, (-1, block if width % block == 0 else width))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = extreme / -(1 << bits - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    levels = (groups / scale).round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)
    return levels.flatten(1).to(torch.int8), scale.squeeze(-1)


def check_widths(containers: set[int], accuracy_level: int) -> None:
    """Raises `ExportError` where the installed onnxruntime is too old for a width.

    Warns of widths that its CPU kernels do not multiply at the level but unpack every time.
    """
    version: str = load_onnxruntime().__version__
    found = tuple(map(int, version.split(".")[:2]))
    for bits in sorted(containers):
        if found < SINCE[bits]:
            needed = ".".join(map(str, SINCE[bits]))
            raise ExportError(
                f"{bits}-bit integers need onnxruntime {needed}, here is {version}; "
                f"run: pip install -U 'onnxruntime>={needed}', or set export.formats to "
                "[safetensors]"
            )
    unpacked = sorted(containers - {4})
    if unpacked and not accuracy_level:
        log.warning(
            "%s-bit integers at accuracy_level 0: on the CPU every product unpacks them first, "
            "many times slower than at 4; set export.accuracy_level to 4",
            " and ".join(map(str, unpacked)),
        )
