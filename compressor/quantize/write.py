"""The quantized checkpoint: compressed-tensors `pack-quantized`, written block by block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import nn

from compressor.checkpoint import CheckpointWriter
from compressor.decoder import Decoder
from compressor.dense import PACKED
from compressor.quantize.grid import Grid, QuantizedWeight


class PackedWriter:
    """Writes integers as they come and copies everything else bitwise at the end.

    A linear of shape (O, I) becomes `weight_packed` int32 (O, ceil(I b / 32)), u = q + 2^(b-1)
    as a little-endian bit stream along the inputs; `weight_scale` (O, I / group) in the
    source's dtype; `weight_shape` int64 (2,). The embedding and the head stay dense.
    """

    def __init__(self, decoder: Decoder, out: Path, grid: Grid) -> None:
        """Write into `out` what `decoder` was read from."""
        self._decoder, self._grid = decoder, grid
        self._writer = CheckpointWriter(out)
        self._done: set[str] = set()
        self._weights = self._bits = 0

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.__exit__()

    def block(self, index: int, results: dict[str, QuantizedWeight]) -> None:
        """Write one block: its linears in integers, its norms and biases as they were."""
        for name, result in results.items():
            rows, columns = result.integers.shape
            stored = self._decoder.reader.locate(f"{name}.weight") or f"{name}.weight"
            stem = stored.removesuffix(".weight")
            packed = pack_to_int32(result.integers, self._grid.bits)
            self._writer.add(f"{stem}.{PACKED}", packed)
            self._writer.add(f"{stem}.weight_scale", result.scale)
            self._writer.add(f"{stem}.weight_shape", torch.tensor([rows, columns]))
            self._done.add(stored)
            self._weights += rows * columns
            self._bits += 8 * (packed.nbytes + result.scale.nbytes)

    def finish(self) -> float:
        """Copy the rest, write the config and return the average bits per packed weight."""
        checkpoint = self._decoder.reader.checkpoint
        for name in checkpoint.names:
            if name not in self._done:
                self._writer.add(name, checkpoint.tensor(name))
        config = checkpoint.config | {"quantization_config": self._config()}
        self._writer.finish(config, checkpoint.side_files)
        return self._bits / self._weights

    def _config(self) -> dict[str, Any]:
        grid, blocks = self._grid, self._decoder.blocks
        inside = set().union(*(blocks.linears(i) for i in range(len(blocks))))
        outside = [
            name
            for name, module in self._decoder.model.named_modules()
            if isinstance(module, nn.Linear) and name not in inside
        ]
        tails = sorted({name.split(".", blocks.prefix.count(".") + 2)[-1] for name in inside})
        pattern = f"^{re.escape(blocks.prefix)}[.][0-9]+[.]({'|'.join(map(re.escape, tails))})$"
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": grid.group_size,
            "dynamic": False,
        }
        group = {
            "targets": [f"re:{pattern}"],
            "format": "pack-quantized",
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "version": compressed_tensors.__version__,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": outside,
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "config_groups": {"group_0": group},
        }
