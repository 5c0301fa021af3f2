"""Which linears of a block share inputs, and the second moments of those inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.inputs import Seen, inputs_of
from compressor.moments import Cross, Gram
from compressor.walk import Step


class Group(dict[str, nn.Module]):
    """Linears that read the same tensor, by full name, in the order they run."""

    @property
    def leader(self) -> str:
        """The linear that runs first."""
        return next(iter(self))


class Moments:
    """Second moments of a group's inputs over all of the text.

    Attributes:
        gram: mean of x x^T in the compressed model, (I, I).
        cross: mean of (x_original - x) x^T, (I, I), or None where there is one stream only.
    """

    def __init__(self, features: int, device: torch.device, paired: bool) -> None:
        """Start empty."""
        self._gram = Gram(features, device)
        self._cross = Cross(features, device) if paired else None

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """Add inputs (..., I) and, in paired streams, the original model's."""
        self._gram.add(x)
        if self._cross:
            assert original is not None
            self._cross.add(original, x)

    @property
    def gram(self) -> Tensor:
        """H."""
        return self._gram.mean

    @property
    def cross(self) -> Tensor | None:
        """C."""
        return self._cross.mean if self._cross else None


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


def quantize_in_turn(
    step: Step,
    original: Step | None,
    groups: list[Group],
    quantize: Callable[[Group, Moments], None],
) -> None:
    """Quantize each group of a block the moment its inputs arrive (true sequential order).

    The first batch runs through the block once. Just before a group's first linear would run,
    `quantize` gets the moments of the group's inputs and replaces its weights, and the same
    forward goes on through them. The other batches run again from the start to every group,
    which is why the stream is best cut into one batch where memory allows: then nothing runs
    twice. `original` is the same block of the original model with the other stream.
    Both streams are past their first batch afterwards.
    """
    by_leader = {group.leader: group for group in groups}
    prefix = f"{step.stream.decoder.blocks.prefix}.{step.index}."
    leaders = {name: step.block.get_submodule(name.removeprefix(prefix)) for name in by_leader}
    teachers: dict[str, nn.Module] = {}
    taught: dict[str, Tensor] = {}
    if original:
        for name in by_leader:
            teachers[name] = original.block.get_submodule(name.removeprefix(prefix))
        with inputs_of(teachers, taught.__setitem__):
            next(original.advance())
    others = step.stream.batches[1:]

    def arrive(name: str, x: Tensor) -> None:
        group = by_leader.pop(name, None)
        if group is None:  # a run of another batch to a later group, or a linear that runs twice
            return
        moments = Moments(x.shape[-1], x.device, original is not None)
        moments.add(x, taught.pop(name, None))
        for rows in others:
            truth = _stop_at(original, teachers, name, rows) if original else None
            moments.add(_stop_at(step, leaders, name, rows), truth)
        quantize(group, moments)

    with inputs_of(leaders, arrive):
        next(step.advance())


def _stop_at(step: Step, linears: dict[str, nn.Module], name: str, rows: slice) -> Tensor:
    """What a linear reads when a batch runs; the forward stops there."""
    seen: list[Tensor] = []

    def take(_: str, x: Tensor) -> None:
        seen.append(x)
        raise Seen

    with inputs_of({name: linears[name]}, take), suppress(Seen):
        step.run(step.stream.x[rows])
    return seen[0]
