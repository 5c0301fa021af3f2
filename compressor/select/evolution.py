"""Population search on the true loss."""

from __future__ import annotations

import random

from compressor import progress
from compressor.records import Scores, Selection
from compressor.select.protect import Part, Unit, cut, free_units
from compressor.select.start import Start, starting_units
from compressor.trial import Trial

_FRUITLESS = 50
"""Mutations in a row that give nothing new before the search ends."""


def evolution(
    scores: Scores,
    trial: Trial,
    *,
    n: int,
    part: Part,
    start: Start,
    score: str,
    protect: tuple[int, ...],
    population: int,
    max_masks: int,
    seed: int,
) -> Selection:
    """From a start, keep the best of the parents and their mutants, generation by generation.

    A mutant swaps min(a, b) parts of a random parent, a and b uniform in 1..3 (EvoPress,
    arXiv:2410.14649 section 3, whose selection this is with a population). No mask is tried
    twice. Ends after `max_masks` masks, or when mutation finds nothing new; the start stays in
    until beaten, so the result is never worse on these tokens. Raises `SelectionError` as the
    start does.
    """
    depth = scores.num_blocks
    free = free_units(scores, n, part, protect)
    units = frozenset(starting_units(scores, n, start, score=score, part=part, protect=protect))
    began, draw = trial.spent, random.Random(seed)
    with progress.task("evolution", max_masks) as bar:
        (first,) = trial.try_all(trial.loss, [cut(depth, units)], bar)
        alive, seen = [(first, units)], {units}
        while len(seen) < max_masks:
            parents = [mask for _, mask in alive]
            young = _mutants(parents, free, seen, min(population, max_masks - len(seen)), draw)
            if not young:
                break
            losses = trial.try_all(trial.loss, [cut(depth, mask) for mask in young], bar)
            alive += zip(losses, young, strict=True)
            alive = sorted(alive, key=lambda each: each[0])[:population]
    loss, best = alive[0]
    reason = f"evolved from {first:.4f} to {loss:.4f} nats over {len(seen)} masks"
    return cut(depth, best, reason, trial.spent - began)


def _mutants(
    parents: list[frozenset[Unit]],
    free: list[Unit],
    seen: set[frozenset[Unit]],
    count: int,
    draw: random.Random,
) -> list[frozenset[Unit]]:
    """At most `count` masks not seen before, which are then seen."""
    young: list[frozenset[Unit]] = []
    fruitless = 0
    while len(young) < count and fruitless < _FRUITLESS:
        parent = draw.choice(parents)
        gone = [u for u in free if u in parent]
        kept = [u for u in free if u not in parent]
        swaps = min(draw.randint(1, 3), draw.randint(1, 3), len(gone), len(kept))
        child = parent - {*draw.sample(gone, swaps)} | {*draw.sample(kept, swaps)}
        fruitless = fruitless + 1 if child in seen else 0
        if child not in seen:
            seen.add(child)
            young.append(child)
    return young
