"""Beam search over sublayers by the distance of what the head reads, then shared weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compressor import progress
from compressor.records import Scores, Selection
from compressor.select.protect import Unit, cut, free_units
from compressor.trial import Trial


def skrr(
    scores: Scores,
    trial: Trial,
    *,
    n: int,
    beam: int,
    reuse: bool,
    protect: tuple[int, ...],
) -> Selection:
    """Skip n sublayers, then let neighbours stand in for them where that helps (Skrr).

    D = MSE(f_full, f_cut) over the calibration windows + the same over the null prompt (the
    begin-of-sequence token alone, where the model has one); f is the stream behind the final
    norm. Skip: n rounds over all masks of the beam with one sublayer more, keeping the `beam` of
    least D. Re-use: each skipped sublayer, from the first, runs with the weights of the previous
    or the next kept one of its type, if that lowers D. About beam n (2L - n / 2) / 2 forwards.
    Raises `SelectionError` for a budget that does not fit. Source: arXiv:2502.08690 algorithms
    1 and 2, where f is the text encoder behind its projection.
    """
    depth = scores.num_blocks
    free = free_units(scores, n, "sublayers", protect)
    began, measure = trial.spent, _Discrepancy(trial)
    total = sum((beam if done else 1) * (len(free) - done) for done in range(n))
    beams: list[tuple[float, frozenset[Unit]]] = [(0.0, frozenset())]
    with progress.task("skrr", total) as bar:
        for _ in range(n):
            masks = list(dict.fromkeys(m | {u} for _, m in beams for u in free if u not in m))
            found = trial.try_all(measure, [cut(depth, mask) for mask in masks], bar)
            beams = sorted(zip(found, masks, strict=True), key=lambda each: each[0])[:beam]
    skipped, gone = beams[0]
    shared, least = _shared(scores, gone, measure, skipped) if reuse else ({}, skipped)
    reason = f"beam search to distance {skipped:.4g}, {least:.4g} with {len(shared)} shared"
    return _selection(depth, gone, shared, reason, trial.spent - began)


class _Discrepancy:
    """D of a cut, over the calibration windows and the null prompt."""

    def __init__(self, trial: Trial) -> None:
        config = trial.decoder.model.config
        begin = getattr(config, "bos_token_id", None)
        null = torch.tensor([[begin]]) if isinstance(begin, int) else None
        self._trials = [trial] if null is None else [trial, trial.beside(null)]

    def __call__(self, selection: Selection) -> float:
        return sum(trial.distance(selection) for trial in self._trials)


def _shared(
    scores: Scores, gone: frozenset[Unit], measure: _Discrepancy, least: float
) -> tuple[dict[Unit, int], float]:
    """Whose weights the skipped sublayers run with, where that lowers D, and the D left."""
    depth = scores.num_blocks
    shared: dict[Unit, int] = {}
    for unit in sorted(gone, key=lambda u: (u[1], u[0])):
        kind, index = unit
        kept = [i for i in scores.having(kind) if (kind, i) not in gone]
        givers = [*[i for i in kept if i < index][-1:], *[i for i in kept if i > index][:1]]
        for giver in givers:
            distance = measure(_selection(depth, gone, shared | {unit: giver}))
            if distance < least:
                shared, least = shared | {unit: giver}, distance
    return shared, least


def _selection(
    depth: int,
    gone: Iterable[Unit],
    shared: dict[Unit, int],
    reason: str = "",
    evaluations: float = 0.0,
) -> Selection:
    reuse = {
        f"reuse_{kind}": {i: giver for (k, i), giver in sorted(shared.items()) if k == kind}
        for kind in ("attention", "ffn")
    }
    dropped = cut(depth, [u for u in gone if u not in shared], reason, evaluations)
    return Selection.model_validate(dropped.model_dump() | reuse)
