"""One walk for every score that needs only a forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from compressor.decoder import Decoder
from compressor.errors import CompressError
from compressor.methods import Params
from compressor.records import Scores
from compressor.score import METHODS
from compressor.walk import Step, Stream, walk


class Collector(Protocol):
    """A score that watches the walk: made with (num_blocks, tokens, **parameters)."""

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

    Raises `CompressError` naming the block when a score is not finite.
    """
    decoder = Decoder(folder, device)
    results: list[Scores] = []
    collectors: list[Collector] = []
    for name, params in methods.items():
        make = METHODS[name].load()
        if METHODS[name].text:
            assert tokens is not None
            collectors.append(make(len(decoder.blocks), tokens, **dict(params)))
        else:
            results.append(make(decoder, **dict(params)))
    if collectors and tokens is not None:
        for step in walk(Stream(decoder, tokens, batch_size), "score"):
            for rows, x_in, x_out in step.advance():
                for collector in collectors:
                    collector.update(step, rows, x_in, x_out)
        results += [collector.result() for collector in collectors]
    return _merged(results)


def _merged(results: list[Scores]) -> Scores:
    block = {name: values for scores in results for name, values in scores.block.items()}
    for name, values in block.items():
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise CompressError(
                    f"{name} of block {index} is {value}; the activations overflow there: compute "
                    "in float32 (device: cpu), or check the checkpoint for damage"
                )
    distances = next((scores.distances for scores in results if scores.distances), [])
    return Scores(num_blocks=results[0].num_blocks, block=block, distances=distances)
