"""Emitting matrices: dense as they are, quantized with the checkpoint's own integers."""

from __future__ import annotations

from functools import cached_property

import onnx_ir as ir
import torch
from torch import Tensor

from compressor.dense import DenseReader
from compressor.errors import ExportError
from compressor.export.graph import MICROSOFT, Graph
from compressor.export.nbits import NBits, pack, round_to_nearest, stack

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Linears:
    """Products with the matrices of a checkpoint.

    Attributes:
        container_bytes, nominal_bytes: of all integers with their scales and zero points, as
            stored and as their own width would take.
    """

    def __init__(
        self, graph: Graph, reader: DenseReader, accuracy_level: int, head_bits: int | None
    ) -> None:
        """Emit into `graph`; raises `ExportError` where a packed matrix has no scales."""
        self.g, self.reader = graph, reader
        self.accuracy_level, self.head_bits = accuracy_level, head_bits
        self.container_bytes, self.nominal_bytes = 0, 0.0
        stored = reader.checkpoint
        for name in stored.names:
            stem, _, kind = name.rpartition(".")
            if kind == "weight_packed" and f"{stem}.weight_scale" not in stored:
                raise ExportError(f"{stored.folder}: {stem} is packed but has no weight_scale")

    def __call__(self, path: str, x: ir.Value) -> ir.Value:
        """x W^T + b of one linear."""
        return self.together([path], x)[0]

    def together(self, paths: list[str], x: ir.Value) -> list[ir.Value]:
        """x W^T + b of linears that share an input: one product where they can be stacked."""
        parts = [self._matrix(path) for path in paths]
        forms = {part.form if isinstance(part, NBits) else part.shape[1] for part in parts}
        biased = {self.reader.has(f"{path}.bias") for path in paths}
        if len(paths) > 1 and (len(forms) > 1 or len(biased) > 1):
            return [self(path, x) for path in paths]
        parent = paths[0].rpartition(".")[0]
        name = f"{parent}.{'+'.join(p.rpartition('.')[2] for p in paths)}" if parent else paths[0]
        quantized = [part for part in parts if isinstance(part, NBits)]
        dense = [part for part in parts if isinstance(part, Tensor)]
        if quantized:
            y = self._nbits(name, stack(quantized), x)
        else:
            weight = torch.cat(dense) if len(dense) > 1 else dense[0]
            y = self._dense(x, self.g.weight(f"{name}.weight", weight))
        if True in biased:
            bias = torch.cat([self.reader.read(f"{path}.bias") for path in paths])
            y = self.g.op("Add", y, self.g.weight(f"{name}.bias", bias))
        return [y]

    def embed(self, ids: ir.Value) -> ir.Value:
        """Rows of the embedding; of the head's integers where both are one and rounded."""
        if self.head_bits and self.tied:
            b, scales = self._initializers("lm_head", self._head)
            flat = self.g.constant("lm_head.flat", [len(self._head.b), -1])
            rows = self.g.op("Reshape", b, flat)
            return self.g.op(
                "GatherBlockQuantized",
                rows,
                ids,
                scales,
                domain=MICROSOFT,
                bits=self._head.bits,
                block_size=self._head.block,
                gather_axis=0,
                quantize_axis=1,
            )
        return self.g.op("Gather", self._table(EMBEDDING), ids, axis=0)

    def head(self, x: ir.Value) -> ir.Value:
        """Logits; a tied head reads the embedding's own bytes."""
        if self.head_bits:
            return self._nbits("lm_head", self._head, x)
        return self._dense(x, self._table(EMBEDDING)) if self.tied else self("lm_head", x)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.reader.config.get("tie_word_embeddings")) or not self.reader.has(HEAD)

    @cached_property
    def _head(self) -> NBits:
        assert self.head_bits
        weight = self.reader.read(EMBEDDING if self.tied else HEAD)
        return pack(round_to_nearest(weight, self.head_bits), self.head_bits)

    def _table(self, name: str) -> ir.Value:
        return self.g.known(name) or self.g.weight(name, self.reader.read(name))

    def _matrix(self, path: str) -> Tensor | NBits:
        name = f"{path}.weight"
        stored = self.reader.locate(name)
        if stored is None or stored in self.reader.checkpoint:
            return self.reader.read(name)
        return pack(self.reader.codes(name), self.reader.layout(name).bits, path)

    def _dense(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """x W^T with W stored (out, in) as in the checkpoint."""
        return self.g.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)

    def _nbits(self, name: str, matrix: NBits, x: ir.Value) -> ir.Value:
        self.container_bytes += matrix.container_bytes
        self.nominal_bytes += matrix.nominal_bytes
        return self.g.op(
            "MatMulNBits",
            x,
            *self._initializers(name, matrix),
            domain=MICROSOFT,
            K=matrix.k,
            N=len(matrix.b),
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=self.accuracy_level,
        )

    def _initializers(self, name: str, matrix: NBits) -> list[ir.Value]:
        held = {"integers": matrix.b, "scales": matrix.scales, "zero_points": matrix.zero_points}
        return [
            self.g.weight(f"{name}.weight_{kind}", tensor)
            for kind, tensor in held.items()
            if tensor is not None
        ]
