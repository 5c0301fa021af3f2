"""Streaming second moments of activations."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 256  # channels whose products with themselves and all later ones are taken at once


class Gram:
    """X X^T of inputs seen batch by batch, divided by the number of tokens at the end.

    Accumulates (I, I) in float32 on the activations' device; only the half above the diagonal
    is computed. Any constant factor leaves GPTQ's result unchanged; the mean keeps numbers of
    order one.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        """Start empty for inputs of `features` channels."""
        self._sum = torch.zeros(features, features, device=device)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Add inputs (..., I)."""
        x = x.reshape(-1, x.shape[-1]).float()
        for start in range(0, x.shape[1], _STRIP):
            strip = slice(start, start + _STRIP)
            self._sum[strip, start:].addmm_(x[:, strip].T, x[:, start:])
        self._count += len(x)

    @property
    def mean(self) -> Tensor:
        """(I, I): mean over tokens of x x^T."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T) / max(1, self._count)


class Cross:
    """(Y - Y') X'^T for y of one stream, y' and x' of another, as a mean over tokens.

    The difference is formed in float32 before it is multiplied: streams that are equal give
    exact zeros.
    """

    def __init__(self, features: int, device: torch.device, rows: int | None = None) -> None:
        """Start empty for x' of `features` channels and y of `rows`, by default as many."""
        self._sum = torch.zeros(rows or features, features, device=device)
        self._count = 0

    def add(self, y: Tensor, other: Tensor, x: Tensor | None = None) -> None:
        """Add the same tokens' y and y' (..., O), and x' (..., I), which is y' unless given."""
        y, other = (each.reshape(-1, each.shape[-1]).float() for each in (y, other))
        x = other if x is None else x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_((y - other).T, x)
        self._count += len(y)

    @property
    def mean(self) -> Tensor:
        """(O, I): mean over tokens of (y - y') x'^T."""
        return self._sum / max(1, self._count)
