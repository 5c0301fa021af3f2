"""Local search by swaps on the true loss."""

from __future__ import annotations

import random

from compressor import progress
from compressor.records import Scores, Selection
from compressor.select.protect import Part, cut, free_units
from compressor.select.start import Start, starting_units
from compressor.trial import Trial


def swap(
    scores: Scores,
    trial: Trial,
    *,
    n: int,
    part: Part,
    start: Start,
    score: str,
    protect: tuple[int, ...],
    max_masks: int,
    seed: int,
) -> Selection:
    """From a start, give back one part and remove another as long as that lowers the loss.

    Parts to give back are taken in a seeded random order; for each, every other part is tried
    in its place and the best is taken if it beats the current loss. Ends when no swap helps (a
    local optimum of n (L - n) neighbours) or after `max_masks` masks; the result is never worse
    than the start on these tokens. Raises `SelectionError` as the start does.
    """
    depth = scores.num_blocks
    free = free_units(scores, n, part, protect)
    units = starting_units(scores, n, start, score=score, part=part, protect=protect)
    began, order, tried = trial.spent, random.Random(seed), 1
    with progress.task("swap", max_masks) as bar:
        (first,) = trial.try_all(trial.loss, [cut(depth, units)], bar)
        loss, waiting = first, order.sample(units, len(units))
        while waiting and tried < max_masks:
            given_back = waiting.pop()
            rest = [u for u in units if u != given_back]
            takers = [u for u in free if u not in units][: max_masks - tried]
            losses = trial.try_all(trial.loss, [cut(depth, [*rest, u]) for u in takers], bar)
            tried += len(takers)
            if losses and min(losses) < loss:
                loss = min(losses)
                units = [*rest, takers[losses.index(loss)]]
                waiting = order.sample(units, len(units))
    reason = f"swaps from {first:.4f} to {loss:.4f} nats over {tried} masks"
    return cut(depth, units, reason, trial.spent - began)
