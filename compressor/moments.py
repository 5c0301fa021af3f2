"""Streaming second moments of activations."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 144  # channels whose products with themselves and all later ones are taken at once
_TOKENS = 1024  # that are in float32 at once


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
        for part in x.reshape(-1, x.shape[-1]).split(_TOKENS):
            part = part.float()
            for start in range(0, part.shape[1], _STRIP):
                strip = slice(start, start + _STRIP)
                self._sum[strip, start:].addmm_(part[:, strip].T, part[:, start:])
            self._count += len(part)

    @property
    def mean(self) -> Tensor:
        """(I, I): mean over tokens of x x^T."""
        mean = self._sum / max(1, self._count)
        for start in range(0, len(mean), _STRIP):
            stop = start + _STRIP
            own = mean[start:stop, start:stop]
            own.copy_(own.triu().add_(own.triu(1).T))
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean


class Cross:
    """D X^T of what one stream lacks beside another and what it reads, as a mean over tokens.

    Accumulates (O, I) in float32; products are taken in float32, or in the autocast's dtype.
    """

    def __init__(self, rows: int, features: int, device: torch.device) -> None:
        """Start empty for d of `rows` and x of `features` channels."""
        self._sum = torch.zeros(rows, features, device=device)
        self._count = 0

    def add(self, lacking: Tensor, x: Tensor) -> None:
        """Add the same tokens' d (..., O) and x (..., I)."""
        lacking, x = (each.reshape(-1, each.shape[-1]).float() for each in (lacking, x))
        self._sum += lacking.T @ x
        self._count += len(x)

    @property
    def mean(self) -> Tensor:
        """(O, I): mean over tokens of d x^T."""
        return self._sum / max(1, self._count)


def energies(weight: Tensor, gram: Tensor) -> Tensor:
    """w H w^T of each row w (I,) of weight (O, I), for a symmetric H (I, I) of which half is read.

    (O,), at least 0, in the dtype of the weight; products are taken in that of the autocast.
    """
    total = weight.new_zeros(len(weight))
    for start in range(0, len(gram), _STRIP):
        strip, rest = slice(start, start + _STRIP), slice(start + _STRIP, None)
        own = weight[:, strip]
        total += (own @ gram[strip, strip]).to(own.dtype).mul_(own).sum(1)
        total += 2 * (own @ gram[strip, rest]).to(own.dtype).mul_(weight[:, rest]).sum(1)
    return total.clamp_(min=0)
