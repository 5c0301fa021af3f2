"""Second thoughts about an allocation: swaps of bits that lower the true loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor import progress
from compressor.allocate.probe import Probe
from compressor.allocate.rule import Table, hull
from compressor.layouts import Codes
from compressor.walk import Stream


@dataclass(frozen=True)
class Refined:
    """What the swaps came to.

    Attributes:
        bits: the width of each unit.
        losses: true loss of the start and of the result, nats per token.
        evaluations: how often the loss was measured.
    """

    bits: list[int]
    losses: tuple[float, float]
    evaluations: int


def refine(
    bits: Sequence[int],
    sizes: Table,
    costs: Table,
    budget: float,
    *,
    loss: Callable[[list[int]], float],
    evaluations: int,
) -> Refined:
    """Give one unit a step more and another a step less for as long as that lowers the loss.

    Swaps within the budget are tried in the order of their foretold cost, each once, and taken
    when `loss` says so; after `evaluations` losses, or when no swap is left, it ends. The result
    is never worse than the start.
    """
    chosen = list(bits)
    start = best = loss(chosen)
    spent, tried = 1, {tuple(chosen)}
    with progress.task("refine", evaluations) as bar:
        bar.advance(1, f"{best:.4f}")
        while spent < evaluations:
            swap = next((s for s in _swaps(chosen, sizes, costs, budget) if s not in tried), None)
            if swap is None:
                break
            tried.add(swap)
            found = loss(list(swap))
            spent += 1
            if found < best:
                best, chosen = found, list(swap)
            bar.advance(1, f"{best:.4f}")
    return Refined(chosen, (start, best), spent)


def _swaps(
    bits: Sequence[int], sizes: Table, costs: Table, budget: float
) -> Iterator[tuple[int, ...]]:
    """Every swap that fits, cheapest first."""
    left = budget - sum(size[each] for size, each in zip(sizes, bits, strict=True))
    up: list[tuple[float, float, int, int]] = []  # change of cost and of size, unit, new width
    down: list[tuple[float, float, int, int]] = []
    for unit, (size, cost, now) in enumerate(zip(sizes, costs, bits, strict=True)):
        steps = hull(size, cost)
        at = steps.index(now)
        for side, places in ((up, steps[at + 1 : at + 2]), (down, steps[max(at - 1, 0) : at])):
            side += [(cost[w] - cost[now], size[w] - size[now], unit, w) for w in places]
    fitting = [
        (more[0] + less[0], more, less)
        for more in up
        for less in down
        if more[2] != less[2] and more[1] + less[1] <= left
    ]
    for _, more, less in sorted(fitting):
        swapped = list(bits)
        swapped[more[2]], swapped[less[2]] = more[3], less[3]
        yield tuple(swapped)


class MixedModel:
    """The model with its units rounded to any widths, from the first block that changed.

    A state of the residual stream is kept before every block, (L + 1) N T D numbers, and the
    codes of every unit and width that was asked for, a byte a weight.
    """

    def __init__(self, probe: Probe, tokens: Tensor) -> None:
        """Embed tokens (N, T); the probe must have measured all units."""
        self._probe, self._tokens = probe, tokens
        stream = Stream(probe.decoder, tokens, probe.batch_size)
        self._batches, self._states = stream.batches, [stream.x]
        self._bits: list[int] = []
        self._codes: dict[tuple[int, int], Codes] = {}

    @torch.no_grad()
    def loss(self, bits: list[int]) -> float:
        """Mean next-token loss over N (T - 1) tokens at the widths `bits`, nats."""
        decoder, units = self._probe.decoder, self._probe.units
        changed = [
            u.block for u, now, old in zip(units, bits, self._bits, strict=False) if now != old
        ]
        first = min(changed, default=len(decoder.blocks)) if self._bits else 0
        del self._states[first + 1 :]
        for index in range(first, len(decoder.blocks)):
            x, out = self._states[-1], torch.empty_like(self._states[-1])
            with decoder.resident(index, self._weights(index, bits)):
                for rows in self._batches:
                    out[rows] = decoder.run(index, x[rows]).to(out)
            self._states.append(out)
        self._bits = list(bits)
        total = 0.0
        for window, x in enumerate(self._states[-1]):
            logits = decoder.logits(x[None])[0, :-1]
            total += float(cross_entropy(logits, self._tokens[window, 1:].to(logits.device)))
        return total / len(self._tokens)

    def _weights(self, index: int, bits: list[int]) -> dict[str, Tensor]:
        decoder = self._probe.decoder
        path = f"{decoder.blocks.prefix}.{index}."
        keys = decoder.blocks.layers[index].state_dict()
        weights = {key: decoder.weight(index, key) for key in keys}
        for place, unit in self._probe.of_block(index).items():
            names = [f"{name.removeprefix(path)}.weight" for name in unit.names]
            dense = torch.cat([weights[name] for name in names])
            key = (place, bits[place])
            if key not in self._codes:
                self._codes[key] = self._probe.round(unit, dense, bits[place])
            rows = [len(weights[name]) for name in names]
            parts = self._codes[key].dequantize().to(dense).split(rows)
            weights |= dict(zip(names, parts, strict=True))
        return weights
