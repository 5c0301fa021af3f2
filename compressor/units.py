"""What bits are spent on: linears that must share a width, and what each width takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Linears that servers load as one matrix, so that they have one width.

    Attributes:
        block: index of their block.
        names: their full names, in the order they run; all read the same tensor.
        weights: how many weights they have together.
        sizes: bytes of their codes, scales and zero points in the file, by bits per weight.
    """

    block: int
    names: tuple[str, ...]
    weights: int
    sizes: Mapping[int, int]
