"""The quantized checkpoint, written block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from torch import Tensor, nn

from compressor.checkpoint import CheckpointWriter
from compressor.decoder import Decoder
from compressor.quantize.formats import FORMATS, Grids
from compressor.quantize.grid import QuantizedWeight


class IntegerWriter:
    """Writes integers as they come and copies everything else bitwise at the end."""

    def __init__(self, decoder: Decoder, out: Path, grids: Grids, form: str) -> None:
        """Write into `out` what `decoder` was read from, in the format `form`."""
        self._decoder, self._grids, self._format = decoder, grids, FORMATS[form]
        self._layout = self._format.layout(grids)
        self._writer = CheckpointWriter(out)
        self._done: set[str] = set()
        self._weights = self._bits = 0

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.__exit__()

    def block(self, results: dict[str, QuantizedWeight], dense: dict[str, Tensor]) -> None:
        """Write the linears of one block in integers, and other tensors of it that changed."""
        for name, tensor in dense.items():
            stored = self._decoder.reader.locate(name) or name
            self._writer.add(stored, tensor)
            self._done.add(stored)
        for name, result in results.items():
            stored = self._decoder.reader.locate(f"{name}.weight") or f"{name}.weight"
            layout, scale = self._layout(self._grids[name]), result.scale
            for part, tensor in layout.write(result).items():
                self._writer.add(stored.removesuffix("weight") + part, tensor)
            rows, columns = result.integers.shape
            self._bits += 8 * layout.size_bytes(rows, columns, scale.shape[1], scale.itemsize)
            self._done.add(stored)
            self._weights += rows * columns

    def finish(self) -> float:
        """Copy the rest, write the config and return the average bits per packed weight."""
        checkpoint = self._decoder.reader.checkpoint
        for name in checkpoint.names:
            if name not in self._done:
                self._writer.add(name, checkpoint.tensor(name))
        dense = [
            name
            for name, module in self._decoder.model.named_modules()
            if isinstance(module, nn.Linear) and name not in self._grids
        ]
        config = self._format.config(self._grids, self._decoder.blocks, dense)
        self._writer.finish(
            checkpoint.config | {"quantization_config": config}, checkpoint.side_files
        )
        return self._bits / self._weights
