"""What the modules of a block read and give: hooks on them, and sums over all of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.blocks import hidden
from compressor.errors import CompressError, UnsupportedArchitecture
from compressor.moments import Gram
from compressor.walk import Step

K = TypeVar("K")


class Seen(Exception):
    """Stops a block's forward once the awaited input was seen."""


def input_gram(step: Step, name: str, linear: nn.Linear) -> Tensor:
    """Mean of x x^T over the whole stream, (I, I); forwards stop at the linear.

    Raises `CompressError` naming it for inputs that are not finite.
    """
    gram = Gram(linear.in_features, linear.weight.device)

    def take(_: str, x: Tensor) -> None:
        gram.add(x)
        raise Seen

    with inputs_of({name: linear}, take):
        for x in step.inputs():
            with suppress(Seen):
                step.run(x)
    mean = gram.mean
    _check_finite(name, mean)
    return mean


def input_norms(linears: dict[str, nn.Module], passes: Iterable[object]) -> dict[str, Tensor]:
    """||X_j||_2 of every input channel of each linear, (I,) float32, while `passes` is consumed.

    Tokens are summed in float64. Raises `UnsupportedArchitecture` for a linear that never runs
    and `CompressError` for inputs that are not finite.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        seen = x.flatten(0, -2).float().square().sum(0, dtype=torch.float64)
        squares[name] = squares[name] + seen if name in squares else seen

    with inputs_of(linears, add):
        for _ in passes:
            pass
    for name in linears:
        if name not in squares:
            raise UnsupportedArchitecture(f"{name} is never run by its block's forward")
        _check_finite(name, squares[name])
    return {name: total.sqrt().float() for name, total in squares.items()}


def inputs_of(
    modules: Mapping[K, nn.Module], see: Callable[[K, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `see(name, x)` before each module runs."""

    def hook(name: K) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    return _while([each.register_forward_pre_hook(hook(name)) for name, each in modules.items()])


def outputs_of(
    modules: Mapping[K, nn.Module], see: Callable[[K, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `see(name, y)` after each module ran; of a tuple y is the first."""

    def hook(name: K) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        return lambda _module, _args, output: see(name, hidden(output))

    return _while([each.register_forward_hook(hook(name)) for name, each in modules.items()])


@contextmanager
def _while(handles: list[RemovableHandle]) -> Iterator[None]:
    """Hooks that stay for a `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(name: str, total: Tensor) -> None:
    if not torch.isfinite(total).all():
        raise CompressError(f"{name}: its inputs hold NaN or infinity; compute in float32")
