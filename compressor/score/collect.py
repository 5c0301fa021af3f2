"""One walk for every score that needs only a forward pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from compressor.decoder import Decoder
from compressor.errors import CompressError, NotApplicable
from compressor.methods import Params
from compressor.records import Scores
from compressor.score import METHODS
from compressor.score.leave_one_out import Bypass
from compressor.walk import Step, Stream, walk

_TABLES = ("block", "attention", "ffn", "linear", "depth")


class Collector(Protocol):
    """A score that watches the walk: made with (decoder, tokens, **parameters)."""

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """See one batch pass one block."""

    def result(self) -> Scores:
        """The scores, once every block was seen."""


def score(
    folder: Path,
    tokens: Tensor | None,
    methods: Mapping[str, Params],
    *,
    device: str = "cpu",
    batch_size: int = 4,
) -> Scores:
    """All asked scores of a checkpoint from one walk over tokens (N, T).

    A function sees the weights, or makes its own passes; a class joins the walk. A method that
    this model cannot give is listed in `unavailable` with its reason, and the others go on.
    Raises `NotApplicable` when none is left and `CompressError` naming the part whose score is
    not finite.
    """
    decoder = Decoder(folder, device)
    results: list[Scores] = []
    collectors: list[Collector] = []
    shared: dict[type[Bypass], Bypass] = {}
    unavailable: dict[str, str] = {}
    for name, params in methods.items():
        row = METHODS[name]
        make = row.load()
        inputs: tuple[Any, ...] = (decoder, tokens) if row.needs else (decoder,)
        for kind in getattr(make, "shares", ()):
            shared.setdefault(kind, kind(decoder, tokens))
            inputs = (*inputs, shared[kind])
        try:
            made = make(*inputs, **dict(params))
        except NotApplicable as error:
            unavailable[name] = str(error)
            continue
        (collectors if inspect.isclass(make) else results).append(made)
    if collectors and tokens is not None:
        watching: list[Bypass | Collector] = [*shared.values(), *collectors]
        for step in walk(Stream(decoder, tokens, batch_size), "score"):
            for rows, x_in, x_out in step.advance():
                for watcher in watching:
                    watcher.update(step, rows, x_in, x_out)
        results += [collector.result() for collector in collectors]
    if not results:
        raise NotApplicable("; ".join(f"{name}: {why}" for name, why in unavailable.items()))
    return _merged(results, unavailable)


def _merged(results: list[Scores], unavailable: dict[str, str]) -> Scores:
    tables: dict[str, dict[str, Any]] = {name: {} for name in _TABLES}
    for kind, table in tables.items():
        for scores in results:
            table |= getattr(scores, kind)
        for name, values in table.items():
            _check_finite(name, kind, values)
    distances = next((scores.distances for scores in results if scores.distances), [])
    return Scores(
        num_blocks=results[0].num_blocks, distances=distances, unavailable=unavailable, **tables
    )


def _check_finite(name: str, kind: str, values: list[float] | dict[str, float]) -> None:
    for part, value in values.items() if isinstance(values, dict) else enumerate(values):
        if not math.isfinite(value):
            raise CompressError(
                f"{name} of {kind} {part} is {value}; the activations overflow there: compute "
                "in float32 (device: cpu), or check the checkpoint for damage"
            )
