"""Removing the least important blocks, wherever they are, or just those asked for."""

from __future__ import annotations

from compressor.errors import SelectionError, did_you_mean
from compressor.records import Scores, Selection
from compressor.select.protect import check_budget, protected


def lowest(scores: Scores, *, n: int, score: str, protect: tuple[int, ...]) -> Selection:
    """Remove the n unprotected blocks with the lowest saliency; of equals, the deeper goes.

    Raises `SelectionError` for a score that was not computed or a budget that does not fit.
    """
    if score not in scores.block:
        raise SelectionError(f"no score {score!r}{did_you_mean(score, scores.block)}")
    kept = protected(scores.num_blocks, protect)
    check_budget(n, scores.num_blocks, kept)
    free = [i for i in range(scores.num_blocks) if i not in kept]
    free.sort(key=lambda i: (scores.block[score][i], -i))
    return Selection(
        num_blocks=scores.num_blocks,
        drop_blocks=sorted(free[:n]),
        reason=f"the {n} lowest by {score}",
    )


def fixed(scores: Scores, *, blocks: tuple[int, ...]) -> Selection:
    """Remove exactly the listed blocks; negative indices count from the end."""
    drop = protected(scores.num_blocks, blocks)
    if len(drop) != len(blocks):
        raise SelectionError(f"blocks: a block is listed twice in {list(blocks)}")
    check_budget(len(drop), scores.num_blocks, ())
    return Selection(
        num_blocks=scores.num_blocks, drop_blocks=sorted(drop), reason="the list that was given"
    )
