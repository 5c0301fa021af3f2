"""The ONNX graph of a Llama-shaped decoder, emitted from the checkpoint's tensors.

Nothing is traced. What a family has (biases, per-head or full-width q/k norms, fused
projections, norms before or after the sublayers) is read off the names and shapes of the
tensors, so the families differ only in which tensors exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import AutoConfig

from compressor import progress
from compressor.decoder import skeleton
from compressor.errors import ExportError, did_you_mean
from compressor.export.graph import MICROSOFT, Graph

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class Weights(Protocol):
    """Reads dense weights by name; `compressor.dense.DenseReader` is one."""

    def has(self, name: str) -> bool:
        """Whether there is such a weight."""

    def read(self, name: str) -> Tensor:
        """The weight as floats."""


def build(folder: Path, weights: Weights, out: Path, dtype: torch.dtype) -> Path:
    """Write model.onnx and model.onnx.data into `out` for the checkpoint in `folder`.

    Inputs: input_ids (B, S), attention_mask (B, P + S), past_key_values.i.{key,value}
    (B, kv_heads, P, head_dim); outputs: logits (B, S, V), present.i.{key,value}. Batch,
    sequence and past are dynamic; sequences are padded on the right only, because
    GroupQueryAttention takes lengths from the mask's sum.
    Raises `ExportError` for families and rotary scalings that are not emitted.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    _check(config)
    with Graph(out, dtype) as graph:
        builder = _Decoder(graph, weights, config)
        builder.rotary(folder)
        builder.emit()
        return graph.save()


class _Decoder:
    def __init__(self, graph: Graph, weights: Weights, config: Any) -> None:
        self.g, self.w, self.config = graph, weights, config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        if self.head_dim % 16:
            raise ExportError(
                f"{config.model_type}: heads of {self.head_dim} channels; "
                "GroupQueryAttention takes multiples of 16"
            )
        self.cos: ir.Value | None = None
        self.sin: ir.Value | None = None
        self.presents: list[tuple[ir.Value, str]] = []

    def rotary(self, folder: Path) -> None:
        """Tables of cos and sin (positions, head_dim / 2), by the model's own frequencies."""
        rotary: Any = skeleton(folder).model.rotary_emb  # type: ignore[union-attr]
        if 2 * len(rotary.inv_freq) != self.head_dim:
            raise ExportError(
                f"{folder}: rotary embedding of a part of each head is not emitted yet"
            )
        positions = torch.arange(self.config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, rotary.inv_freq.float())
        self.cos = self.g.weight("cos_cache", angles.cos() * rotary.attention_scaling)
        self.sin = self.g.weight("sin_cache", angles.sin() * rotary.attention_scaling)

    def emit(self) -> None:
        """All nodes, in the order in which the model reads."""
        g, blocks = self.g, self.config.num_hidden_layers
        ids = g.input("input_ids", torch.int64, ["batch", "sequence"])
        mask = g.input("attention_mask", torch.int64, ["batch", "total"])
        total = g.op("Gather", g.op("Shape", mask), g.constant("one", [1]), axis=0)
        total = g.op("Cast", g.op("Squeeze", total), to=ir.DataType.INT32)
        length = g.op("ReduceSum", mask, g.constant("last_axis", [1]), keepdims=0)
        last = g.op("Sub", g.op("Cast", length, to=ir.DataType.INT32), self._int32_one())
        embedding = g.weight("model.embed_tokens.weight", self.w.read("model.embed_tokens.weight"))
        x = g.op("Gather", embedding, ids, axis=0)
        for index in progress.track(range(blocks), "onnx", blocks):
            x = self.block(index, x, last, total)
        x = self.norm("model.norm", x)
        tied = self.config.tie_word_embeddings or not self.w.has("lm_head.weight")
        logits = self._product(x, embedding) if tied else self.linear("lm_head", x)
        g.output(logits, "logits", ["batch", "sequence", self.config.vocab_size])
        for value, name in self.presents:
            g.output(value, name, ["batch", self.kv_heads, "total", self.head_dim])

    def block(self, index: int, x: ir.Value, last: ir.Value, total: ir.Value) -> ir.Value:
        """One decoder block: pre-norm, or OLMo 2's norms on the sublayers' outputs."""
        path = f"model.layers.{index}"
        before = self.w.has(f"{path}.input_layernorm.weight")
        h = self.norm(f"{path}.input_layernorm", x) if before else x
        h = self.attention(index, h, last, total)
        if not before:
            h = self.norm(f"{path}.post_attention_layernorm", h)
        x = self.g.op("Add", x, h)
        h = self.norm(f"{path}.post_attention_layernorm", x) if before else x
        h = self.ffn(f"{path}.mlp", h)
        if not before:
            h = self.norm(f"{path}.post_feedforward_layernorm", h)
        return self.g.op("Add", x, h)

    def attention(self, index: int, x: ir.Value, last: ir.Value, total: ir.Value) -> ir.Value:
        """Projections, q/k norms where there are any, rotary and attention in one operator."""
        g, path = self.g, f"model.layers.{index}.self_attn"
        q, k, v = self._qkv(path, x)
        shape: list[int | str] = ["batch", self.kv_heads, "past", self.head_dim]
        past = [
            g.input(f"past_key_values.{index}.{kind}", g.dtype, shape) for kind in ("key", "value")
        ]
        out, key, value = g.op(
            "GroupQueryAttention",
            self._head_norm(f"{path}.q_norm", q, self.heads),
            self._head_norm(f"{path}.k_norm", k, self.kv_heads),
            v,
            *past,
            last,
            total,
            self.cos,
            self.sin,
            domain=MICROSOFT,
            outputs=3,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            do_rotary=1,
            local_window_size=self._window(index),
        )
        self.presents += [(key, f"present.{index}.key"), (value, f"present.{index}.value")]
        return self.linear(f"{path}.o_proj", out)

    def _qkv(self, path: str, x: ir.Value) -> list[ir.Value]:
        if not self.w.has(f"{path}.qkv_proj.weight"):
            return [self.linear(f"{path}.{name}_proj", x) for name in "qkv"]
        widths = [self.heads * self.head_dim, *2 * [self.kv_heads * self.head_dim]]
        return self._split(self.linear(f"{path}.qkv_proj", x), widths)

    def ffn(self, path: str, x: ir.Value) -> ir.Value:
        """down(act(gate(x)) * up(x)), with gate and up separate or fused."""
        if self.w.has(f"{path}.gate_up_proj.weight"):
            fused = self.linear(f"{path}.gate_up_proj", x)
            gate, up = self._split(fused, [self.config.intermediate_size] * 2)
        else:
            gate, up = self.linear(f"{path}.gate_proj", x), self.linear(f"{path}.up_proj", x)
        gate = self.g.op("Mul", gate, self.g.op("Sigmoid", gate))
        return self.linear(f"{path}.down_proj", self.g.op("Mul", gate, up))

    def linear(self, path: str, x: ir.Value) -> ir.Value:
        """x W^T + b. The one place that decides how a linear is emitted."""
        weight = self.g.weight(f"{path}.weight", self.w.read(f"{path}.weight"))
        y = self._product(x, weight)
        if self.w.has(f"{path}.bias"):
            y = self.g.op("Add", y, self.g.weight(f"{path}.bias", self.w.read(f"{path}.bias")))
        return y

    def _product(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """x W^T with W stored (out, in) as in the checkpoint: a tied head needs no second copy."""
        return self.g.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)

    def norm(self, path: str, x: ir.Value) -> ir.Value:
        """RMSNorm over the last axis, its mean square in float32."""
        weight = self.g.weight(f"{path}.weight", self.w.read(f"{path}.weight"))
        return self.g.op(
            "SimplifiedLayerNormalization",
            x,
            weight,
            axis=-1,
            epsilon=float(self.config.rms_norm_eps),
            stash_type=1,
        )

    def _head_norm(self, path: str, x: ir.Value, heads: int) -> ir.Value:
        """q or k norm: none, over the full width (OLMo 2), or per head (Qwen 3)."""
        if not self.w.has(f"{path}.weight"):
            return x
        if len(self.w.read(f"{path}.weight")) == heads * self.head_dim and heads > 1:
            return self.norm(path, x)
        by_head = self.g.constant(f"by_head_{heads}", [0, 0, heads, self.head_dim])
        flat = self.g.constant(f"flat_{heads}", [0, 0, heads * self.head_dim])
        return self.g.op("Reshape", self.norm(path, self.g.op("Reshape", x, by_head)), flat)

    def _split(self, x: ir.Value, widths: list[int]) -> list[ir.Value]:
        sizes = self.g.constant(f"split_{'_'.join(map(str, widths))}", widths)
        parts: list[ir.Value] = self.g.op("Split", x, sizes, outputs=len(widths), axis=-1)
        return parts

    def _window(self, index: int) -> int:
        """Keys a token sees, itself included; -1 sees all."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if not window or (kinds and kinds[index] != "sliding_attention"):
            return -1
        return int(window)

    def _int32_one(self) -> ir.Value:
        return self.g.op("Cast", self.g.constant("one", [1]), to=ir.DataType.INT32)


def _check(config: Any) -> None:
    if config.model_type not in SUPPORTED:
        raise ExportError(
            f"{config.model_type}: no ONNX graph for this family yet"
            f"{did_you_mean(config.model_type, SUPPORTED)}; set export.formats to [safetensors]"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise ExportError(
            f"{config.model_type}: rotary scaling {kind!r} depends on the length and is not "
            f"emitted; supported: {', '.join(_STATIC_ROPE)}"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ExportError(
            f"{config.model_type}: activation {activation!r} is not emitted; only silu"
        )
