"""Removing neighbours: the paper's argmin and its simple heuristic."""

from __future__ import annotations

from compressor.errors import SelectionError
from compressor.records import Scores, Selection
from compressor.select.protect import free_units, protected


def contiguous(scores: Scores, *, n: int, protect: tuple[int, ...]) -> Selection:
    """Remove blocks l*..l*+n-1 with l* = argmin over l of d(l, n) (arXiv:2403.17887 eq. 7).

    Runs that touch a protected block are passed over; of equal distances the first wins.
    Raises `SelectionError` when no run is left or the scores hold no distances.
    """
    kept = protected(scores.num_blocks, protect)
    free_units(n, scores.num_blocks, "block", kept)
    if n == 0:
        return Selection(num_blocks=scores.num_blocks, drop_blocks=[], reason="nothing to remove")
    if not scores.distances:
        raise SelectionError(
            "contiguous selection needs angular distances; add angular_distance to the score stage"
        )
    row = scores.distances[n - 1]
    runs = {l: range(l, l + n) for l in range(len(row)) if not kept & set(range(l, l + n))}
    if not runs:
        raise SelectionError(
            f"no {n} neighbouring blocks are free of the protected blocks {sorted(kept)}; "
            "protect fewer or remove fewer"
        )
    start = min(runs, key=lambda l: row[l])
    return Selection(
        num_blocks=scores.num_blocks,
        drop_blocks=list(runs[start]),
        reason=f"least angular distance across {n} blocks: d({start}, {n}) = {row[start]:.4f}",
    )


def simple(scores: Scores, *, n: int) -> Selection:
    """Remove blocks L-1-n..L-2: the deepest n but the last (arXiv:2403.17887 section 4.4)."""
    last = scores.num_blocks - 1
    free_units(n, scores.num_blocks, "block", {last})
    return Selection(
        num_blocks=scores.num_blocks,
        drop_blocks=list(range(last - n, last)),
        reason=f"the deepest {n} blocks but the last",
    )
