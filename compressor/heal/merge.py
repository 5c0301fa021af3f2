"""Merging an adapter into the unquantized weights, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor import progress
from compressor.checkpoint import Checkpoint, CheckpointWriter, read_json

_PREFIX = "base_model.model."


def merge(source: Path, adapter: Path, out: Path) -> None:
    """Write `source` with W + (alpha / rank) B A for every adapted linear (arXiv:2106.09685).

    W, A (rank, I), B (O, rank) in float32, the sum stored in W's own dtype; a linear without
    a delta and every other tensor are carried bitwise. GPT-2's transposed weights get the
    transposed delta.
    """
    config = read_json(adapter / "adapter_config.json")
    weights = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    checkpoint = Checkpoint(source)
    with CheckpointWriter(out) as writer:
        for name in progress.track(checkpoint.names, "merge", len(checkpoint.names)):
            tensor = checkpoint.tensor(name)
            delta = _delta(weights, name.removesuffix(".weight"))
            if delta is not None:
                delta = (delta.T if config["fan_in_fan_out"] else delta) * scale
                merged = (tensor.float() + delta).to(tensor.dtype)
                tensor = torch.where(delta == 0, tensor, merged)
            writer.add(name, tensor)
        writer.finish(checkpoint.config, checkpoint.side_files)


def _delta(weights: dict[str, Tensor], module: str) -> Tensor | None:
    """B A of one linear, (O, I) float32; names on disk may lack the model's first component."""
    ends = (f"{_PREFIX}{module}.lora_A.weight", f".{module}.lora_A.weight")
    name = next((n for n in weights if n == ends[0] or n.endswith(ends[1])), None)
    if name is None:
        return None
    other = name.replace(".lora_A.", ".lora_B.")
    return weights[other].float() @ weights[name].float()
