"""How much a block or linear matters times how much its rounding disturbs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compressor.allocate.probe import Costs, Probe, stacked
from compressor.errors import SelectionError, did_you_mean
from compressor.inputs import inputs_of
from compressor.moments import Gram, energies
from compressor.records import Scores
from compressor.units import Unit
from compressor.walk import Stream, walk


def importance(probe: Probe, *, score: str) -> Costs:
    """I_u ||D X||^2 / ||W X||^2 with D = W - Q.

    I_u is the saliency of the unit's linears together where the score rates linears and is a
    share of a whole (relevance: Mix-QViT, arXiv:2501.06357); else the rank of its block,
    (rank + 1) / L: LIM, ZD and DLP (arXiv:2406.17415 section 3, arXiv:2505.23807) order blocks
    and say nothing of distances. Squares, because a small error costs its square.

    Raises `SelectionError` for a score that the stage before did not compute.
    """
    assert probe.scores is not None
    weights = saliencies(probe.scores, score, probe.units)
    decoder, tokens = probe.decoder, probe.tokens
    costs: Costs = [{} for _ in probe.units]
    grams: dict[str, Gram] = {}

    def add(name: str, x: Tensor) -> None:
        grams.setdefault(name, Gram(x.shape[-1], x.device)).add(x)

    for step in walk(Stream(decoder, tokens, probe.batch_size), "allocate"):
        units = probe.of_block(step.index)
        linears = decoder.blocks.linears(step.index)
        leaders = {name: linears[name] for unit in units.values() for name in unit.names[:1]}
        with inputs_of(leaders, add):
            for _ in step.advance():
                pass
        for place, unit in units.items():
            gram = grams.pop(unit.names[0]).mean
            whole = float(energies(stacked(probe.linears(unit)), gram).sum())
            for bits, off in probe.differences(unit, gram):
                error = float(energies(off, gram).sum())
                costs[place][bits] = weights[place] * error / max(whole, 1e-30)
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
