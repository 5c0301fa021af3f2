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


def fixed(
    scores: Scores,
    *,
    blocks: tuple[int, ...],
    attention: tuple[int, ...] = (),
    ffn: tuple[int, ...] = (),
) -> Selection:
    """Remove exactly the listed blocks and sublayers; negative indices count from the end.

    A block that loses both sublayers goes whole. Raises `SelectionError` for one listed twice.
    """
    lists = {"blocks": blocks, "attention": attention, "ffn": ffn}
    gone = {kind: protected(scores.num_blocks, listed) for kind, listed in lists.items()}
    for kind, listed in lists.items():
        if len(gone[kind]) != len(listed):
            raise SelectionError(f"{kind}: a block is listed twice in {list(listed)}")
    drop = gone["blocks"] | (gone["attention"] & gone["ffn"])
    check_budget(len(drop), scores.num_blocks, ())
    return Selection(
        num_blocks=scores.num_blocks,
        drop_blocks=sorted(drop),
        drop_attention=sorted(gone["attention"] - drop),
        drop_ffn=sorted(gone["ffn"] - drop),
        reason="the list that was given",
    )
