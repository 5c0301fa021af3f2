"""Which linears of a block share inputs, and the second moments of those inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.inputs import Seen, inputs_of, outputs_of
from compressor.moments import Cross, Gram
from compressor.walk import Step

_SAME = 0.05  # of what a block adds: more than rounding, less than any norm or factor


class Group(dict[str, nn.Module]):
    """Linears that read the same tensor, by full name, in the order they run."""

    @property
    def leader(self) -> str:
        """The linear that runs first."""
        return next(iter(self))


class Reading(NamedTuple):
    """What a linear reads, x (..., I), and the residual stream (B, T, D) its output is added to.

    `stream` is None where the output is added to none.
    """

    x: Tensor
    stream: Tensor | None


class Moments:
    """Second moments of what a group reads, over all of the text.

    Attributes:
        gram: mean of x x^T in the compressed model, (I, I).
        cross: mean of (x_original - x) x^T, (I, I), or None where there is one model only.
        lag: mean of (h_original - h) x^T, (D, I), for h the residual stream that the output is
            added to, or None where there is none.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        """Start empty."""
        self._gram = Gram(features, device)
        self._cross: Cross | None = None
        self._lag: Cross | None = None

    def add(self, here: Reading, there: Reading | None) -> None:
        """Add a batch as the compressed model reads it and, of two, as the original does."""
        x = here.x
        self._gram.add(x)
        if there is None:
            return
        self._cross = self._cross or Cross(x.shape[-1], x.device)
        self._cross.add(there.x, x)
        if here.stream is not None and there.stream is not None:
            rows = here.stream.shape[-1]
            self._lag = self._lag or Cross(x.shape[-1], x.device, rows)
            self._lag.add(there.stream, here.stream, x)

    @cached_property
    def gram(self) -> Tensor:
        """H, once all was added; the sum is let go, as it is in the others."""
        mean = self._gram.mean
        del self._gram
        return mean

    @cached_property
    def cross(self) -> Tensor | None:
        """C, once all was added."""
        mean = None if self._cross is None else self._cross.mean
        del self._cross
        return mean

    @cached_property
    def lag(self) -> Tensor | None:
        """R, once all was added."""
        mean = None if self._lag is None else self._lag.mean
        del self._lag
        return mean


def input_groups(decoder: Decoder, x: Tensor, index: int) -> list[Group]:
    """Linears of the resident block `index` in the order they run, grouped by shared input.

    Found by running a small residual stream x (B, T, D), of a shape that was embedded before,
    and watching, so no family has to declare it.
    Raises `QuantizationError` for a linear that the block's forward never runs.
    """
    linears = decoder.blocks.linears(index)
    groups: list[Group] = []
    inputs: list[Tensor] = []

    def watch(name: str, read: Tensor) -> None:
        for group, known in zip(groups, inputs, strict=True):
            if read is known:
                group[name] = linears[name]
                return
        inputs.append(read)
        groups.append(Group({name: linears[name]}))

    with inputs_of(linears, watch):
        decoder.run(index, x)
    silent = sorted(linears.keys() - {name for group in groups for name in group})
    if silent:
        raise QuantizationError(f"{silent[0]} is never run by its block's forward")
    return groups


def stream_writers(
    decoder: Decoder, x: Tensor, index: int, linears: dict[str, nn.Module]
) -> frozenset[str]:
    """The names of `linears` when block `index` adds to its input their outputs and no more.

    Seen by running x (B, T, D) as in `input_groups`. None of them for a block that normalises
    or scales what it adds (Gemma 2): what such a linear does to the stream is not linear in it.
    """
    total = x.clone()

    def add(_: str, output: Tensor) -> None:
        total.add_(output.view_as(total))

    with outputs_of(linears, add):
        out = decoder.run(index, x)
    same = (out - total).norm() <= _SAME * (out - x).norm()
    return frozenset(linears) if same else frozenset()


def quantize_in_turn(
    step: Step,
    original: Step | None,
    groups: list[Group],
    quantize: Callable[[Group, Moments], None],
    writers: Collection[str] = (),
) -> None:
    """Quantize each group of a block the moment its inputs arrive (true sequential order).

    The first batch runs through the block once. Just before a group's first linear would run,
    `quantize` gets the moments of the group's inputs and replaces its weights, and the same
    forward goes on through them. The other batches run again from the start to every group,
    which is why the stream is best cut into one batch where memory allows: then nothing runs
    twice. `original` is the same block of the original model with the other stream; `writers`
    are the linears whose outputs are added to the stream (`stream_writers`).
    Both streams are past their first batch afterwards.
    """
    by_leader = {group.leader: group for group in groups}
    first, *others = step.stream.batches
    taught: dict[str, Reading] = {}

    def learn(name: str, there: Reading) -> None:
        kept = None if there.stream is None else there.stream.clone()
        taught[name] = Reading(there.x, kept)

    if original:
        with _readings(original, list(by_leader), writers, first, learn):
            next(original.advance())

    def arrive(name: str, here: Reading) -> None:
        group = by_leader.pop(name, None)
        if group is None:  # a run of another batch to a later group, or a linear that runs twice
            return
        moments = Moments(here.x.shape[-1], here.x.device)
        moments.add(here, taught.pop(name, None))
        for rows in others:
            there = _stop_at(original, name, writers, rows) if original else None
            moments.add(_stop_at(step, name, writers, rows), there)
        quantize(group, moments)

    with _readings(step, list(by_leader), writers, first, arrive):
        next(step.advance())


def _stop_at(step: Step, name: str, writers: Collection[str], rows: slice) -> Reading:
    """What a linear reads when a batch runs; the forward stops there."""
    seen: list[Reading] = []

    def take(_: str, reading: Reading) -> None:
        seen.append(reading)
        raise Seen

    with _readings(step, [name], writers, rows, take), suppress(Seen):
        step.run(step.stream.x[rows])
    return seen[0]


@contextmanager
def _readings(
    step: Step,
    names: Collection[str],
    writers: Collection[str],
    rows: slice,
    see: Callable[[str, Reading], None],
) -> Iterator[None]:
    """Call `see` before each linear of `names` runs on the batch `rows`.

    The stream it gets goes on changing as the block runs.
    """
    prefix = f"{step.stream.decoder.blocks.prefix}.{step.index}."

    def modules(these: Collection[str]) -> dict[str, nn.Module]:
        return {name: step.block.get_submodule(name.removeprefix(prefix)) for name in these}

    stream = step.stream.x[rows].to(step.stream.decoder.device, copy=True) if writers else None
    waiting = set(writers)

    def written(name: str, output: Tensor) -> None:
        if stream is not None and name in waiting:  # not when other batches run meanwhile
            waiting.remove(name)
            stream.add_(output.view_as(stream))

    def read(name: str, x: Tensor) -> None:
        see(name, Reading(x, stream if name in writers else None))

    with inputs_of(modules(names), read), outputs_of(modules(writers), written):
        yield
