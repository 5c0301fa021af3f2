"""What a scale of a linear's inputs can be folded into, found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blocks import LINEAR, weight_of
from compressor.decoder import Decoder
from compressor.inputs import inputs_of, outputs_of
from compressor.quantize.inputs import Group

_SAME = 0.01  # of what a block adds: more than rounding, less than a scale that does not cancel


@dataclass(frozen=True)
class Fold:
    """A module whose parameters, divided by scales, divide what a group reads by them.

    Attributes:
        name: its full name: a norm, or a linear that the inputs are proportional to (v, up).
        module: itself.
        rows: of each input, the element of the norm or the row of the matrix, (I,); query heads
            that share values share rows.
        offset: what the norm adds to its weight before it multiplies (1 in Gemma).
    """

    name: str
    module: nn.Module
    rows: Tensor
    offset: float = 0.0

    def mean(self, inputs: Tensor) -> Tensor:
        """One number a row, (R,), from one an input, (I,): the mean of those that share it."""
        counts = self.rows.bincount()
        return inputs.new_zeros(len(counts)).index_add_(0, self.rows, inputs) / counts

    @torch.no_grad()
    def divide(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Divide by scale (R,) and return what each input was divided by, (I,).

        Vectors are rounded to `dtype`, in which they are stored, and the scale returned is that
        of the rounded norm. Where a norm multiplies by zero it stays, with scale 1.
        """
        if isinstance(self.module, LINEAR):
            weight_of(self.module).data.div_(scale.unsqueeze(1))
        else:
            weight = self.module.weight
            assert isinstance(weight, Tensor)
            divided = ((weight + self.offset) / scale - self.offset).to(dtype).to(weight)
            before, after = weight + self.offset, divided + self.offset
            fits = (before != 0) & (after != 0)
            scale = torch.where(fits, before / after, 1)
            weight.copy_(torch.where(fits, divided, weight))
        bias = self.module.bias if hasattr(self.module, "bias") else None
        if isinstance(bias, Tensor):
            bias.copy_((bias / scale).to(dtype))
        return scale[self.rows]

    def vectors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its norm weight and its bias by full name, as they are stored."""
        own = self.module.named_parameters(self.name)
        return {name: each.data.to(dtype) for name, each in own if each.ndim == 1}


def multiply(group: Group, scale: Tensor) -> None:
    """Multiply the columns of a group's matrices by scale (I,)."""
    for linear in group.values():
        weight_of(linear).data.mul_(scale)


@torch.no_grad()
def find_fold(
    decoder: Decoder, probe: Tensor, index: int, before: list[Group], group: Group
) -> Fold | None:
    """What a group's scales fold into, in the resident block `index`; None when nothing does.

    Tried in turn: the norm whose output the group reads, as it is and as one that adds 1 to its
    weight, then the linears that ran `before`, the latest first. It is the one that leaves the
    output of the block as it was, on a stream `probe` (B, T, D), when random powers of two are
    folded into it.
    """
    out = decoder.run(index, probe)
    for fold in _candidates(decoder, probe, index, before, group):
        weights = [weight_of(linear).data for linear in group.values()]
        with _restored([*(each.data for each in fold.module.parameters()), *weights]):
            draw = torch.Generator().manual_seed(0)
            powers = torch.randint(-2, 3, (int(fold.rows.max()) + 1,), generator=draw)
            multiply(group, fold.divide((2.0**powers).to(probe), probe.dtype))
            off = decoder.run(index, probe) - out
        if off.norm() <= _SAME * (out - probe).norm():
            return fold
    return None


def _candidates(
    decoder: Decoder, probe: Tensor, index: int, before: list[Group], group: Group
) -> Iterator[Fold]:
    width = weight_of(group[group.leader]).shape[1]
    inputs = torch.arange(width, device=decoder.device)
    for name, norm in _makers(decoder, probe, index, group, width):
        yield Fold(name, norm, inputs)
        yield Fold(name, norm, inputs, offset=1.0)
    config: Any = decoder.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, linear in reversed([pair for each in before for pair in each.items()]):
        count = len(weight_of(linear))
        if count == width:
            yield Fold(name, linear, inputs)
        elif width % count == count % head == 0:
            yield Fold(name, linear, inputs // head // (width // count) * head + inputs % head)


def _makers(
    decoder: Decoder, probe: Tensor, index: int, group: Group, width: int
) -> list[tuple[str, nn.Module]]:
    """The norms whose output is the very tensor that a group reads."""
    norms = {
        f"{decoder.blocks.prefix}.{index}.{name}": module
        for name, module in decoder.blocks.layers[index].named_modules()
        if [each.shape for each in module.parameters(recurse=False)][:1] == [(width,)]
    }
    made: dict[str, Tensor] = {}
    read: list[Tensor] = []
    with (
        outputs_of(norms, made.__setitem__),
        inputs_of({group.leader: group[group.leader]}, lambda _, x: read.append(x)),
    ):
        decoder.run(index, probe)
    return [(name, norms[name]) for name, output in made.items() if output is read[0]]


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    """Give tensors their values back after a `with` block."""
    kept = [each.clone() for each in tensors]
    try:
        yield
    finally:
        for each, value in zip(tensors, kept, strict=True):
            each.copy_(value)
