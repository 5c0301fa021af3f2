"""Floating-point weights of any checkpoint, quantized or not, by module name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

from compressor.checkpoint import Checkpoint
from compressor.errors import CheckpointError
from compressor.families import RENAMED_ON_DISK, native_config

PACKED = "weight_packed"


class DenseReader:
    """Reads weights as floats: stored ones as they are, packed integers de-quantized.

    A packed linear holds u = q + 2^(b-1) as a bit stream along its inputs and one
    scale per group: w = q * s (compressed-tensors `pack-quantized`, symmetric).
    Old checkpoints name tensors without the model's first path component
    (`h.0...` for `transformer.h.0...`); both are found.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the folder; raises `CheckpointError` for formats that are not read."""
        self.checkpoint = Checkpoint(folder)
        self.config: dict[str, Any] = self.checkpoint.config
        family = native_config(self.config).get("model_type", "")
        self._renamed = RENAMED_ON_DISK.get(family, {})
        quantization = self.config.get("quantization_config")
        self._groups = _weight_groups(self.checkpoint.folder, quantization) if quantization else []

    def has(self, name: str) -> bool:
        """Whether a weight of this name can be read."""
        return self.locate(name) is not None

    def read(self, name: str) -> Tensor:
        """Return a weight in the dtype it is stored in, a packed one exactly, in float32."""
        stored = self.locate(name)
        if stored is None:
            raise CheckpointError(f"{self.checkpoint.folder}: no weight for {name!r}")
        if stored in self.checkpoint:
            return self.checkpoint.tensor(stored)
        return self._unpack(
            stored.removesuffix(".weight"), self._bits(name.removesuffix(".weight"))
        )

    def locate(self, name: str) -> str | None:
        """The name under which a weight is stored, dense or packed; None when there is none."""
        for candidate in (self._renamed.get(name, name), name, name.partition(".")[2]):
            packed = candidate.removesuffix("weight") + PACKED
            if candidate in self.checkpoint or packed in self.checkpoint:
                return candidate
        return None

    def _unpack(self, module: str, bits: int) -> Tensor:
        packed = self.checkpoint.tensor(f"{module}.{PACKED}")
        shape = torch.Size(self.checkpoint.tensor(f"{module}.weight_shape").tolist())
        scale = self.checkpoint.tensor(f"{module}.weight_scale")
        if f"{module}.weight_zero_point" in self.checkpoint:
            raise CheckpointError(f"{module}: asymmetric pack-quantized weights are not read")
        integers = unpack_from_int32(packed, bits, shape)
        group = shape[1] // scale.shape[1]
        weight = integers.view(shape[0], -1, group).float() * scale.float().unsqueeze(-1)
        return weight.view(shape)

    def _bits(self, module: str) -> int:
        for targets, bits in self._groups:
            if any(_matches(target, module) for target in targets):
                return bits
        raise CheckpointError(f"{module}: packed, but no group of quantization_config targets it")


def _weight_groups(folder: Path, quantization: dict[str, Any]) -> list[tuple[list[str], int]]:
    method, form = quantization.get("quant_method"), quantization.get("format")
    if (method, form) != ("compressed-tensors", "pack-quantized"):
        raise CheckpointError(
            f"{folder}: quantization {method}/{form} is not read; start from the dense "
            "checkpoint, or one in compressed-tensors pack-quantized"
        )
    groups = quantization["config_groups"].values()
    return [(group["targets"], int(group["weights"]["num_bits"])) for group in groups]


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear")
