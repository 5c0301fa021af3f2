"""A checkpoint with zeros where a mask says so, everything else bitwise as it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.blocks import oriented
from compressor.checkpoint import Checkpoint, CheckpointWriter, write_json
from compressor.decoder import Decoder
from compressor.errors import CheckpointError

REPORT = "sparsity.json"


def open_dense(source: Path, device: str = "cpu") -> Decoder:
    """Open a checkpoint for pruning; raises `CheckpointError` for a quantized one."""
    if Checkpoint(source).quantized:
        raise CheckpointError(f"{source}: already quantized; prune the dense checkpoint before")
    return Decoder(source, device)


def write_masked(
    decoder: Decoder, out: Path, masks: Iterable[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Write the decoder's checkpoint with the weights outside the masks set to zero.

    `masks` yields (full name of a linear, what stays: bool (O, I)); a linear is written when its
    mask comes, in the dtype it is stored in. `sparsity.json` in `out` holds the share of zeros,
    `overall` and by `linear`. Returns the overall share. Memory is bounded by one shard.
    """
    checkpoint = decoder.reader.checkpoint
    shares: dict[str, float] = {}
    done: set[str] = set()
    zeros = size = 0
    with CheckpointWriter(out) as writer:
        for name, keep in masks:
            stored = decoder.reader.locate(f"{name}.weight")
            assert stored is not None
            weight = checkpoint.tensor(stored).clone()
            oriented(decoder.model.get_submodule(name), weight).masked_fill_(~keep.cpu(), 0)
            writer.add(stored, weight)
            done.add(stored)
            gone = int((weight == 0).sum())
            shares[name] = gone / weight.numel()
            zeros, size = zeros + gone, size + weight.numel()
        for name in checkpoint.names:
            if name not in done:
                writer.add(name, checkpoint.tensor(name))
        writer.finish(checkpoint.config, checkpoint.side_files)
    write_json(out / REPORT, {"overall": zeros / size, "linear": shares})
    return {"sparsity": zeros / size}
