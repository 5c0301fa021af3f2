"""Layer contribution: what the output distribution loses when one block is bypassed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector
from compressor.walk import Step, Stream, storage


class LayerContribution(Collector):
    """LC_i = KL(p || p_without_i) in nats per token (ShortV, ICCV 2025, for text models).

    All L leave-one-out models are walked at once: stream i is born as block i's input (the
    block is the identity for it) and passes through the later blocks while they are resident.
    That costs L(L+1)/2 block forwards, about (L+1)/2 forwards of the model, which is what
    measuring every block takes; each block's weights are still read once.
    direction="skip_full" is KL(p_without_i || p), the order of ShortV's code.
    """

    def __init__(
        self, decoder: Decoder, tokens: Tensor, *, max_windows: int, positions: str, direction: str
    ) -> None:
        """Prepare for the first `max_windows` of tokens (N, T)."""
        self._windows = min(max_windows, len(tokens))
        self._last_only = positions == "last"
        self._full_skip = direction == "full_skip"
        self._num_blocks = len(decoder.blocks)
        self._streams: Tensor | None = None
        self._final: Stream | None = None

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Push every bypassed stream of these rows through the resident block."""
        count = len(range(*rows.indices(self._windows)))
        if not count:
            return
        if self._streams is None:
            self._streams = storage((self._num_blocks, self._windows, *x_in.shape[1:]), x_in.dtype)
        rows = slice(rows.start, rows.start + count)
        for skipped in range(step.index):
            x = self._streams[skipped, rows]
            padded = torch.cat([x, x_in[count:]]) if count < len(x_in) else x
            self._streams[skipped, rows] = step.run(padded)[:count].to(x)
        self._streams[step.index, rows] = x_in[:count]
        self._final = step.stream

    def result(self) -> Scores:
        """Compare the output distributions window by window, so few logits exist at once."""
        assert self._streams is not None and self._final is not None
        decoder = self._final.decoder
        sums = torch.zeros(self._num_blocks, dtype=torch.float64)
        for window in range(self._windows):
            full = self._log_probabilities(decoder.logits(self._final.x[window : window + 1]))
            for skipped in range(self._num_blocks):
                x = self._streams[skipped, window : window + 1]
                skip = self._log_probabilities(decoder.logits(x))
                p, q = (full, skip) if self._full_skip else (skip, full)
                sums[skipped] += divergence(p, q)
        values = (sums / self._windows).tolist()
        return Scores(num_blocks=self._num_blocks, block={"layer_contribution": values})

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return log_softmax(logits[0, -1:] if self._last_only else logits[0], dim=-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) = sum p (log p - log q) in nats per token, of log-probabilities (T, V)."""
    return float(kl_div(q, p, reduction="sum", log_target=True).double() / len(p))
