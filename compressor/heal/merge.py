"""Merging an adapter into the unquantized weights, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor import progress
from compressor.checkpoint import Checkpoint, CheckpointWriter, read_json
from compressor.errors import HealingError

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merge(source: Path, adapter: Path, out: Path) -> None:
    """Write `source` with W + (alpha / rank) B A for every adapted linear (arXiv:2106.09685).

    W, A (rank, I), B (O, rank) in float32, the sum stored in W's own dtype; a linear without
    a delta and every other tensor are carried bitwise. GPT-2's transposed weights get the
    transposed delta. Raises `HealingError` when an adapted linear is not in `source`.
    """
    config = read_json(adapter / "adapter_config.json")
    weights = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    checkpoint = Checkpoint(source)
    adapted = _adapted(weights, checkpoint)
    with CheckpointWriter(out) as writer:
        for name in progress.track(checkpoint.names, "merge", len(checkpoint.names)):
            tensor = checkpoint.tensor(name)
            if name in adapted:
                a, b = weights[adapted[name] + _A], weights[adapted[name] + _B]
                delta = b.float() @ a.float()
                delta = (delta.T if config["fan_in_fan_out"] else delta) * scale
                merged = (tensor.float() + delta).to(tensor.dtype)
                tensor = torch.where(delta == 0, tensor, merged)
            writer.add(name, tensor)
        writer.finish(checkpoint.config, checkpoint.side_files)


def _adapted(weights: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """Adapter's path by the name on disk, which may lack the model's first component."""
    on_disk, found = set(checkpoint.names), {}
    for path in (name.removesuffix(_A) for name in weights if name.endswith(_A)):
        module = path.removeprefix(_PREFIX)
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        name = next((n for n in names if n in on_disk), None)
        if name is None:
            raise HealingError(
                f"{checkpoint.folder}: no tensor {names[0]} for the adapter of {module}; "
                "merge into the checkpoint that the adapter was trained on"
            )
        found[name] = path
    return found
