"""A thin hand on onnx-ir: nodes by name, weights streamed into one aligned data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from compressor.runtimes.session import MODEL

MICROSOFT = "com.microsoft"
OPSET = 21
DATA = f"{MODEL}.data"
_ALIGNMENT = 4096
_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
}


class Graph:
    """An ONNX graph under construction.

    Every weight is appended to the data file as it is added, at a multiple of 4096 bytes so
    that runtimes can map it; memory never holds more than one tensor. A context manager,
    so that the file is closed whatever happens.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Build into `folder` with weights and activations in `dtype`."""
        self.folder, self.dtype = folder, dtype
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._weights: dict[str, ir.Value] = {}
        self._data = (folder / DATA).open("wb")

    def input(self, name: str, dtype: torch.dtype, shape: list[int | str]) -> ir.Value:
        """Declare an input; names in `shape` are dynamic dimensions."""
        value = ir.val(name, _DTYPES[dtype], shape)
        self._inputs.append(value)
        return value

    def name(self, value: ir.Value, name: str) -> ir.Value:
        """Name a value by the module that gives it, so that a probe finds it."""
        value.name, value.dtype = name, _DTYPES[self.dtype]
        return value

    def output(self, value: ir.Value, name: str, shape: list[int | str]) -> None:
        """Declare an output; a value without a dtype has the graph's."""
        value.name, value.dtype = name, value.dtype or _DTYPES[self.dtype]
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def known(self, name: str) -> ir.Value | None:
        """The weight or constant of this name, if it was added."""
        return self._weights.get(name)

    def weight(self, name: str, tensor: Tensor) -> ir.Value:
        """Store a tensor (floats in the graph's dtype) once per name."""
        if name in self._weights:
            return self._weights[name]
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        tensor.detach().cpu().flatten().view(torch.uint8).numpy().tofile(self._data)
        shape, kind = ir.Shape(tensor.shape), _DTYPES[tensor.dtype]
        external = ir.ExternalTensor(
            DATA, offset, tensor.nbytes, kind, shape=shape, name=name, base_dir=self.folder
        )
        self._weights[name] = ir.val(name, kind, shape, const_value=external)
        return self._weights[name]

    def constant(self, name: str, value: list[int] | float) -> ir.Value:
        """A small constant in the graph itself: an int64 list, or a number in the graph's dtype."""
        if name not in self._weights:
            kind = _DTYPES[torch.int64 if isinstance(value, list) else self.dtype]
            held = ir.tensor(value, kind, name=name)
            self._weights[name] = ir.val(name, const_value=held)
        return self._weights[name]

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Append a node; returns its output, or a list when there are several."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        node.name = f"{kind}_{len(self._nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_{index}"
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def save(self) -> Path:
        """Write model.onnx beside the data file; outputs that nobody reads lose their names.

        Operators make an optional output only where it has a name.
        """
        self._data.flush()
        for value in (v for node in self._nodes for v in node.outputs):
            if not value.uses() and value not in self._outputs:
                value.name = ""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._weights.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        ir.save(ir.Model(graph, ir_version=10, producer_name="compress"), self.folder / MODEL)
        return self.folder / MODEL
