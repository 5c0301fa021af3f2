"""How much each residual branch turns the stream: sublayer cosine and FFN saturation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blocks import hidden
from compressor.decoder import Decoder, skeleton
from compressor.errors import NotApplicable
from compressor.records import Scores
from compressor.score.collector import Collector, Watcher, refuse_shared
from compressor.score.stream import StreamNorms, cosine, norm
from compressor.sublayers import find_sublayers
from compressor.walk import Step


class BranchCosines(Watcher):
    """cos(x, x + f(x)) of both residual branches f of a block, norms included, per token.

    The stream between the branches is what the feed-forward branch reads; where both read the
    block's input (parallel residuals), the attention's output is watched instead and x + FFN is
    x_out - attention. A branch that is not there has cosine 1. Raises `NotApplicable` for blocks
    whose branches cannot be told apart or are run with another block's weights.

    Attributes:
        attention, ffn: (B, T) float32, of the batch that just passed.
    """

    shares = (StreamNorms,)

    def __init__(self, decoder: Decoder, tokens: Tensor, stream: StreamNorms) -> None:
        """Find the branches of every block."""
        self._stream = stream
        self._model = decoder.model
        refuse_shared(decoder)
        self._blocks = find_sublayers(skeleton(decoder.reader.checkpoint.folder))
        self._seen: Tensor | None = None

    @contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Keep the stream between the branches, or the attention's output."""
        both = self._blocks[step.index]
        if not both.attention or not both.ffn:
            yield
            return

        def middle(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

        def attention(_: nn.Module, __: Any, output: Any) -> None:
            self._seen = hidden(output)

        if both.parallel:
            last = self._model.get_submodule(both.attention.last)
            handle = last.register_forward_hook(attention)
        else:
            first = self._model.get_submodule(both.ffn.first)
            handle = first.register_forward_pre_hook(middle, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Turn what was seen into cosines."""
        both, whole = self._blocks[step.index], self._stream.cosine
        if not both.attention or not both.ffn:
            self.attention = whole if both.attention else torch.ones_like(whole)
            self.ffn = whole if both.ffn else torch.ones_like(whole)
            return
        assert self._seen is not None
        seen, self._seen = self._seen.to(x_in.device).view_as(x_in), None
        self.attention, self.ffn = branch_cosines(x_in, x_out, seen, self._stream, both.parallel)


def branch_cosines(
    x_in: Tensor, x_out: Tensor, seen: Tensor, stream: StreamNorms, parallel: bool
) -> tuple[Tensor, Tensor]:
    """cos(x, x + f(x)) of attention and feed-forward, (B, T) float32.

    x_in, x_out: the stream (B, T, D) around the block, stream: its norms. seen: the stream
    between the branches or, if both read x_in (parallel), what the attention adds.
    """
    if parallel:
        with_attention, with_ffn = x_in + seen, x_out - seen
        attention = cosine(x_in, with_attention, stream.before, norm(with_attention))
        return attention, cosine(x_in, with_ffn, stream.before, norm(with_ffn))
    middle = norm(seen)
    attention = cosine(x_in, seen, stream.before, middle)
    return attention, cosine(seen, x_out, middle, stream.after)


class SublayerCosine(Collector):
    """1 - mean over tokens of cos(x, x + f(x)), residual included (LLM-Drop, arXiv:2406.15786).

    For attention and feed-forward of every block, f with its norms, as `layer_drop_norm=True` in
    the authors' code. Without the residual the cosine is near 0 or negative and says nothing.
    """

    shares = (BranchCosines,)

    def __init__(self, decoder: Decoder, tokens: Tensor, branches: BranchCosines) -> None:
        """Prepare for tokens (N, T)."""
        self._branches = branches
        self._sums = torch.zeros(2, len(decoder.blocks), dtype=torch.float64)
        self._count = tokens.numel()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        self._sums[0, step.index] += self._branches.attention.double().sum()
        self._sums[1, step.index] += self._branches.ffn.double().sum()

    def result(self) -> Scores:
        """One saliency per attention and per feed-forward."""
        attention, ffn = (1 - self._sums / self._count).tolist()
        return Scores(
            num_blocks=len(ffn),
            attention={"sublayer_cosine": attention},
            ffn={"sublayer_cosine": ffn},
        )


class FfnSaturation(Collector):
    """Static FFN-SkipLLM: saturated feed-forwards go first, cold ones last (arXiv:2404.03865).

    s_l = mean over tokens behind the first `warm_up` of each window of cos(x, x + FFN_l(x)).
    Blocks before the first with s_l >= threshold (cold start) and behind the last such (cold
    end) are cold. Saliency: 1 - s_l, in [0, 2]; of cold blocks 3 - s_l, so that every cold block
    ranks above every other and `lowest` takes them only when nothing else is left. A feed-forward
    that is not there is neither cold nor warm and has 0.
    """

    shares = (BranchCosines,)

    def __init__(
        self,
        decoder: Decoder,
        tokens: Tensor,
        branches: BranchCosines,
        *,
        threshold: float,
        warm_up: int,
    ) -> None:
        """Prepare for tokens (N, T); raises `NotApplicable` if the warm-up takes all of T."""
        windows, length = tokens.shape
        if length <= warm_up:
            raise NotApplicable(
                f"windows of {length} tokens end within the warm-up of {warm_up}; use longer "
                "windows or a smaller warm_up"
            )
        self._branches, self._threshold, self._warm_up = branches, threshold, warm_up
        self._absent = decoder.blocks.absent.get("ffn", [])
        self._sums = torch.zeros(len(decoder.blocks), dtype=torch.float64)
        self._count = windows * (length - warm_up)

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add one batch of one block."""
        self._sums[step.index] += self._branches.ffn[:, self._warm_up :].double().sum()

    def result(self) -> Scores:
        """One saliency per feed-forward; raises `NotApplicable` if every block is cold."""
        there = [i for i in range(len(self._sums)) if i not in self._absent]
        saturation = (self._sums[there] / self._count).tolist()
        saliency = torch.zeros_like(self._sums)
        saliency[there] = torch.tensor(guarded(saturation, self._threshold), dtype=torch.float64)
        return Scores(num_blocks=len(saliency), ffn={"ffn_saturation": saliency.tolist()})


def guarded(saturation: list[float], threshold: float) -> list[float]:
    """Saliencies 1 - s between the first and last s >= threshold, 3 - s outside.

    Raises `NotApplicable` when no s reaches the threshold.
    """
    warm = [index for index, s in enumerate(saturation) if s >= threshold]
    if not warm:
        raise NotApplicable(
            f"no feed-forward reaches a mean cosine of {threshold} (the highest is "
            f"{max(saturation):.3f}), so all are cold; lower the threshold"
        )
    inside = range(warm[0], warm[-1] + 1)
    return [(1 if index in inside else 3) - s for index, s in enumerate(saturation)]
