"""ARank: the rank of attention maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.records import Scores
from compressor.score.collector import Collector, refuse_shared
from compressor.walk import Step


class _Seen(Exception):
    """Stops a block's forward once its attention map was seen."""


class AttentionRank(Collector):
    """Mean over windows and heads of the rank of the attention map (ARank, arXiv:2410.13859).

    A singular value counts when it is above `tolerance` times the map's largest; the map is
    causal with a positive diagonal, so without a tolerance its rank is always T. A low rank means
    redundant. Fused kernels make no map, so the attention, and nothing else of the block, is run
    again with explicit maps (T, T) on the first `max_tokens` of the first `max_windows` windows;
    being causal, these see nothing of the rest. An attention that is not there has rank 0.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens: Tensor,
        *,
        max_windows: int,
        max_tokens: int,
        tolerance: float,
    ) -> None:
        """Prepare for tokens (N, T)."""
        refuse_shared(decoder)
        self._decoder, self._tolerance = decoder, tolerance
        self._windows, self._tokens = min(max_windows, len(tokens)), max_tokens
        self._sums = torch.zeros(len(decoder.blocks), dtype=torch.float64)
        with decoder.eager_attention():
            decoder.embed(tokens[:1, :max_tokens])

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Add the ranks of the windows of one batch that are among the first."""
        if not self._decoder.blocks.attention(step.index):
            return
        count = len(range(*rows.indices(self._windows)))
        with self._decoder.eager_attention():
            for window in range(count):
                maps = self._maps(step, x_in[window : window + 1, : self._tokens])
                ranks = torch.linalg.matrix_rank(maps, rtol=self._tolerance)
                self._sums[step.index] += ranks.double().mean().cpu()

    def _maps(self, step: Step, x: Tensor) -> Tensor:
        """Attention maps (1, H, T, T) of one window in float32.

        Raises `NotApplicable` when the family gives none.
        """
        *_, (name, attention) = self._decoder.blocks.attention(step.index).items()
        length = x.shape[1]
        found: list[Tensor] = []

        def see(_: nn.Module, __: Any, output: Any) -> None:
            given = output if isinstance(output, tuple) else (output,)
            found.extend(v for v in given if isinstance(v, Tensor) and v.ndim == 4)
            raise _Seen

        handle = attention.register_forward_hook(see)
        try:
            step.run(x)
        except _Seen:
            pass
        finally:
            handle.remove()
        if not found or found[0].shape[-2:] != (length, length):
            raise NotApplicable(
                f"{name} gives no attention maps, even when asked for eager attention: its family "
                "computes attention in a kernel of its own"
            )
        return found[0].float()

    def result(self) -> Scores:
        """One saliency per attention."""
        ranks = (self._sums / self._windows).tolist()
        return Scores(num_blocks=len(ranks), attention={"attention_rank": ranks})
