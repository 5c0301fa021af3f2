"""Merging an adapter into the unquantized weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.checkpoint import read_json
from compressor.dense import DenseReader
from compressor.errors import HealingError
from compressor.heal.write import rewrite

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merge(source: Path, adapter: Path, out: Path) -> None:
    """Write `source` with W + (alpha / rank) B A for every adapted linear (arXiv:2106.09685).

    W, A (rank, I), B (O, rank) in float32, the sum stored in W's own dtype; a linear without
    a delta and every other tensor are carried bitwise. GPT-2's transposed weights get the
    transposed delta. Raises `HealingError` when an adapted linear is not in `source`.
    """
    config = read_json(adapter / "adapter_config.json")
    weights = load_file(adapter / "adapter_model.safetensors")
    reader = DenseReader(source)
    scale, transposed = config["lora_alpha"] / config["r"], config["fan_in_fan_out"]
    changes = {}
    for path in (name.removesuffix(_A) for name in weights if name.endswith(_A)):
        module = path.removeprefix(_PREFIX)
        name = reader.locate(f"{module}.weight")
        if name is None:
            raise HealingError(
                f"{source}: no tensor {module}.weight for the adapter of {module}; "
                "merge into the checkpoint that the adapter was trained on"
            )
        changes[name] = _plus(weights[path + _A], weights[path + _B], scale, transposed)
    rewrite(source, out, changes)


def _plus(a: Tensor, b: Tensor, scale: float, transposed: bool) -> Callable[[Tensor], Tensor]:
    def merged(weight: Tensor) -> Tensor:
        delta = b.float() @ a.float()
        delta = (delta.T if transposed else delta) * scale
        return torch.where(delta == 0, weight, (weight.float() + delta).to(weight.dtype))

    return merged
