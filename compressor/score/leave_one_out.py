"""All models with one block bypassed, walked together for every score that compares outputs."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.score.collector import Collector, Watcher
from compressor.walk import Step, Stream, storage

HEAD_TOKENS = 256
"""Tokens whose logits exist at once: enough for a fast product, little beside a block."""


class Bypass(Watcher):
    """All L leave-one-out models walked at once, shared by every `LeaveOneOut` score.

    Stream i is born as block i's input (the block is the identity for it) and passes through
    the later blocks while they are resident: L(L-1)/2 block forwards beside the walk's own L,
    each block's weights read once. The streams, (L, W, T, D), go to a file when they are many.
    Outputs cost L + 1 products with the head per token looked at, so every second token makes
    the whole (L+1)/2 forwards, the head's share included.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Prepare for tokens (N, T); scores that want some of them join."""
        self._decoder = decoder
        self._tokens = tokens
        self._scores: list[LeaveOneOut] = []
        self._streams: Tensor | None = None
        self._final: Stream | None = None

    def join(self, score: LeaveOneOut) -> None:
        """Walk the windows that `score` wants, and compare for it at the end."""
        self._scores.append(score)

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Push every bypassed stream through the resident block, and start the block's own."""
        if self._streams is None:
            windows = int(self._wanted().any(0).any(1).sum())
            shape = (len(self._decoder.blocks), windows, *x_in.shape[1:])
            self._streams, self._final = storage(shape, x_in.dtype), step.stream
        if rows.start == 0 and step.index:
            older = self._streams[: step.index].flatten(0, 1)
            for x in older.split(len(x_in)):
                if len(x) < len(x_in):
                    self._decoder.embed(self._tokens[: len(x)])  # masks of a smaller batch
                x.copy_(step.run(x))
        inside = self._streams[step.index, rows]
        inside.copy_(x_in[: len(inside)])

    @cached_property
    def means(self) -> dict[str, list[float]]:
        """Per score, the mean over the tokens it wants, for each bypassed block."""
        assert self._streams is not None and self._final is not None
        wanted = self._wanted()
        sums = torch.zeros(len(self._scores), len(self._streams), dtype=torch.float64)
        following = self._tokens.roll(-1, 1)
        for chunk in wanted.any(0).nonzero().split(HEAD_TOKENS):
            at = (chunk[:, 0], chunk[:, 1])
            full = self._log_probabilities(self._final.x[at])
            for index, stream in enumerate(self._streams):
                skip = self._log_probabilities(stream[at])
                for score, keep, total in zip(self._scores, wanted[:, *at], sums, strict=True):
                    seen = slice(None) if keep.all() else keep.to(full.device)
                    after = following[at][keep].to(full.device)
                    total[index] += score.compare(full[seen], skip[seen], after)
        rows = (sums / wanted.sum((1, 2))[:, None]).tolist()
        return {score.name: row for score, row in zip(self._scores, rows, strict=True)}

    def _wanted(self) -> Tensor:
        """(scores, N, T) bool: the tokens each score looks at."""
        return torch.stack([score.wanted for score in self._scores])

    def _log_probabilities(self, x: Tensor) -> Tensor:
        """(K, V) from final states (K, D); the head looks at each token alone."""
        return log_softmax(self._decoder.logits(x[:, None])[:, 0], dim=-1)


class LeaveOneOut(Collector):
    """A mean over tokens of what `compare` makes of the output without one block.

    Attributes:
        name: of the score.
        shares: the streams it compares, walked once for all such scores.
        wanted: (N, T) bool, the tokens whose outputs count.
    """

    name: ClassVar[str]
    shares = (Bypass,)

    def __init__(self, bypass: Bypass, tokens: Tensor, max_windows: int, positions: str) -> None:
        """Look at the first `max_windows` of tokens (N, T).

        positions: "last", "all", or "alternate", every second one whose next token is known.
        """
        length = tokens.shape[1]
        chosen = {
            "last": slice(length - 1, length),
            "all": slice(0, length),
            "alternate": slice(length % 2, length - 1, 2),
        }
        self.wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        self.wanted[:max_windows, chosen[positions]] = True
        self._bypass = bypass
        bypass.join(self)

    def compare(self, full: Tensor, skip: Tensor, following: Tensor) -> float:
        """Sum over K tokens, from log-probabilities (K, V) of both and the tokens after (K)."""
        raise NotImplementedError

    def result(self) -> Scores:
        """One saliency per block."""
        values = self._bypass.means[self.name]
        return Scores(num_blocks=len(values), block={self.name: values})
