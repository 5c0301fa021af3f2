"""How much a block or linear matters times how much its rounding disturbs it."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.allocate.errors import Costs, Grams, Probe, energy, stacked
from compressor.errors import SelectionError, did_you_mean
from compressor.inputs import inputs_of
from compressor.records import Scores
from compressor.units import Unit
from compressor.walk import Stream, walk


def importance(probe: Probe, *, score: str, max_windows: int) -> Costs:
    """I_u ||D X||^2 / ||W X||^2 with D = W - Q.

    I_u is the saliency of the unit's linears together where the score rates linears and is a
    share of a whole (relevance, arXiv:2401.11243 as made here); else the rank of its block,
    (rank + 1) / L: LIM, ZD and DLP (arXiv:2406.17415 section 3, arXiv:2505.23807) order blocks
    and say nothing of distances. Squares, because a small error costs its square.

    Raises `SelectionError` for a score that the stage before did not compute.
    """
    assert probe.scores is not None
    weights = saliencies(probe.scores, score, probe.units)
    decoder, tokens = probe.decoder, probe.tokens[:max_windows]
    costs: Costs = [{} for _ in probe.units]
    for step in walk(Stream(decoder, tokens, probe.batch_size), "allocate"):
        units = probe.of_block(step.index)
        grams, linears = Grams(), decoder.blocks.linears(step.index)
        leaders = {unit.names[0]: linears[unit.names[0]] for unit in units.values()}
        with inputs_of(leaders, grams.add):
            for _ in step.advance():
                pass
        for place, unit in units.items():
            gram = grams.mean(unit)
            whole = float(energy(stacked(probe.linears(unit)), gram).sum())
            for bits, errors in probe.row_errors(unit, gram).items():
                costs[place][bits] = weights[place] * float(errors.sum()) / max(whole, 1e-30)
    return costs


def saliencies(scores: Scores, name: str, units: Sequence[Unit]) -> list[float]:
    """How much each unit matters, positive."""
    if name == "relevance" and name in scores.linear:
        linear = scores.linear[name]
        return [sum(linear[each] for each in unit.names) for unit in units]
    if name not in scores.block:
        known = {*scores.block, *({"relevance"} & scores.linear.keys())}
        raise SelectionError(
            f"allocate: no score {name!r} of blocks among the scores{did_you_mean(name, known)}; "
            f"add it to the score stage before"
        )
    values = scores.block[name]
    ranks = [sum(other < value for other in values) for value in values]
    return [(ranks[unit.block] + 1) / len(values) for unit in units]
