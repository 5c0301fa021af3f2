"""A safetensors file written tensor by tensor, with no more than one of them in memory."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What safetensors calls the dtypes that are read and written."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Spool:
    """Bytes of tensors in an unlinked file, until their names, and so the header, are known.

    The format has its header first, and its own writer holds every tensor twice until then.
    """

    def __init__(self, folder: Path) -> None:
        """Keep the bytes in `folder`, beside what will be written."""
        self._data = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._entries: dict[str, tuple[torch.dtype, list[int], int, int]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors so far, in the order they came."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors so far."""
        return self._data.tell()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the bytes of a contiguous tensor on the CPU."""
        self._entries[name] = (tensor.dtype, list(tensor.shape), self.nbytes, tensor.nbytes)
        self._data.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def save(self, path: Path) -> None:
        """Write the file: widest dtypes first, so that every tensor is aligned, then by name."""
        self._data.flush()
        order = sorted(self._entries.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape, _, size) in order:
            offsets = [end, end := end + size]
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            for _, (_, _, start, size) in order:
                while size:
                    sent = os.sendfile(file.fileno(), self._data.fileno(), start, size)
                    start, size = start + sent, size - sent

    def close(self) -> None:
        """Let go of the bytes."""
        self._data.close()
