"""HQQ: zero points from half-quadratic splitting, its defaults on axis 1; always asymmetric."""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from transformers import AutoModelForCausalLM

from peers.protocol import GROUP, peer


def quantize(folder: str, _: torch.Tensor, bits: int, symmetric: bool) -> Any:
    """The model with the linears of its blocks in integers; no text is read."""
    assert not symmetric, "HQQ has no symmetric grids"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in list(model.get_decoder().modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
                low = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
                setattr(module, name, low)
    return model


if __name__ == "__main__":
    peer(quantize)
