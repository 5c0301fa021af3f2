"""A model with parts removed, tried over fixed windows without removing them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compressor import progress
from compressor.cut import CutModel, Op, common, operations
from compressor.decoder import Decoder
from compressor.records import Selection


@dataclass(frozen=True)
class Quality:
    """How a cut model does on the windows, and how close it is to the full one.

    Attributes:
        loss: mean next-token loss, nats per token.
        window_losses: the same of each window.
        kl: KL(full || cut) in nats per token.
        top1_agreement: share of positions whose likeliest next token is the full model's.
    """

    loss: float
    window_losses: list[float]
    kl: float
    top1_agreement: float


class Trial:
    """What the searches ask: the loss, the states and the agreement of a model with parts removed.

    Attributes:
        decoder, tokens, batch_size: the model and the windows (N, T) it reads.
        num_blocks: L.
        spent: forwards of the full model over all tokens so far, counted in sublayers / 2L. It
            counts what was asked, not what ran, so that a resumed search reports the same.
    """

    def __init__(
        self, decoder: Decoder, tokens: Tensor, *, batch_size: int = 4, log: Path | None = None
    ) -> None:
        """Embed the tokens; `log` is a file of measures from which a killed search replays."""
        self.decoder, self.tokens, self.batch_size = decoder, tokens, batch_size
        self.num_blocks = len(decoder.blocks)
        self.spent = 0.0
        self._model = CutModel(decoder, tokens, batch_size)
        self._last: tuple[Op, ...] = ()
        self._known: dict[tuple[str, tuple[Op, ...]], float] = {}
        self._log = _Log(log) if log else None

    def beside(self, tokens: Tensor) -> Trial:
        """The same model on other windows (N, T); both hold its blocks once."""
        other = Trial(self.decoder, tokens, batch_size=self.batch_size)
        other._model.weights = self._model.weights
        return other

    def loss(self, selection: Selection) -> float:
        """Mean next-token loss over N (T - 1) tokens, nats; infinite where the cut overflows."""
        return self._asked("loss", selection, self._measure_loss)

    def distance(self, selection: Selection) -> float:
        """Mean squared difference of `states` to the full model's; infinite on overflow."""
        return self._asked("distance", selection, self._measure_distance)

    def try_all(
        self,
        measure: Callable[[Selection], float],
        selections: Sequence[Selection],
        bar: progress.Task,
    ) -> list[float]:
        """`measure` of each, taken in the order in which neighbours share the longest start."""
        keys = [_sortable(operations(s, self.num_blocks)) for s in selections]
        found = [math.inf] * len(selections)
        for index in sorted(range(len(selections)), key=keys.__getitem__):
            found[index] = measure(selections[index])
            bar.advance(1, f"{found[index]:.4f}")
        return found

    @torch.no_grad()
    def states(self, selection: Selection) -> Tensor:
        """What the head reads, (N, T, D) in float32: the stream behind the final norm."""
        return self._normed(self._stream(selection))

    @torch.no_grad()
    def compare(self, selection: Selection) -> Quality:
        """Loss of the cut model, and its distributions against the full one's."""
        full, cut = self._full, self._stream(selection)
        losses: list[float] = []
        kl = agreement = 0.0
        for window in range(len(self.tokens)):
            p, q = self._log_probabilities(full, window), self._log_probabilities(cut, window)
            losses.append(self._loss(q, window))
            kl += kl_div(q, p, reduction="sum", log_target=True).double().item() / len(p)
            agreement += (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        count = len(self.tokens)
        return Quality(math.fsum(losses) / count, losses, kl / count, agreement / count)

    @cached_property
    def _full(self) -> Tensor:
        return self._stream(Selection(num_blocks=self.num_blocks))

    def _stream(self, selection: Selection) -> Tensor:
        ops = operations(selection, self.num_blocks)
        self._charge(ops)
        return self._model.stream(ops)

    def _charge(self, ops: tuple[Op, ...]) -> None:
        """Count what `ops` cost behind what they share with those before them."""
        shared = common(self._last, ops)
        self._last = ops
        ran = ops[shared - shared % self._model.stride :]
        sublayers = sum((a is not None) + (f is not None) for _, a, f in ran)
        self.spent += sublayers / (2 * self.num_blocks)

    def _asked(
        self, name: str, selection: Selection, measure: Callable[[tuple[Op, ...]], float]
    ) -> float:
        """A measure of a cut: remembered, read from the log, or taken now."""
        ops = operations(selection, self.num_blocks)
        if (name, ops) not in self._known:
            self._charge(ops)
            value = self._log.known.get((name, ops)) if self._log else None
            if value is None:
                value = measure(ops)
                value = value if math.isfinite(value) else math.inf
                if self._log:
                    self._log.add(name, ops, value)
            self._known[name, ops] = value
        return self._known[name, ops]

    @torch.no_grad()
    def _measure_loss(self, ops: tuple[Op, ...]) -> float:
        x = self._model.stream(ops)
        losses = [
            self._loss(self._log_probabilities(x, window), window)
            for window in range(len(self.tokens))
        ]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _measure_distance(self, ops: tuple[Op, ...]) -> float:
        difference = self._normed(self._model.stream(ops)) - self._full_states
        return difference.double().square().mean().item()

    @cached_property
    def _full_states(self) -> Tensor:
        return self.states(Selection(num_blocks=self.num_blocks))

    def _normed(self, x: Tensor) -> Tensor:
        return torch.cat([self.decoder.normed(x[rows]).cpu() for rows in self._model.batches])

    def _log_probabilities(self, x: Tensor, window: int) -> Tensor:
        """(T - 1, V) of one window, so that few logits exist at once."""
        return log_softmax(self.decoder.logits(x[window : window + 1])[0, :-1], dim=-1)

    def _loss(self, scores: Tensor, window: int) -> float:
        targets = self.tokens[window, 1:].to(scores.device)
        return -scores.gather(1, targets[:, None]).double().mean().item()


class _Log:
    """Measures of cuts in a JSON lines file; a line that a kill cut short is dropped."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.known: dict[tuple[str, tuple[Op, ...]], float] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        for line in whole.splitlines():
            name, ops, value = json.loads(line)
            self.known[name, tuple(tuple(op) for op in ops)] = value
        path.write_text(whole, encoding="utf-8")

    def add(self, name: str, ops: tuple[Op, ...], value: float) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, ops, value]) + "\n")


def _sortable(ops: tuple[Op, ...]) -> list[list[int]]:
    return [[-1 if part is None else part for part in op] for op in ops]
