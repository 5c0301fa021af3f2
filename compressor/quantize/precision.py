"""What the activations are multiplied in while a model is quantized."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from compressor.quantize import Forwards

MOST_BITS = 4
"""Above it `auto` is float32: there the rounding of bfloat16 is no longer small
beside that of the weights."""


def products_in(asked: Forwards, device: torch.device, bits: int) -> AbstractContextManager[None]:
    """Matrix products in bfloat16, or as their inputs are, for the length of a `with` block.

    `auto` means bfloat16 on a processor with instructions for it (avx512_bf16, twice as quick),
    when no weight is to have more than `MOST_BITS`, `bits` being the widest.
    Products are summed in float32; norms and the residual stream stay in float32, and so does
    what is done in place. Nothing that is solved for may run under it: see `exactly`.
    """
    quick = device.type == "cpu" and bits <= MOST_BITS and has_bfloat16()
    half = asked == "bfloat16" or (asked == "auto" and quick)
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Products as their inputs are again, inside `products_in`."""
    return torch.autocast(device.type, enabled=False)


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 quicker than float32; no where torch can't say."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return bool(capabilities.get("avx512_bf16", False))
