"""Layer-wise relevance: how much of a prediction passes through each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.backward import ReverseStep, Tape, backward
from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.inputs import outputs_of
from compressor.records import Scores
from compressor.score.attnlrp import attnlrp
from compressor.score.collector import Collector, refuse_shared
from compressor.walk import Step


class Relevance(Collector):
    """R_m = sum over tokens of |z dy/dz| at the output z of a module, mean over windows.

    y is the largest logit of a window's last token (positions="all": their sum over all tokens)
    and the gradient is AttnLRP's (arXiv:2402.05602). A linear's saliency is its share of all
    linears' relevance; attentions and feed-forwards together sum to 1, and a block has the sum
    of its two; a branch that is not there has 0. Raises `NotApplicable` for a module that no rule
    covers and for branches that are run with another block's weights.
    """

    def __init__(
        self, decoder: Decoder, tokens: Tensor, *, max_windows: int, positions: str
    ) -> None:
        """Prepare for the first `max_windows` of tokens (N, T)."""
        refuse_shared(decoder)
        self._decoder = decoder
        self._last = positions == "last"
        self._tape = Tape(decoder, tokens, max_windows)
        self._check(tokens[:1])

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Keep what enters the block."""
        self._tape.record(step, rows, x_in, x_out)

    def result(self) -> Scores:
        """Go back over the model once."""
        blocks = self._decoder.blocks
        with attnlrp(self._decoder.model):
            gradient = self._tape.seed(self._prediction)
        found: dict[str, float] = {}
        for step in backward(self._tape, gradient, "relevance", weights=False):
            found |= self._relevances(step)
        attention, ffn = (
            [sum(found[name] for name in last_of(branch(i))) for i in range(len(blocks))]
            for branch in (blocks.attention, blocks.ffn)
        )
        linear = {name: found[name] for i in range(len(blocks)) for name in blocks.linears(i)}
        whole, every = sum(attention) + sum(ffn), sum(linear.values())
        return Scores(
            num_blocks=len(blocks),
            block={"relevance": [(a + f) / whole for a, f in zip(attention, ffn, strict=True)]},
            attention={"relevance": [a / whole for a in attention]},
            ffn={"relevance": [f / whole for f in ffn]},
            linear={"relevance": {name: value / every for name, value in linear.items()}},
        )

    def _prediction(self, window: int, logits: Tensor) -> Tensor:
        return logits[-1].max() if self._last else logits.max(-1).values.sum()

    def _relevances(self, step: ReverseStep) -> dict[str, float]:
        """Sum over tokens of |value times gradient| at each linear and each branch of a block."""
        blocks = self._decoder.blocks
        modules = blocks.linears(step.index)
        modules |= last_of(blocks.attention(step.index)) | last_of(blocks.ffn(step.index))
        sums = dict.fromkeys(modules, 0.0)
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor) -> None:
            outputs[name] = output
            output.retain_grad()

        with self._rules(step.index), outputs_of(modules, keep):
            for _ in step.retreat():
                for name, z in outputs.items():
                    assert z.grad is not None
                    sums[name] += float((z.detach() * z.grad).abs().double().sum())
        return sums

    def _check(self, tokens: Tensor) -> None:
        """Try the rules on one block of each kind and on the head, before anything is spent."""
        kinds: set[frozenset[type]] = set()
        x = self._decoder.embed(tokens)
        for index, block in enumerate(self._decoder.blocks):
            kind = frozenset(type(module) for module in block.modules())
            if kind not in kinds:
                kinds.add(kind)
                with self._decoder.resident(index), torch.enable_grad(), self._rules(index):
                    self._decoder.run(index, x.requires_grad_())
        with torch.enable_grad(), attnlrp(self._decoder.model):
            self._decoder.head(x[:, -1:])

    @contextmanager
    def _rules(self, index: int) -> Iterator[None]:
        """The rules inside a resident block, whose attention, if any, must then have been seen."""
        blocks = self._decoder.blocks
        path = f"{blocks.prefix}.{index}"
        with attnlrp(blocks.layers[index], path) as products:
            yield
        if blocks.attention(index) and not products.attention:
            raise NotApplicable(
                f"{path}: its attention is not computed by torch's own products, where the "
                "relevance rules apply; load the model with sdpa or eager attention"
            )


def last_of(branch: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The module whose output a branch is, by name; OPT's feed-forward has two, a cut one none."""
    return dict([*branch.items()][-1:])
