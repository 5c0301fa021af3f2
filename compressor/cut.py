"""Running a model with parts left out or shared, from the last state it has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compressor.decoder import Decoder, skeleton
from compressor.errors import SelectionError
from compressor.records import Selection
from compressor.sublayers import Sublayer, Sublayers, find_sublayers
from compressor.walk import Stream, storage

WEIGHT_BYTES = 8 * 2**30
"""Blocks stay in memory when all of them fit into this; else they are read for every mask."""

STATE_BYTES = 2 * 2**30
"""Memory for the states of the last mask, from which the next one starts."""

Op = tuple[int, int | None, int | None]
"""A block that runs, and whose attention and feed-forward weights it takes (None: neither)."""


def operations(selection: Selection, num_blocks: int) -> tuple[Op, ...]:
    """The blocks that run under a selection; raises `SelectionError` for one of another depth."""
    if selection.num_blocks != num_blocks:
        raise SelectionError(
            f"the selection is for a model of {selection.num_blocks} blocks, but this one has "
            f"{num_blocks}; score and select again on this model"
        )
    attention: dict[int, int | None] = {i: i for i in range(num_blocks)}
    ffn = dict(attention)
    attention |= selection.reuse_attention | dict.fromkeys(selection.drop_attention)
    ffn |= selection.reuse_ffn | dict.fromkeys(selection.drop_ffn)
    gone = set(selection.drop_blocks)
    return tuple((i, attention[i], ffn[i]) for i in range(num_blocks) if i not in gone)


class CutModel:
    """The residual streams of windows (N, T) behind any operations.

    A block that goes is the identity; a sublayer that goes adds nothing and does not run; one
    that is shared runs with the weights, norms included, of another block's. Operations that
    agree with those before them up to some block start there, from a kept state; states are
    kept at every `stride`-th block, 1 unless they would exceed `STATE_BYTES`.

    Attributes:
        weights: what was read of the blocks, by block and name, where all of them fit.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_size: int) -> None:
        """Embed the tokens."""
        self.decoder = decoder
        stream = Stream(decoder, tokens, batch_size)
        self.batches = stream.batches
        size = stream.x.numel() * stream.x.element_size()
        self.stride = max(1, math.ceil(len(decoder.blocks) * size / STATE_BYTES))
        self._path: tuple[Op, ...] = ()
        self._states = {0: stream.x}
        self.weights: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def stream(self, ops: tuple[Op, ...]) -> Tensor:
        """Residual stream (N, T, D) after `ops`; not to be written to."""
        shared = common(self._path, ops)
        self._states = {depth: x for depth, x in self._states.items() if depth <= shared}
        self._path = ops
        done = max(self._states)
        x = self._states[done]
        for depth, op in enumerate(ops[done:], done + 1):
            x = self._run(op, x)
            if depth % self.stride == 0:
                self._states[depth] = x
        return x

    def _run(self, op: Op, x: Tensor) -> Tensor:
        y = storage(tuple(x.shape), x.dtype)
        index = op[0]
        with self.decoder.resident(index, self._weights_of(op)), self._left_out(op):
            for rows in self.batches:
                y[rows] = self.decoder.run(index, x[rows]).to(y.device)
        return y

    @cached_property
    def _sublayers(self) -> list[Sublayers]:
        return find_sublayers(skeleton(self.decoder.reader.checkpoint.folder))

    def _changed(self, op: Op) -> Iterator[tuple[Sublayer, int | None]]:
        """(branch, whose weights) of the branches that are not simply a block's own."""
        index, *givers = op
        if givers != [index, index]:
            both = self._sublayers[index]
            for branch, giver in zip((both.attention, both.ffn), givers, strict=True):
                if branch and giver != index:
                    yield branch, giver

    def _weights_of(self, op: Op) -> dict[str, Tensor]:
        """The weights a block runs with, by name inside the block."""
        index = op[0]
        path = f"{self.decoder.blocks.prefix}.{index}."
        owners: dict[str, int | None] = dict.fromkeys(
            self.decoder.blocks.layers[index].state_dict(), index
        )
        for branch, giver in self._changed(op):
            parts = tuple(f"{n.removeprefix(path)}." for n in (*branch.modules, *branch.norms))
            owners |= {name: giver for name in owners if name.startswith(parts)}
        return {name: self._weight(i, name) for name, i in owners.items() if i is not None}

    def _weight(self, index: int, name: str) -> Tensor:
        if (index, name) in self.weights:
            return self.weights[index, name]
        weight = self.decoder.weight(index, name)
        if self._fits:
            self.weights[index, name] = weight
        return weight

    @cached_property
    def _fits(self) -> bool:
        weights = self.decoder.blocks.layers.parameters()
        return sum(w.numel() for w in weights) * self.decoder.dtype.itemsize <= WEIGHT_BYTES

    @contextmanager
    def _left_out(self, op: Op) -> Iterator[None]:
        """Let the modules of removed branches hand on their input, and the last one zeros."""
        attention = self.decoder.blocks.attention(op[0])
        replaced: list[Any] = []
        try:
            for branch, giver in self._changed(op):
                for name in (*branch.modules, *branch.norms) if giver is None else ():
                    module: Any = self.decoder.model.get_submodule(name)
                    module.forward = _stand_in(name == branch.last, name in attention)
                    replaced.append(module)
            yield
        finally:
            for module in replaced:
                del module.forward


def _stand_in(last: bool, attention: bool) -> Callable[..., Any]:
    """A forward that computes nothing; attention modules return (output, weights)."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        x = torch.zeros_like(x) if last else x
        return (x, None) if attention else x

    return forward


def common(a: Sequence[Op], b: Sequence[Op]) -> int:
    """How many operations two sequences share from the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
