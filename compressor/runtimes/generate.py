"""Choosing tokens: greedy or sampled, one at a time, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import numpy as np

from compressor.runtimes.base import Runtime

Finish = Literal["", "eos", "length", "context", "stopped"]


class Sampler:
    """Draws the next token from softmax(logits / temperature), cut to its nucleus.

    The nucleus is the fewest likeliest tokens that together hold `top_p` of the probability
    (arXiv:1904.09751, section 3.1). Temperature 0 takes the likeliest token. Equal seeds give
    equal draws, on any runtime with equal logits.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        """Begin the sequence of draws anew."""
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token, by float logits (V,)."""
        if self._temperature == 0:
            return int(logits.argmax())
        scaled = (logits - logits.max()).astype(np.float64) / self._temperature
        likeliest = np.argsort(-scaled, kind="stable")
        mass = np.exp(scaled[likeliest]).cumsum()
        kept = np.searchsorted(mass, self._top_p * mass[-1]) + 1
        mass = mass[:kept]
        drawn = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(likeliest[min(drawn, len(mass) - 1)])


class Generation:
    """One answer: iterate over it to get its tokens; then it says what it took.

    The tokens that the runtime's cache begins with already are not read again.

    Attributes:
        finish: why it ended: an `eos` token (which is not given), the `length` asked for, a full
            `context`, or `stopped`.
        tokens: the answer so far.
        read: how many tokens of the prompt were read, in `prefill_seconds`.
        decode_seconds: for all tokens but the first, which the prompt's own logits give.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        eos: Collection[int] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare; nothing is read yet. `stop` is asked after every token."""
        self.finish: Finish = ""
        self.tokens: list[int] = []
        self.read = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._runtime, self._prompt, self._sampler = runtime, prompt, sampler
        self._count, self._eos, self._stop = max_new_tokens, eos, stop

    def __iter__(self) -> Iterator[int]:
        """Read the prompt, then give one token after the other.

        Raises `InferenceError` for a prompt longer than the context.
        """
        began = time.perf_counter()
        rest = self._prompt[self._runtime.keep(self._prompt) :]
        token = self._sampler(self._runtime.prefill(rest))
        self.prefill_seconds, self.read = time.perf_counter() - began, len(rest)
        while True:
            if token in self._eos:
                self.finish = "eos"
                return
            self.tokens.append(token)
            yield token
            if self._done():
                return
            began = time.perf_counter()
            token = self._sampler(self._runtime.step(token))
            self.decode_seconds += time.perf_counter() - began

    @property
    def decode_rate(self) -> float | None:
        """Tokens/s behind the first one, None where there is only that."""
        steps = len(self.tokens) - (self.finish != "eos")
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else None

    @property
    def prefill_rate(self) -> float:
        """Tokens/s of the prompt, the choice of the first token included."""
        return self.read / self.prefill_seconds

    def _done(self) -> bool:
        limit = self._runtime.facts.context
        if self._stop():
            self.finish = "stopped"
        elif len(self.tokens) >= self._count:
            self.finish = "length"
        elif limit and len(self._runtime.tokens) >= limit:
            self.finish = "context"
        return bool(self.finish)
