"""The one loop over a model in reverse: from a gradient at the output back to the embedding.

What a walk leaves behind, every block's input, is kept on a tape. The way back recomputes one
block at a time from its input, with its weights resident, so peak memory is one block, its
gradients and the graph of one batch, beside the tape itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from compressor import progress
from compressor.decoder import Decoder
from compressor.walk import Step, storage


class Tape:
    """The residual stream before every block and after the last, for the first windows of a walk.

    Attributes:
        tokens: the windows that are kept, (W, T).
        states: h_0..h_L as (L + 1, W, T, D); in a file when they are many.
        batches: slices of W that go through the model together.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, max_windows: int) -> None:
        """Prepare for the first `max_windows` of tokens (N, T)."""
        self.decoder = decoder
        self.tokens = tokens[:max_windows]
        self.states: Tensor = torch.empty(0)
        self.batches: list[slice] = []

    def record(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Keep what goes into a block, and what comes out of the last."""
        rows = slice(rows.start, min(rows.stop, len(self.tokens)))
        count = rows.stop - rows.start
        if count <= 0:
            return
        if not self.batches:
            shape = (len(self.decoder.blocks) + 1, *self.tokens.shape, x_in.shape[-1])
            self.states = storage(shape, x_in.dtype)
        if step.index == 0:
            self.batches.append(rows)
            if count < len(x_in):
                self.decoder.embed(self.tokens[rows])  # masks of the smaller batch
        self.states[step.index, rows] = x_in[:count]
        if step.index == len(self.decoder.blocks) - 1:
            self.states[-1, rows] = x_out[:count]

    def seed(self, objective: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Gradient (W, T, D) at h_L of the sum over windows of objective(window, logits (T, V))."""
        gradient = storage(tuple(self.states.shape[1:]), self.states.dtype)
        for window, state in enumerate(self.states[-1]):
            with torch.enable_grad():
                x = state[None].to(self.decoder.device).requires_grad_()
                value = objective(window, self.decoder.head(x)[0])
                gradient[window] = torch.autograd.grad(value, x)[0][0]
        return gradient


class ReverseStep:
    """One block of the way back, with its weights resident."""

    def __init__(self, tape: Tape, index: int, block: nn.Module, gradient: Tensor) -> None:
        """Stand behind block `index`, with the gradient at its output."""
        self.index = index
        self.block = block
        self._tape = tape
        self._gradient = gradient
        self._pending = list(tape.batches)

    def retreat(self) -> Iterator[slice]:
        """Move the gradient before this block; yield rows once their graph was walked.

        Whatever in the block asks for a gradient has it then, weights summed over the batches.
        """
        decoder, states = self._tape.decoder, self._tape.states[self.index]
        while self._pending:
            rows = self._pending.pop(0)
            with torch.enable_grad():
                x = states[rows].to(decoder.device).requires_grad_()
                out = decoder.run(self.index, x)
                torch.autograd.backward(out, self._gradient[rows].to(out))
            assert x.grad is not None
            self._gradient[rows] = x.grad.to(self._gradient)
            yield rows


def backward(tape: Tape, gradient: Tensor, label: str, *, weights: bool) -> Iterator[ReverseStep]:
    """Yield a `ReverseStep` per block, last first, moving `gradient` (W, T, D) from h_L to h_0.

    The gradient is overwritten. weights: whether the blocks' weights get gradients too. What a
    step was not asked to retreat is retreated after it.
    """
    decoder = tape.decoder
    order = range(len(decoder.blocks) - 1, -1, -1)
    for index in progress.track(order, label, len(order)):
        with decoder.resident(index) as block:
            step = ReverseStep(tape, index, block.requires_grad_(weights), gradient)
            yield step
            for _ in step.retreat():
                pass
