"""Where a search begins."""

from __future__ import annotations

from typing import Literal

from compressor.errors import SelectionError
from compressor.records import Scores
from compressor.select.contiguous import contiguous
from compressor.select.lowest import lowest_units
from compressor.select.protect import Part, Unit, all_units, free_units

Start = Literal["lowest", "contiguous"] | tuple[int, ...]


def starting_units(
    scores: Scores, n: int, start: Start, *, score: str, part: Part, protect: tuple[int, ...]
) -> list[Unit]:
    """The n units a search begins with: the lowest by a score, a contiguous run, or a list.

    A list holds indices of blocks; of sublayers, attentions are 0..L-1 and feed-forwards L..2L-1.
    Raises `SelectionError` for a list that does not fit the budget, the model or the protection.
    """
    free = free_units(scores, n, part, protect)
    if start == "lowest":
        return lowest_units(scores, n, score, part, protect)
    if start == "contiguous":
        if part != "block":
            raise SelectionError(f"start: a contiguous run is of blocks, not of {part}")
        chosen = contiguous(scores, n=n, protect=protect).drop_blocks
        return [("block", i) for i in chosen]
    units = all_units(scores.num_blocks, part)
    listed = [units[i] for i in start if isinstance(i, int) and 0 <= i < len(units)]
    if len(set(listed)) != n or len(start) != n or not set(listed) <= set(free):
        raise SelectionError(
            f"start: expected {n} different unprotected indices below {len(units)}, got "
            f"{list(start)}"
        )
    return listed
