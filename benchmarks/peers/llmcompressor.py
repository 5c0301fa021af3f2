"""llm-compressor's GPTQ with its own defaults (damp 0.01, static activation order)."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from peers.protocol import GROUP, peer


def quantize(folder: str, tokens: torch.Tensor, bits: int, symmetric: bool) -> Any:
    """The model with every linear but the head on its grid."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    rows: Any = [{"input_ids": window[None]} for window in tokens]
    oneshot(model=model, dataset=DataLoader(rows, batch_size=None), recipe=recipe)
    return model.eval()


if __name__ == "__main__":
    peer(quantize)
