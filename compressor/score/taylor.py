"""Taylor: the first-order change of the loss when a weight is set to zero."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor.backward import Tape, backward
from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.walk import Step


class Taylor(Collector):
    """S = sum over weights of |w dL/dw| (Shortened LLaMA, arXiv:2402.02834 section 3.2).

    L is the next-token loss in nats, mean over the W (T - 1) predictions of all windows, so the
    signed products of a weight are summed over the text before the absolute value. A block's or
    sublayer's saliency is the sum of its linears'; biases and norms are left out, as in the
    paper's code. Products and sums in float64.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, *, max_windows: int) -> None:
        """Prepare for the first `max_windows` of tokens (N, T)."""
        self._tape = Tape(decoder, tokens, max_windows)

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Keep what enters the block."""
        self._tape.record(step, rows, x_in, x_out)

    def result(self) -> Scores:
        """Go back over the model once."""
        tokens, blocks = self._tape.tokens, self._tape.decoder.blocks
        linear: dict[str, float] = {}

        def loss(window: int, logits: Tensor) -> Tensor:
            targets = tokens[window, 1:].to(logits.device)
            return cross_entropy(logits[:-1], targets) / len(tokens)

        for step in backward(self._tape, self._tape.seed(loss), "taylor", weights=True):
            for _ in step.retreat():
                pass
            for name, module in blocks.linears(step.index).items():
                weight = module.weight
                assert isinstance(weight, Tensor) and weight.grad is not None
                linear[name] = saliency(weight, weight.grad)

        ffn = [sum(linear[n] for n in blocks.ffn_linears(i)) for i in range(len(blocks))]
        block = [sum(linear[n] for n in blocks.linears(i)) for i in range(len(blocks))]
        return Scores(
            num_blocks=len(blocks),
            block={"taylor": block},
            attention={"taylor": [b - f for b, f in zip(block, ffn, strict=True)]},
            ffn={"taylor": ffn},
            linear={"taylor": linear},
        )


def saliency(weight: Tensor, gradient: Tensor) -> float:
    """Sum of |w g| over the elements of a weight and its gradient, in float64."""
    return float((weight.detach().double() * gradient.double()).abs().sum())
