"""GPTQModel's GPTQ with its own defaults."""

from __future__ import annotations

from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from peers.protocol import GROUP, peer


def quantize(folder: str, tokens: torch.Tensor, bits: int, symmetric: bool) -> Any:
    """The quantized model."""
    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=symmetric, device="cpu")
    model = GPTQModel.load(folder, config, dtype=torch.float32)
    model.quantize([window.tolist() for window in tokens], batch_size=1, backend=BACKEND.TORCH)
    return model.model.float().eval()


if __name__ == "__main__":
    peer(quantize)
