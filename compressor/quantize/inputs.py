"""Which linears of a block share inputs, and the second moments of those inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from compressor.blocks import weight_of
from compressor.errors import QuantizationError
from compressor.moments import Gram
from compressor.walk import Step

Group = list[tuple[str, nn.Module]]
"""Linears that read the same tensor, by full name."""


class _Seen(Exception):
    """Stops a block's forward once the awaited input was seen."""


def input_groups(step: Step, linears: dict[str, nn.Module]) -> list[Group]:
    """Linears of a block in the order they run, grouped by sharing one input tensor.

    Found by running one window and watching, so no family has to declare it.
    Raises `QuantizationError` for a linear that the block's forward never runs.
    """
    groups: list[Group] = []
    inputs: list[Tensor] = []

    def watch(name: str, x: Tensor) -> None:
        for group, known in zip(groups, inputs, strict=True):
            if x is known:
                group.append((name, linears[name]))
                return
        inputs.append(x)
        groups.append([(name, linears[name])])

    with _inputs_of(linears, watch):
        step.run(next(step.inputs())[:1])
    silent = sorted(linears.keys() - {name for group in groups for name, _ in group})
    if silent:
        raise QuantizationError(f"{silent[0]} is never run by its block's forward")
    return groups


def input_gram(step: Step, linear: nn.Module) -> Tensor:
    """Mean of x x^T over the whole stream, (I, I); forwards stop at the linear."""
    weight = weight_of(linear)
    gram = Gram(weight.shape[1], weight.device)

    def take(_: str, x: Tensor) -> None:
        gram.add(x)
        raise _Seen

    with _inputs_of({"": linear}, take):
        for x in step.inputs():
            try:
                step.run(x)
            except _Seen:
                continue
    return gram.mean


@contextmanager
def _inputs_of(linears: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` before each linear runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
