"""The rise in KL that rounding a unit causes, to second order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.allocate.probe import Costs, Probe
from compressor.backward import Tape, backward
from compressor.inputs import inputs_of, outputs_of
from compressor.moments import Gram, energies
from compressor.walk import Stream, walk


def fisher(probe: Probe, *, seed: int, skip: int) -> Costs:
    """KL(model || quantized) ~ 1/2 sum_i r_i D_i H_s D_i^T with D = W - Q, nats per token.

    Quantizing W (O, I) to Q moves the outputs of token t by D x_t. To second order that costs
    1/2 mean_t sum_i g_ti^2 (D_i x_t)^2, g being the gradient, at the outputs, of the likelihood of
    tokens drawn from the model's own predictions: the Fisher information, of which the diagonal
    is taken (BRECQ, arXiv:2102.05426 section 3.2). One gram serves all outputs because
    g_ti^2 ~ s_t r_i, with s_t = sum_i g_ti^2 and r_i = sum_t g_ti^2 / sum s (GuidedQuant,
    arXiv:2505.07004 section 3.2, with one group of outputs): H_s = mean_t s_t x_t x_t^T. It keeps
    what matters most: tokens with huge inputs often have no say. So one forward and one way back
    serve every width of every unit.

    The first `skip` tokens of a window do not count. They are attention sinks: an error of their
    values shifts every later token by nearly the same, which the propagation of errors repairs in
    the next linear, but to second order it outweighs all the others (docs/quantize.md).
    """
    decoder, tokens = probe.decoder, probe.tokens
    length = tokens.shape[1]
    skip = min(skip, length - 1)
    tape = Tape(decoder, tokens, len(tokens))
    for step in walk(Stream(decoder, tokens, probe.batch_size), "allocate"):
        for rows, x_in, x_out in step.advance():
            tape.record(step, rows, x_in, x_out)
    costs: Costs = [{} for _ in probe.units]
    for back in backward(tape, tape.seed(_drawn(seed)), "allocate", weights=False):
        found = {place: _Curvature(skip) for place in probe.of_block(back.index)}
        with _seen(decoder.blocks.linears(back.index)) as (inputs, gradients):
            for _ in back.retreat():
                for place, curvature in found.items():
                    names = probe.units[place].names
                    g = torch.cat([gradients[name] for name in names], -1)
                    x = inputs[names[0]]
                    curvature.add(*(v.reshape(-1, length, v.shape[-1]) for v in (x, g)))
        for place, curvature in found.items():
            for bits, off in probe.differences(probe.units[place], curvature.gram.mean):
                costs[place][bits] = curvature.cost(off)
    return costs


class _Curvature:
    """What the loss makes of a move of a unit's outputs, summed batch by batch."""

    def __init__(self, skip: int) -> None:
        self._skip = skip
        self._squares: Tensor | None = None

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add the inputs x (B, T, I) and the gradients g (B, T, O) of some windows."""
        squares = g[:, self._skip :].flatten(0, 1).float().square()
        if self._squares is None:
            self.gram, self._weighted = Gram(x.shape[2], x.device), Gram(x.shape[2], x.device)
            self._squares = squares.new_zeros(squares.shape[1], dtype=torch.float64)
        self.gram.add(x)
        counted = x[:, self._skip :].flatten(0, 1).float()
        self._weighted.add(counted * squares.sum(1, keepdim=True).sqrt())
        self._squares += squares.sum(0, dtype=torch.float64)

    def cost(self, off: Tensor) -> float:
        """1/2 sum_i r_i D_i H_s D_i^T of D (O, I)."""
        assert self._squares is not None
        shares = self._squares / self._squares.sum().clamp(min=1e-300)
        return float(shares @ energies(off, self._weighted.mean).double()) / 2


def _drawn(seed: int) -> Callable[[int, Tensor], Tensor]:
    """Log-likelihood of tokens drawn from the predictions of one window, logits (T, V)."""

    def objective(window: int, logits: Tensor) -> Tensor:
        scores = logits.log_softmax(-1)
        draw = torch.Generator(logits.device).manual_seed(seed + window)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        return scores.gather(1, drawn).sum()

    return objective


@contextmanager
def _seen(linears: dict[str, nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What each linear reads and the gradient at what it makes, of the latest batch, by name."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def read(name: str, x: Tensor) -> None:
        inputs[name] = x.detach()

    def made(name: str, output: Tensor) -> None:
        # a copy: the last linear's is the walk's own gradient, which moves on in place
        output.register_hook(lambda gradient: gradients.__setitem__(name, gradient.clone()))

    with inputs_of(linears, read), outputs_of(linears, made):
        yield inputs, gradients
