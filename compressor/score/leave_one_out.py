"""All models with one block bypassed, walked together for every score that compares outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from compressor.decoder import Decoder
from compressor.records import Scores
from compressor.walk import Step, Stream, storage

HEAD_TOKENS = 256
"""Tokens whose logits exist at once: enough for a fast product, little beside a block."""


W = TypeVar("W")


class LeaveOneOut(ABC):
    """A mean over tokens of what `compare` makes of the output without one block.

    The streams it looks at are walked by `Bypass`, once for all such scores.

    Attributes:
        name: of the score.
        wanted: (N, T) bool, the tokens whose outputs count.
    """

    name: str

    def __init__(self, tokens: Tensor, max_windows: int, positions: str) -> None:
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

    @abstractmethod
    def compare(self, full: Tensor, skip: Tensor, following: Tensor) -> float:
        """Sum over K tokens, from log-probabilities (K, V) of both and the tokens after (K)."""


class Bypass:
    """All L leave-one-out models walked at once, for any number of `LeaveOneOut` scores.

    Stream i is born as block i's input (the block is the identity for it) and passes through
    the later blocks while they are resident: L(L-1)/2 block forwards beside the walk's own L,
    each block's weights read once. The streams, (L, W, T, D), go to a file when they are many.
    Outputs cost L + 1 products with the head per token looked at, so every second token makes
    the whole (L+1)/2 forwards, the head's share included.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, scores: Sequence[LeaveOneOut]) -> None:
        """Prepare for the windows of tokens (N, T) that any of `scores` looks at."""
        self._decoder = decoder
        self._scores = scores
        self._wanted = torch.stack([score.wanted for score in scores])
        self._tokens = tokens
        self._streams: Tensor | None = None
        self._final: Stream | None = None

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """Push every bypassed stream through the resident block, and start the block's own."""
        if self._streams is None:
            windows = int(self._wanted.any(0).any(1).sum())
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

    def result(self) -> Scores:
        """Means over tokens of all the scores."""
        assert self._streams is not None and self._final is not None
        sums = torch.zeros(len(self._scores), len(self._streams), dtype=torch.float64)
        following = self._tokens.roll(-1, 1)
        for at in self._places():
            full = self._log_probabilities(self._final.x[at])
            mine = self._wanted[:, *at]
            for index, stream in enumerate(self._streams):
                skip = self._log_probabilities(stream[at])
                for score, keep, total in zip(self._scores, mine, sums, strict=True):
                    seen = slice(None) if keep.all() else keep.to(full.device)
                    after = following[at][keep].to(full.device)
                    total[index] += score.compare(full[seen], skip[seen], after)
        means = sums / self._wanted.sum((1, 2))[:, None]
        table = {score.name: row.tolist() for score, row in zip(self._scores, means, strict=True)}
        return Scores(num_blocks=len(self._streams), block=table)

    def _places(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (windows, positions) of all tokens looked at, `HEAD_TOKENS` at a time."""
        for chunk in self._wanted.any(0).nonzero().split(HEAD_TOKENS):
            yield chunk[:, 0], chunk[:, 1]

    def _log_probabilities(self, x: Tensor) -> Tensor:
        """(K, V) from final states (K, D); the head looks at each token alone."""
        return log_softmax(self._decoder.logits(x[:, None])[:, 0], dim=-1)


def share_streams(
    collectors: Sequence[W | LeaveOneOut], decoder: Decoder, tokens: Tensor
) -> list[W | Bypass]:
    """The collectors of a walk, with all `LeaveOneOut` scores replaced by one `Bypass`."""
    scores = [each for each in collectors if isinstance(each, LeaveOneOut)]
    others: list[W | Bypass] = [each for each in collectors if not isinstance(each, LeaveOneOut)]
    return [*others, Bypass(decoder, tokens, scores)] if scores else others
