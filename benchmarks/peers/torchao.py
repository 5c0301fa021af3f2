"""torchao's weight-only integers: round to nearest between minimum and maximum."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType
from transformers import AutoModelForCausalLM

from peers.protocol import GROUP, peer


def quantize(folder: str, _: torch.Tensor, bits: int, symmetric: bool) -> Any:
    """The model with the linears of its blocks in integers; no text is read."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = IntxWeightOnlyConfig(
        getattr(torch, f"int{bits}"),
        PerGroup(GROUP),
        MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
    )
    quantize_(model.get_decoder(), config)
    return model


if __name__ == "__main__":
    peer(quantize)
