"""GPTQModel's GPTQ with its own defaults, saved and loaded again as its users would."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from peers.protocol import GROUP, peer


def quantize(folder: str, tokens: torch.Tensor, bits: int, symmetric: bool) -> Any:
    """The quantized model, which computes in what its scales are stored in."""
    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=symmetric, device="cpu")
    model = GPTQModel.load(folder, config, dtype=torch.float32)
    model.quantize([window.tolist() for window in tokens], batch_size=1, backend=BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        del model
        return GPTQModel.load(saved, backend=BACKEND.TORCH, device="cpu").model.eval()


if __name__ == "__main__":
    peer(quantize)
