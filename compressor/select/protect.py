"""What every selection checks: which blocks must stay and whether the budget fits."""

from __future__ import annotations

from collections.abc import Collection

from compressor.errors import SelectionError


def protected(num_blocks: int, protect: Collection[int]) -> set[int]:
    """Absolute indices of the protected blocks; raises `SelectionError` outside the model."""
    wrong = [i for i in protect if not -num_blocks <= i < num_blocks]
    if wrong:
        raise SelectionError(f"blocks {wrong} do not exist in a model of {num_blocks} blocks")
    return {i % num_blocks for i in protect}


def check_budget(n: int, num_blocks: int, kept: Collection[int]) -> None:
    """Raise `SelectionError` when n blocks cannot be removed beside those kept."""
    most = min(num_blocks - len(kept), num_blocks - 1)
    if n > most:
        raise SelectionError(
            f"n = {n} is more than the {most} blocks that can be removed from this model of "
            f"{num_blocks} blocks ({len(kept)} protected)"
        )
