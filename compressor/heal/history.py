"""What follows from the log of a training: the best step, a rising loss, a running mean.

Rows are those of `metrics.jsonl`. Deriving everything from them, and keeping nothing beside
them, is what makes early stopping, filtering and the guards resume by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import fmean, variance
from typing import Any

Rows = Sequence[dict[str, Any]]

RUNNING_STEPS = 50
"""Steps that the running loss is a mean of."""

_CLEARLY = 4.0
"""Standard errors; by chance one pair of means in 30,000 differs by more."""


def held_out(rows: Rows) -> list[tuple[int, float]]:
    """(step, held-out loss) of every evaluation."""
    return [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]


def best(rows: Rows) -> tuple[int, float]:
    """The (step, held-out loss) of the lowest; of equals the first."""
    return min(held_out(rows), key=lambda each: each[1])


def stale(rows: Rows) -> int:
    """Evaluations since the best one."""
    steps = [step for step, _ in held_out(rows)]
    return len(steps) - 1 - steps.index(best(rows)[0])


def running_loss(rows: Rows) -> float | None:
    """Mean training loss of the last `RUNNING_STEPS` steps; None before there are so many."""
    last = list(islice(_losses_backwards(rows), RUNNING_STEPS))
    return fmean(last) if len(last) == RUNNING_STEPS else None


def rising(rows: Rows, window: int) -> bool:
    """Whether the training loss has been rising for `window` steps.

    The mean of the last `window` steps is above that of the `window` before them by more than
    four standard errors: sqrt(var / window + var' / window), Welch's t. One bad batch widens
    the error as much as the mean and does not count.
    """
    last = list(islice(_losses_backwards(rows), 2 * window))
    if window < 2 or len(last) < 2 * window:
        return False
    late, early = last[:window], last[window:]
    error = math.sqrt((variance(late) + variance(early)) / window)
    return fmean(late) - fmean(early) > _CLEARLY * error


def _losses_backwards(rows: Rows) -> Iterator[float]:
    return (row["loss"] for row in reversed(rows) if "loss" in row)
