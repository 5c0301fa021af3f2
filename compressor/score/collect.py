"""One walk for every score that needs no more than a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import progress
from compressor.decoder import Decoder, all_finite
from compressor.errors import CompressError, NotApplicable
from compressor.methods import Params
from compressor.records import Scores
from compressor.score import METHODS
from compressor.score.collector import Collector, Watcher
from compressor.walk import Step, Stream, walk

_TABLES = ("block", "attention", "ffn", "linear", "depth")
_REMEDY = (
    "; the activations overflow there: compute in float32 (device: cpu), or check the checkpoint "
    "for damage"
)


def score(
    folder: Path,
    tokens: Tensor | None,
    methods: Mapping[str, Params],
    *,
    device: str = "cpu",
    batch_size: int = 4,
) -> Scores:
    """All asked scores of a checkpoint from one walk over tokens (N, T).

    A function makes its own passes over weights or tokens; a class joins the walk. A method that
    this model cannot give is listed in `unavailable` with its reason, and the others go on.
    Raises `NotApplicable` when none is left and `CompressError` naming the block whose output, or
    the part whose score, is not finite.
    """
    crew = _Crew(Decoder(folder, device), tokens)
    for name, params in methods.items():
        with crew.applicable(name):
            crew.add(name, params)
    if tokens is not None and any(METHODS[name].needs for name in crew.collectors):
        crew.walk(Stream(crew.decoder, tokens, batch_size))
    elif crew.collectors:
        crew.visit()
    for name, collector in tuple(crew.collectors.items()):
        with crew.applicable(name):
            crew.results.append(collector.result())
    if not crew.results:
        raise NotApplicable("; ".join(f"{name}: {why}" for name, why in crew.unavailable.items()))
    return _merged(crew.results, crew.unavailable, crew.decoder.blocks.absent)


class _Crew:
    """The collectors that share one walk, what they share, and what came of the others."""

    def __init__(self, decoder: Decoder, tokens: Tensor | None) -> None:
        self.decoder = decoder
        self.tokens = tokens
        self.collectors: dict[str, Collector] = {}
        self.watchers: dict[type[Watcher], Watcher] = {}
        self.results: list[Scores] = []
        self.unavailable: dict[str, str] = {}

    @contextmanager
    def applicable(self, name: str) -> Iterator[None]:
        """Let a method go, with its reason, when it turns out not to fit the model."""
        try:
            yield
        except NotApplicable as error:
            self.unavailable[name] = str(error)
            self.collectors.pop(name, None)

    def add(self, name: str, params: Params) -> None:
        make = METHODS[name].load()
        inputs = (self.decoder, self.tokens) if METHODS[name].needs else (self.decoder,)
        made: Scores | Collector = make(*inputs, *self._shared(make), **dict(params))
        if isinstance(made, Scores):
            self.results.append(made)
        else:
            self.collectors[name] = made

    def _shared(self, make: Any) -> list[Watcher]:
        for kind in getattr(make, "shares", ()):
            if kind not in self.watchers:
                self.watchers[kind] = kind(self.decoder, self.tokens, *self._shared(kind))
        return [self.watchers[kind] for kind in getattr(make, "shares", ())]

    def walk(self, stream: Stream) -> None:
        """Show every batch of every block to the watchers, then to the collectors."""
        for step in walk(stream, "score"):
            for batch in self._batches(step):
                if not all_finite(batch[-1]):
                    raise CompressError(f"the output of block {step.index} is not finite{_REMEDY}")
                for watcher in self.watchers.values():
                    watcher.update(step, *batch)
                for name, collector in tuple(self.collectors.items()):
                    with self.applicable(name):
                        collector.update(step, *batch)
            self._leave(step.index)

    def visit(self) -> None:
        """Show every block's weights; nothing is run."""
        blocks = self.decoder.blocks
        for index in progress.track(range(len(blocks)), "score", len(blocks)):
            with self.decoder.resident(index), torch.no_grad():
                self._leave(index)

    def _leave(self, index: int) -> None:
        for name, collector in tuple(self.collectors.items()):
            with self.applicable(name):
                collector.leave(index)

    def _batches(self, step: Step) -> Iterator[tuple[slice, Tensor, Tensor]]:
        batches = step.advance()
        while True:
            with ExitStack() as hooks:
                for watcher in (*self.watchers.values(), *self.collectors.values()):
                    hooks.enter_context(watcher.watching(step))
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _merged(
    results: list[Scores], unavailable: dict[str, str], absent: dict[str, list[int]]
) -> Scores:
    tables: dict[str, dict[str, Any]] = {name: {} for name in _TABLES}
    for kind, table in tables.items():
        for scores in results:
            table |= getattr(scores, kind)
        for name, values in table.items():
            _check_finite(name, kind, values)
    distances = next((scores.distances for scores in results if scores.distances), [])
    tables |= {"unavailable": unavailable, "absent": absent}
    return Scores(num_blocks=results[0].num_blocks, distances=distances, **tables)


def _check_finite(name: str, kind: str, values: list[float] | dict[str, float]) -> None:
    for part, value in values.items() if isinstance(values, dict) else enumerate(values):
        if not math.isfinite(value):
            raise CompressError(f"{name} of {kind} {part} is {value}{_REMEDY}")
