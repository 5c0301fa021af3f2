"""Quantizing the groups of a block in turn, each on the inputs that those before it made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.blocks import weight_of
from compressor.inputs import Seen, inputs_of, outputs_of
from compressor.moments import Cross, Gram
from compressor.quantize.inputs import Group
from compressor.walk import Step

_TOKENS = 1024  # whose differences are in memory at once


class Reading(NamedTuple):
    """What a linear reads, x (..., I), and the residual stream (B, T, D) its output is added to.

    `stream` is None where the output is added to none.
    """

    x: Tensor
    stream: Tensor | None


class Moments(NamedTuple):
    """Second moments of what a group reads, over all of the text; tokens may be weighted.

    Attributes:
        gram: H, mean of x x^T in the compressed model, (I, I).
        cross: C, mean of (x_original - x) x^T, (I, I), or None where there is one model only or
            the next is known.
        lack: L, mean of (W (x_original - x) + share (h_original - h)) x^T, (O, I), for h the
            residual stream that the output is added to, or None where it is added to none.
    """

    gram: Tensor
    cross: Tensor | None = None
    lack: Tensor | None = None


class Catching(NamedTuple):
    """How linears that write the residual stream are corrected.

    Attributes:
        share: of what the stream lost, what is to be made up for.
        fade: tokens count ||h||^-fade, h being the stream behind the linear in the original.
    """

    share: float = 0.0
    fade: float = 0.0


def moments_of(
    pairs: Iterable[tuple[Reading, Reading | None]], weight: Tensor, catching: Catching
) -> Moments:
    """The moments of batches as the compressed model reads them and, of two, the original.

    weight (O, I) is W. Where there is a stream, token t counts ||h_original + W x_original||^-fade
    in H and L: norms further on divide its error by about that length.
    Differences are formed in float32, before they are multiplied: streams that are equal give
    exact zeros, and two in half precision what they differ by.
    """
    (outputs, inputs), device = weight.shape, weight.device
    gram = Gram(inputs, device)
    cross: Cross | None = None
    lack: Cross | None = None
    for (x, h), original in pairs:
        if original is None:
            gram.add(x)
        elif h is None or original.stream is None:
            gram.add(x)
            cross = cross or Cross(inputs, inputs, device)
            for own, there in _parts(x, original.x):
                cross.add(there.float() - own.float(), own)
        else:
            lack = lack or Cross(outputs, inputs, device)
            for own, there, lost, kept in _parts(x, original.x, h, original.stream):
                counts = _counts(kept, there, weight, catching.fade)
                gram.add(own.float() * counts.sqrt())
                off = there.float() - own.float()
                short = linear(off, weight.to(off.dtype)).float()
                short.add_(kept.float() - lost.float(), alpha=catching.share)
                lack.add(short.mul_(counts), own)
    return Moments(gram.mean, cross.mean if cross else None, lack.mean if lack else None)


def _counts(before: Tensor, x: Tensor, weight: Tensor, fade: float) -> Tensor:
    """What each token counts by the stream (N, D) behind the linear, 1 at a root mean square of 1.

    (N, 1), or one number for all where none fades.
    """
    if not fade:
        return torch.ones((), device=x.device)
    h = before + linear(x, weight.to(x.dtype))
    return h.float().square().mean(-1, keepdim=True).clamp_(min=1e-30).pow_(-fade / 2)


def _parts(*readings: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `_TOKENS` tokens of each of (..., C), so that little is in float32 at once."""
    rows = (each.reshape(-1, each.shape[-1]).split(_TOKENS) for each in readings)
    return zip(*rows, strict=True)


def quantize_in_turn(
    step: Step,
    original: Step | None,
    groups: list[Group],
    quantize: Callable[[Group, Moments], None],
    writers: Mapping[str, Catching] | None = None,
) -> None:
    """Quantize each group of a block the moment its inputs arrive (true sequential order).

    The first batch runs through the block once. Just before a group's first linear would run,
    `quantize` gets the moments of the group's inputs and replaces its weights, and the same
    forward goes on through them. The other batches run again from the start to every group,
    which is why the stream is best cut into one batch where memory allows: then nothing runs
    twice. `original` is the same block of the original model with the other stream; `writers`
    are the linears whose outputs are added to the stream (`stream_writers`) and how they are
    corrected.
    Both streams are past their first batch afterwards.
    """
    by_leader = {group.leader: group for group in groups}
    prefix = f"{step.stream.decoder.blocks.prefix}.{step.index}."
    catching = writers or {}
    here = _Side(step, prefix, catching)
    there = _Side(original, prefix, catching) if original else None
    first, *others = step.stream.batches
    taught: dict[str, Reading] = {}

    def learn(name: str, reading: Reading) -> None:
        kept = None if reading.stream is None else reading.stream.clone()
        taught[name] = Reading(reading.x, kept)

    if there:
        with there.readings(list(by_leader), first, learn):
            next(there.step.advance())

    def pairs(name: str, reading: Reading) -> Iterator[tuple[Reading, Reading | None]]:
        yield reading, taught.pop(name, None)
        for rows in others:
            yield here.stop_at(name, rows), there.stop_at(name, rows) if there else None

    def arrive(name: str, reading: Reading) -> None:
        group = by_leader.pop(name, None)
        if group is None:  # a run of another batch to a later group, or a linear that runs twice
            return
        weight = weight_of(group[name])
        moments = moments_of(pairs(name, reading), weight, catching.get(name, Catching()))
        quantize(group, moments)

    with here.readings(list(by_leader), first, arrive):
        next(step.advance())


class _Side(NamedTuple):
    """A block in one of the two models; `prefix` comes off a name to find the module in it."""

    step: Step
    prefix: str
    writers: Collection[str]

    def stop_at(self, name: str, rows: slice) -> Reading:
        """What a linear reads when a batch runs; the forward stops there."""
        seen: list[Reading] = []

        def take(_: str, reading: Reading) -> None:
            seen.append(reading)
            raise Seen

        with self.readings([name], rows, take), suppress(Seen):
            self.step.run(self.step.stream.x[rows])
        return seen[0]

    @contextmanager
    def readings(
        self, names: Collection[str], rows: slice, see: Callable[[str, Reading], None]
    ) -> Iterator[None]:
        """Call `see` before each of these linears runs on a batch.

        The stream it gets is added to as the block goes on.
        """
        decoder, waiting = self.step.stream.decoder, set(self.writers)
        h = self.step.stream.x[rows].to(decoder.device, copy=True) if waiting else None

        def written(name: str, output: Tensor) -> None:
            if h is not None and name in waiting:  # once: other batches run meanwhile
                waiting.remove(name)
                h.add_(output.view_as(h))

        def read(name: str, x: Tensor) -> None:
            see(name, Reading(x, h if name in self.writers else None))

        with (
            inputs_of(self._modules(names), read),
            outputs_of(self._modules(self.writers), written),
        ):
            yield

    def _modules(self, names: Collection[str]) -> dict[str, nn.Module]:
        block, prefix = self.step.block, self.prefix
        return {name: block.get_submodule(name.removeprefix(prefix)) for name in names}
