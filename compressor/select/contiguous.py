"""Removing neighbours: the paper's argmin and its simple heuristic."""

from __future__ import annotations

from compressor.errors import SelectionError
from compressor.records import Scores, Selection
from compressor.select.protect import free_units, protected

ANGULAR = "angular_distance"


def contiguous(
    scores: Scores, *, n: int, protect: tuple[int, ...], score: str = ANGULAR
) -> Selection:
    """Remove blocks l*..l*+n-1 with l* = argmin over l of d(l, n) (arXiv:2403.17887 eq. 7).

    By any other score, l* has the least sum of saliencies over its n blocks. Runs that touch a
    protected block are passed over; of equal runs the first wins.
    Raises `SelectionError` when no run is left or the score was not computed.
    """
    kept = protected(scores.num_blocks, protect)
    free_units(scores, n, "block", kept)
    if n == 0:
        return Selection(num_blocks=scores.num_blocks, drop_blocks=[], reason="nothing to remove")
    row = _costs(scores, n, score)
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
        reason=f"least {score} across {n} blocks: {row[start]:.4f} from block {start}",
    )


def _costs(scores: Scores, n: int, score: str) -> list[float]:
    """What removing the n blocks from l on costs by a score, for l = 0..L-n."""
    if score == ANGULAR and scores.distances:
        return scores.distances[n - 1]
    if score not in scores.block or score == ANGULAR:
        raise SelectionError(f"block: no score {score!r}; add {score} to the score stage")
    values = scores.block[score]
    return [sum(values[l : l + n]) for l in range(len(values) - n + 1)]


def simple(scores: Scores, *, n: int) -> Selection:
    """Remove blocks L-1-n..L-2: the deepest n but the last (arXiv:2403.17887 section 4.4)."""
    last = scores.num_blocks - 1
    free_units(scores, n, "block", {last})
    return Selection(
        num_blocks=scores.num_blocks,
        drop_blocks=list(range(last - n, last)),
        reason=f"the deepest {n} blocks but the last",
    )
