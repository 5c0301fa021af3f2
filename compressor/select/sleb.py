"""Greedy removal by the loss that is left."""

from __future__ import annotations

from compressor import progress
from compressor.records import Scores, Selection
from compressor.select.protect import Part, Unit, cut, free_units
from compressor.trial import Trial


def sleb(
    scores: Scores, trial: Trial, *, n: int, part: Part, protect: tuple[int, ...]
) -> Selection:
    """Remove, n times, the part whose removal leaves the least loss, measured anew each time.

    The loss is the true next-token loss of the model without all that went before. About
    n (L - n / 2) / 2 forwards for blocks, since a mask starts where it differs from the last.
    Of equals the first goes. Raises `SelectionError` for a budget that does not fit. Source:
    SLEB (arXiv:2402.09025 algorithm 1), whose code never touches the first and last block.
    """
    depth = scores.num_blocks
    free = free_units(scores, n, part, protect)
    began, gone, loss = trial.spent, list[Unit](), 0.0
    with progress.task("sleb", n * len(free) - n * (n - 1) // 2) as bar:
        for _ in range(n):
            left = [unit for unit in free if unit not in gone]
            losses = trial.try_all(trial.loss, [cut(depth, [*gone, u]) for u in left], bar)
            loss = min(losses)
            gone.append(left[losses.index(loss)])
    reason = f"one by one, each leaving the least loss: {loss:.4f} nats at last, in the order "
    reason += ", ".join(f"{kind} {index}" for kind, index in gone) if gone else "of nothing"
    return cut(depth, gone, reason, trial.spent - began)
