"""Export: a checkpoint in the shapes that runtimes load, checked against each other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods import Method, Params


class ExportParams(Params):
    """What is exported."""

    formats: tuple[Literal["safetensors", "onnx"], ...] = Field(
        ("safetensors", "onnx"), description="folders to write"
    )
    onnx_dtype: Literal["float32", "float16"] = Field(
        "float32", description="weights and activations of the ONNX graph"
    )
    check_tokens: int = Field(32, gt=0, description="greedy tokens that must agree, torch and ONNX")


METHODS = {
    "folders": Method(
        "compressor.export.onnx:export",
        ExportParams,
        "a Hugging Face folder and an ONNX graph with KV cache, compared token by token",
        "onnxruntime contrib operators (GroupQueryAttention)",
        "one copy of the weights, and a short generation",
    ),
}
