"""Floating-point weights of any checkpoint, quantized or not, by module name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint import Checkpoint
from compressor.errors import CheckpointError
from compressor.families import RENAMED_ON_DISK, native_config
from compressor.layouts import Codes, Gptq, Packed

GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}
"""`checkpoint_format` of GPTQ files."""

_BY_COLUMN = ("group", "dynamic")
"""`actorder` of compressed-tensors with a group of its own for every input."""

Layouts = list[tuple[list[str], Packed | Gptq]]
"""Targets (a name, `re:` and a pattern, or `Linear` for all) and how those are stored."""


class DenseReader:
    """Reads weights as floats: stored ones as they are, packed integers de-quantized.

    Packed linears are those of compressed-tensors `pack-quantized` and of GPTQ (`layouts`).
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
        self.layouts = _layouts(self.checkpoint, quantization) if quantization else []

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
        try:
            with self.checkpoint.opened():
                return layout.read({n: self.checkpoint.tensor(stem + n) for n in layout.names})
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def layout(self, name: str) -> Packed | Gptq:
        """How the weight of this name is packed; raises `CheckpointError` when nothing says so."""
        module = name.removesuffix(".weight")
        for targets, layout in self.layouts:
            if any(_matches(target, module) for target in targets):
                return layout
        raise CheckpointError(f"{module}: packed, but no group of quantization_config targets it")

    def locate(self, name: str) -> str | None:
        """The name under which a weight is stored, dense or packed; None when there is none."""
        for candidate in (self._renamed.get(name, name), name, name.partition(".")[2]):
            stem = candidate.removesuffix("weight")
            keys = (Packed.key, Gptq.key)
            if candidate in self.checkpoint or any(stem + k in self.checkpoint for k in keys):
                return candidate
        return None


def _layouts(checkpoint: Checkpoint, quantization: dict[str, Any]) -> Layouts:
    method, form = quantization.get("quant_method"), quantization.get("format")
    if (method, form) == ("compressed-tensors", "pack-quantized"):
        groups = [(g["targets"], g["weights"]) for g in quantization["config_groups"].values()]
        ordered = any(w.get("actorder") in _BY_COLUMN for _, w in groups)
        if ordered or any(name.endswith(".weight_g_idx") for name in checkpoint.names):
            raise CheckpointError(
                f"{checkpoint.folder}: its weight_g_idx reorders the inputs (actorder: group), "
                "which is not read; quantize again with actorder: static"
            )
        return [(t, Packed(w["num_bits"], w.get("symmetric", True))) for t, w in groups]
    form = quantization.get("checkpoint_format", form) or "gptq"
    if method == "gptq" and form in GPTQ_VERSIONS:
        rules: dict[str, dict[str, Any]] = quantization.get("dynamic") or {}
        widths = [(f"re:{rule.removeprefix('+:')}", own.get("bits")) for rule, own in rules.items()]
        widths.append(("Linear", None))
        default, version = quantization["bits"], GPTQ_VERSIONS[form]
        return [([target], Gptq(bits or default, version)) for target, bits in widths]
    raise CheckpointError(
        f"{checkpoint.folder}: quantization {method}/{form} is not read; start from the dense "
        "checkpoint, or one in compressed-tensors pack-quantized or GPTQ"
    )


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear")
