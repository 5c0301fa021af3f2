"""Streaming second moments of activations."""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """X X^T of inputs seen batch by batch, divided by the number of tokens at the end.

    Accumulates (I, I) in float32 on the activations' device. Any constant factor leaves
    GPTQ's result unchanged; the mean keeps numbers of order one.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        """Start empty for inputs of `features` channels."""
        self._sum = torch.zeros(features, features, device=device)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Add inputs (..., I)."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(x.T, x)
        self._count += len(x)

    @property
    def mean(self) -> Tensor:
        """(I, I): mean over tokens of x x^T."""
        return self._sum / max(1, self._count)
