"""Keeping blocks at even distances, for a target speed-up."""

from __future__ import annotations

from compressor.errors import SelectionError
from compressor.records import Scores, Selection
from compressor.select.protect import cut, free_units


def even(scores: Scores, *, n: int | None, speedup: float | None) -> Selection:
    """Keep K = floor(L / speedup) = L - n blocks: round(linspace(0, L-1, K)).

    The first and the last block stay. The authors' code takes every int(L / (K - 1))-th block,
    a stride that is 1 for every speed-up below 2 and then removes one contiguous run (L = 32,
    speed-up 4/3 keeps 0..22 and 31); it also bunches what the stride leaves over at the end
    (L = 30, speed-up 5 keeps 0, 6, 12, 18, 24, 29; here 0, 6, 12, 17, 23, 29).

    Raises `SelectionError` unless exactly one of n and speedup is given and fits. Source:
    Unified Layer Skipping (arXiv:2404.06954 section 3).
    """
    depth = scores.num_blocks
    if (n is None) == (speedup is None):
        raise SelectionError("even: give exactly one of n (blocks to remove) and speedup")
    removed = n if n is not None else depth - int(depth / (speedup or 1) + 1e-9)
    free_units(scores, removed, "block", ())
    if depth - removed == 1 < depth:
        raise SelectionError("even: the first and the last block stay, so one block is too few")
    steps = depth - removed - 1
    kept = {round(i * (depth - 1) / max(1, steps)) for i in range(steps + 1)}
    units = [("block", i) for i in range(depth) if i not in kept]
    return cut(depth, units, f"{depth - removed} blocks at even distances stay")
