"""The ONNX graph of any decoder that torch can trace: for families without emitted nodes."""

from __future__ import annotations

import ast
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers import DynamicCache

from compressor import progress
from compressor.dense import DenseReader
from compressor.errors import ExportError, MissingDependency
from compressor.export.decoder_graph import Built
from compressor.export.graph import DATA, MICROSOFT, OPSET
from compressor.export.nbits import NBits, pack
from compressor.runtimes.session import APPENDING, MODEL

log = logging.getLogger(__name__)
_MODEL = "model"
_SCOPES = "pkg.torch.onnx.name_scopes"


def trace(model: Any, folder: Path, out: Path, dtype: torch.dtype, accuracy_level: int) -> Built:
    """Write model.onnx and model.onnx.data into `out` from a trace of `model` in `dtype`.

    Inputs and outputs are those of `decoder_graph.build`, but every call appends its tokens to
    the cache, padding included, and attention_mask (B, P + S) says which entries are real.
    Products with packed matrices of the checkpoint in `folder` become MatMulNBits over its
    own integers. `model`, which is cast in place, holds the whole weights, and so does the trace:
    memory is about three times the weights.
    Raises `ExportError` when torch cannot trace the model, or its products are not found.
    """
    try:
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError:
        raise MissingDependency("onnxscript", "cpu", "tracing a model into ONNX") from None
    with progress.task("trace", 1) as bar:
        graph_model = _traced(model.to(dtype))
        bar.advance(1)
    container_bytes, nominal_bytes = _replace_products(graph_model, folder, dtype, accuracy_level)
    _name_modules(graph_model.graph)
    RemoveUnusedNodesPass()(graph_model)
    caches = len(graph_model.graph.inputs) // 2 - 1
    graph_model.metadata_props[APPENDING] = "true"
    ir.save(graph_model, out / MODEL, external_data=DATA)
    return Built(caches, container_bytes, round(nominal_bytes))


class _WithCache(nn.Module):
    """A model whose cache goes in and out as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, ids: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"position_ids": positions} if self._positions else {}
        out = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
        layers = out.past_key_values.layers
        logits = out.logits.float() if out.logits.dtype == torch.bfloat16 else out.logits
        return logits, *(t for layer in layers for t in (layer.keys, layer.values))


def _traced(model: Any) -> ir.Model:
    """The trace by torch.onnx, over a cache of two tokens and two new ones."""
    ids = torch.ones(2, 2, dtype=torch.long)
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    past = [t for layer in layers for t in (layer.keys, layer.values)]
    names = [f"{i}.{kind}" for i in range(len(layers)) for kind in ("key", "value")]
    past_names = [f"past_key_values.{name}" for name in names]
    present_names = [f"present.{name}" for name in names]
    kept = {0: "batch", 2: "past"}
    shapes = ({0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}, tuple(kept for _ in past))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's own deprecations and hints on names
            program = torch.onnx.export(
                _WithCache(model),
                (ids, torch.ones(2, 4, dtype=torch.long), *past),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=["input_ids", "attention_mask", *past_names],
                output_names=["logits", *present_names],
                dynamic_shapes=shapes,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"{model.config.model_type}: torch cannot trace this model ({cause}); "
            "set export.formats to [safetensors]"
        ) from error
    assert program is not None
    return program.model


def _replace_products(
    traced: ir.Model, folder: Path, dtype: torch.dtype, accuracy_level: int
) -> tuple[int, float]:
    """Put MatMulNBits where packed matrices are multiplied; bytes as in `Built`."""
    reader, graph = DenseReader(folder), traced.graph
    container_bytes, nominal_bytes = 0, 0.0
    for name, weight in list(graph.initializers.items()):
        path = name.removeprefix(f"{_MODEL}.").removesuffix(".weight")
        stored = reader.locate(f"{path}.weight")
        if stored is None or stored in reader.checkpoint:
            continue
        matrix = pack(reader.codes(f"{path}.weight"), reader.layout(f"{path}.weight").bits, path)
        for node in _products(weight, path):
            _replace(graph, node, matrix, path, dtype, accuracy_level)
        container_bytes += matrix.container_bytes
        nominal_bytes += matrix.nominal_bytes
        del graph.initializers[name]
    traced.opset_imports[MICROSOFT] = 1
    return container_bytes, nominal_bytes


def _products(weight: ir.Value, path: str) -> list[ir.Node]:
    """The nodes that compute x W^T."""
    found: list[ir.Node] = []
    for user, _ in weight.uses():
        if user.op_type == "Transpose":
            found += [product for product, _ in user.outputs[0].uses()]
        else:
            found.append(user)
    for node in found:
        upright = node.op_type == "MatMul" or node.attributes.get_int("transB", False)
        if node.op_type not in ("MatMul", "Gemm") or not upright:
            raise ExportError(
                f"{path}: packed, but used by {node.op_type} in the trace; export before "
                "quantizing, or set export.formats to [safetensors]"
            )
    return found


def _replace(
    graph: ir.Graph, node: ir.Node, matrix: NBits, path: str, dtype: torch.dtype, level: int
) -> None:
    inputs = [node.inputs[0]]
    tensors = {"integers": matrix.b, "scales": matrix.scales.to(dtype), "zeros": matrix.zero_points}
    for kind, tensor in tensors.items():
        if tensor is not None:
            name = f"{path}.weight_{kind}"
            held = ir.tensor(tensor.contiguous(), name=name)
            value = ir.val(name, held.dtype, list(tensor.shape), const_value=held)
            graph.initializers[name] = value
            inputs.append(value)
    attributes = {
        "K": matrix.k,
        "N": len(matrix.b),
        "bits": matrix.bits,
        "block_size": matrix.block,
        "accuracy_level": level,
    }
    product = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)
    new, last = [product], product
    if len(node.inputs) == 3:
        last = ir.node("Add", [product.outputs[0], node.inputs[2]])
        new.append(last)
    for made in new:
        made.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], new, [node.outputs[0]], [last.outputs[0]]
    )


def _name_modules(graph: ir.Graph) -> None:
    """Name what each module gives by its path, so that a probe finds it."""
    last: dict[str, ir.Value] = {}
    for node in graph:
        for scope in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")):
            last[scope] = node.outputs[0]
    fixed = {id(value) for value in graph.outputs}
    for scope, value in last.items():
        if scope.startswith(f"{_MODEL}.") and id(value) not in fixed:
            value.name = scope.removeprefix(f"{_MODEL}.")
            fixed.add(id(value))
