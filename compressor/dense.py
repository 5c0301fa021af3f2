"""Floating-point weights of any checkpoint, quantized or not, by module name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint import Checkpoint
from compressor.errors import CheckpointError
from compressor.families import RENAMED_ON_DISK
from compressor.layouts import Codes, Packed

PACKED = Packed.key


class DenseReader:
    """Reads weights as floats: stored ones as they are, packed integers de-quantized.

    Packed linears are those of compressed-tensors `pack-quantized` (`layouts`).
    Old checkpoints name tensors without the model's first path component
    (`h.0...` for `transformer.h.0...`); both are found.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the folder; raises `CheckpointError` for formats that are not read."""
        self.checkpoint = Checkpoint(folder)
        self.config: dict[str, Any] = self.checkpoint.config
        self._renamed = RENAMED_ON_DISK.get(self.config.get("model_type", ""), {})
        quantization = self.config.get("quantization_config")
        self.layouts = _layouts(self.checkpoint.folder, quantization) if quantization else []

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
        return self.codes(name).dequantize()

    def codes(self, name: str) -> Codes:
        """A packed weight in integers, as it is stored."""
        layout = self.layout(name)
        stem = (self.locate(name) or name).removesuffix("weight")
        return layout.read({n: self.checkpoint.tensor(stem + n) for n in layout.names})

    def layout(self, name: str) -> Packed:
        """How the weight of this name is packed; raises `CheckpointError` when nothing says so."""
        module = name.removesuffix(".weight")
        for targets, layout in self.layouts:
            if any(_matches(target, module) for target in targets):
                return layout
        raise CheckpointError(f"{module}: packed, but no group of quantization_config targets it")

    def locate(self, name: str) -> str | None:
        """The name under which a weight is stored, dense or packed; None when there is none."""
        for candidate in (self._renamed.get(name, name), name, name.partition(".")[2]):
            packed = candidate.removesuffix("weight") + PACKED
            if candidate in self.checkpoint or packed in self.checkpoint:
                return candidate
        return None


def _layouts(folder: Path, quantization: dict[str, Any]) -> list[tuple[list[str], Packed]]:
    method, form = quantization.get("quant_method"), quantization.get("format")
    if (method, form) != ("compressed-tensors", "pack-quantized"):
        raise CheckpointError(
            f"{folder}: quantization {method}/{form} is not read; start from the dense "
            "checkpoint, or one in compressed-tensors pack-quantized"
        )
    groups = [(g["targets"], g["weights"]) for g in quantization["config_groups"].values()]
    return [(t, Packed(w["num_bits"], w.get("symmetric", True))) for t, w in groups]


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear")
