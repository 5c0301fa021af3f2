"""The rule that spends a budget: steepest descent along each unit's convex hull."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from compressor.errors import SelectionError

Table = Sequence[Mapping[int, float]]
"""Per unit, a figure of each width."""


def greedy(sizes: Table, costs: Table, budget: float) -> list[int]:
    """The width of every unit: least sum of costs whose sum of sizes is within the budget.

    All start at their smallest; then, again and again, the step along a unit's hull that lowers
    the cost most per size is taken. Where the next step no longer fits, that unit is done and
    the others go on, so less than any step left is unspent. Every result on the way is the
    optimum for the size it has reached until the first step that did not fit (the fractional
    multiple-choice knapsack). O(S log U) for S steps of U units.

    Raises `SelectionError` when the smallest widths exceed the budget.
    """
    hulls = [hull(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    at = [0] * len(hulls)
    left = budget - sum(size[steps[0]] for size, steps in zip(sizes, hulls, strict=True))
    if left < 0:
        raise SelectionError(f"no width is small enough: {budget - left:.0f} exceeds {budget:.0f}")
    queue: list[tuple[float, int]] = []

    def offer(unit: int) -> None:
        steps = hulls[unit][at[unit] : at[unit] + 2]
        if len(steps) == 2:
            heapq.heappush(queue, (_slope(sizes[unit], costs[unit], *steps), unit))

    for unit in range(len(hulls)):
        offer(unit)
    while queue:
        _, unit = heapq.heappop(queue)
        here, there = hulls[unit][at[unit] : at[unit] + 2]
        step = sizes[unit][there] - sizes[unit][here]
        if step <= left:
            left -= step
            at[unit] += 1
            offer(unit)
    return [steps[index] for steps, index in zip(hulls, at, strict=True)]


def hull(sizes: Mapping[int, float], costs: Mapping[int, float]) -> list[int]:
    """Widths on the lower left convex hull of (size, cost), by rising size and falling cost."""
    kept: list[int] = []
    for width in sorted(sizes, key=lambda w: (sizes[w], costs[w])):
        if kept and costs[width] >= costs[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(sizes, costs, kept[-1], width) <= _slope(
            sizes, costs, *kept[-2:]
        ):
            kept.pop()
        kept.append(width)
    return kept


def _slope(sizes: Mapping[int, float], costs: Mapping[int, float], a: int, b: int) -> float:
    """Cost per size on the way from width a to the larger b; negative, steeper is less."""
    return (costs[b] - costs[a]) / (sizes[b] - sizes[a])
