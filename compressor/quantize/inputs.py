"""Which linears of a block share inputs, and which write the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.inputs import inputs_of, outputs_of

_SAME = 0.05  # of what a block adds: more than rounding, less than any norm or factor


class Group(dict[str, nn.Module]):
    """Linears that read the same tensor, by full name, in the order they run."""

    @property
    def leader(self) -> str:
        """The linear that runs first."""
        return next(iter(self))


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
