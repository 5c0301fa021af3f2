"""The floor of a decode step: what it must read, over how fast this machine reads memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import MissingDependency
from compressor.runtimes import Target
from compressor.runtimes.session import MODEL

_BUFFER_BYTES = 256 * 2**20  # well above any last-level cache
_PASSES = 5
_ROWS_ONLY = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "Shape")
"""Operators that read a row or two of their tables: embedding, positions."""


def bandwidth(threads: int) -> float:
    """Bytes/s at which `threads` threads read memory: the best of some passes, as STREAM has it.

    Each thread takes the maximum of its share of float32 numbers, which reads and never writes,
    like the weights in a decode step (McCalpin, STREAM, 1995).
    """
    parts = np.array_split(np.ones(_BUFFER_BYTES // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(_PASSES):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - began)
    return _BUFFER_BYTES / min(seconds)


def weight_bytes(target: Target) -> int:
    """Bytes of weights that a step reads in full: all but the rows of an embedding of its own.

    As the runtime holds them: integers and scales in a graph; in torch float32, or on a GPU the
    checkpoint's own dtype, whatever the file holds.
    """
    return _torch_bytes(target.folder) if target.runtime == "torch" else _graph_bytes(target.folder)


def _graph_bytes(folder: Path) -> int:
    try:
        import onnx_ir as ir
    except ImportError:
        raise MissingDependency("onnx-ir", "cpu", "reading the sizes of an ONNX graph") from None
    graph = ir.load(folder / MODEL).graph
    read = {
        value.name
        for node in graph
        if node.op_type not in _ROWS_ONLY
        for value in node.inputs
        if value is not None and value.name in graph.initializers
    }
    held: list[Any] = [graph.initializers[name].const_value for name in read if name]
    return sum(tensor.nbytes for tensor in held)


def _torch_bytes(folder: Path) -> int:
    import torch

    from compressor.checkpoint import Checkpoint
    from compressor.decoder import skeleton

    model: Any = skeleton(folder)
    model.tie_weights()
    dtype = Checkpoint(folder).dtype if torch.cuda.is_available() else torch.float32
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = embedding.weight.numel() if head is None or head.weight is not embedding.weight else 0
    weights = sum(weight.numel() for weight in model.parameters()) - alone
    return int(weights) * dtype.itemsize
