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
    onnx_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="weights and activations of the ONNX graph; bfloat16 needs CUDA"
    )
    graph: Literal["auto", "emitted", "traced"] = Field(
        "auto", description="emit nodes from the weights, trace torch, or what the family allows"
    )
    accuracy_level: Literal[0, 4] = Field(
        0, description="integer matrices: 0 computes in onnx_dtype, 4 with 8-bit activations (fast)"
    )
    head_bits: Literal[4, 8] | None = Field(
        None, description="round the head, and a tied embedding, anew for ONNX; null: as they are"
    )
    check_tokens: int = Field(32, gt=0, description="greedy tokens that must agree, torch and ONNX")


METHODS = {
    "folders": Method(
        "compressor.export.onnx:export",
        ExportParams,
        "a Hugging Face folder and an ONNX graph with KV cache, compared token by token",
        "onnxruntime contrib operators (GroupQueryAttention, MatMulNBits)",
        "one copy of the weights, and short generations in torch and onnxruntime",
        version=3,
    ),
}
