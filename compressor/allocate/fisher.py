"""The rise in KL that rounding a unit causes, to second order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.allocate.errors import Costs, Grams, Probe
from compressor.backward import Tape, backward
from compressor.inputs import inputs_of
from compressor.walk import Stream, walk


def fisher(probe: Probe, *, max_windows: int, seed: int) -> Costs:
    """KL(model || quantized) ~ 1/2 sum_i mean_t(g_ti^2) D_i H D_i^T, nats per token.

    Quantizing W (O, I) to Q moves its outputs by D x, D = W - Q. To second order that costs
    1/2 mean_t (g_t D x_t)^2 with g the gradient of the log-likelihood of tokens drawn from the
    model's own predictions (the Fisher information; the model's own loss has no first-order term
    there). g is taken as independent of x, output by output (its diagonal as in BRECQ,
    arXiv:2102.05426 section 3.2; the split as in Kronecker-factored curvature, arXiv:1503.05671
    section 3), and tokens as independent of each other. H = mean x x^T. So one forward, one way
    back and one gram serve every width.
    """
    decoder, tokens = probe.decoder, probe.tokens[:max_windows]
    tape = Tape(decoder, tokens, len(tokens))
    for step in walk(Stream(decoder, tokens, probe.batch_size), "allocate"):
        for rows, x_in, x_out in step.advance():
            tape.record(step, rows, x_in, x_out)
    costs: Costs = [{} for _ in probe.units]
    for back in backward(tape, tape.seed(_drawn(seed)), "allocate", weights=False):
        units = probe.of_block(back.index)
        grams, linears = Grams(), decoder.blocks.linears(back.index)
        leaders = {unit.names[0]: linears[unit.names[0]] for unit in units.values()}
        with inputs_of(leaders, grams.add), _squared_gradients(linears) as squares:
            for _ in back.retreat():
                pass
        for place, unit in units.items():
            information = torch.cat([squares[name] for name in unit.names]) / tokens.numel()
            for bits, errors in probe.row_errors(unit, grams.mean(unit)).items():
                costs[place][bits] = float(information @ errors) / 2
    return costs


def _drawn(seed: int) -> Any:
    """Log-likelihood of tokens drawn from the predictions of one window, logits (T, V)."""

    def objective(window: int, logits: Tensor) -> Tensor:
        scores = logits.log_softmax(-1)
        draw = torch.Generator(logits.device).manual_seed(seed + window)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        return scores.gather(1, drawn).sum()

    return objective


@contextmanager
def _squared_gradients(linears: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Sum over tokens of g_i^2 at every output of each linear, (O,) float64."""
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        squares = gradient.flatten(0, -2).float().square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + squares if name in sums else squares

    def hook(name: str) -> Any:
        def watch(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: add(name, gradient))

        return watch

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
