"""The one loop over a model: block by block, with one block's weights resident.

The residual stream of every window is one tensor (N, T, D) kept off the device and
overwritten block by block; above a limit it lives in a file. A stream's twin walks
beside it through other weights, which is what error propagation needs.
"""

from __future__ import annotations

import copy
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from compressor import progress
from compressor.decoder import Decoder

SPILL_BYTES = 4 * 2**30
"""Activations above this size are kept in a file, not in memory."""

HUGE_BYTES = 32 * 2**20
"""Activations from this size on ask for huge pages: first touching small ones costs more than
the copy into them. Below, the allocator hands out memory that was touched before."""


class Stream:
    """The residual stream of N windows of T tokens, between two blocks.

    Attributes:
        x: (N, T, D), float32 on the CPU unless the decoder computes in less.
        batches: slices of N that go through the model together.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_size: int = 4) -> None:
        """Embed `tokens` (N, T); every window is full, so no mask is needed."""
        self.decoder = decoder
        self.tokens = tokens
        self.batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
        for rows in self.batches:
            x = decoder.embed(tokens[rows])
            if rows.start == 0:
                self.x = storage((*tokens.shape, x.shape[-1]), x.dtype)
            self.x[rows] = x.to(self.x.device)

    def twin(self) -> Stream:
        """A second stream that stands where this one does and moves on its own."""
        other = copy.copy(self)
        other.x = storage(tuple(self.x.shape), self.x.dtype).copy_(self.x)
        return other

    def relative_error(self, other: Stream) -> float:
        """||h - h'|| / ||h|| of this stream h and another h' of its shape, summed in float64."""
        lost = total = 0.0
        for rows in self.batches:
            x = self.x[rows]
            lost += float(torch.linalg.vector_norm(other.x[rows] - x, dtype=torch.float64)) ** 2
            total += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        return math.sqrt(lost / total)

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, logits (B, T, V)) once the walk is over."""
        for rows in self.batches:
            yield rows, self.decoder.logits(self.x[rows])


class Step:
    """One block of a walk, with its weights resident."""

    def __init__(self, stream: Stream, index: int, block: nn.Module) -> None:
        """Stand before block `index`."""
        self.stream = stream
        self.index = index
        self.block = block
        self._pending = list(stream.batches)

    def run(self, x: Tensor) -> Tensor:
        """Push any hidden states (B, T, D) through this block, on the device."""
        return self.stream.decoder.run(self.index, x, self.block)

    def inputs(self) -> Iterator[Tensor]:
        """Yield the block's inputs batch by batch, leaving the stream where it is."""
        for rows in self.stream.batches:
            yield self.stream.x[rows]

    def advance(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, x_in, x_out) and move the stream past this block, batch by batch."""
        while self._pending:
            rows = self._pending.pop(0)
            x_in = self.stream.x[rows].clone()
            x_out = self.run(x_in).to(x_in.device)
            self.stream.x[rows] = x_out
            yield rows, x_in, x_out


def walk(stream: Stream, label: str = "walk", start: int = 0) -> Iterator[Step]:
    """Yield a `Step` per block; what a step was not asked to advance is advanced after it.

    The stream stands before block `start`. No gradients are kept. Peak memory is one block, the
    embedding and head, and the activations of one batch, beside the stream itself.
    """
    decoder = stream.decoder
    with torch.no_grad():
        count = len(decoder.blocks)
        for index in progress.track(range(start, count), label, count, start):
            with decoder.resident(index) as block:
                step = Step(stream, index, block)
                yield step
                for _ in step.advance():
                    pass


def storage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of any content in memory, or in an unlinked file above `SPILL_BYTES`."""
    count = math.prod(shape)
    if count * dtype.itemsize < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    if count * dtype.itemsize <= SPILL_BYTES:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel built without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    handle, path = tempfile.mkstemp(prefix="compress-", suffix=".activations")
    os.close(handle)
    try:
        return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
    finally:
        os.unlink(path)
