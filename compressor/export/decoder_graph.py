"""The ONNX graph of a Llama-shaped decoder, emitted from the checkpoint's tensors.

Nothing is traced. What a family has (biases, per-head or full-width q/k norms, fused
projections) is read off the names and shapes of the tensors, the rest is in `traits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoConfig

from compressor import progress
from compressor.blocks import Blocks
from compressor.decoder import skeleton
from compressor.dense import DenseReader
from compressor.export.graph import MICROSOFT, Graph
from compressor.export.linears import Linears
from compressor.export.traits import ACTIVATIONS, activation_of, head_dim, traits_of


@dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        caches: pairs of key and value inputs; fewer than blocks where attention was removed.
        container_bytes, nominal_bytes: of the integers, see `Linears`; 0 in a dense graph.
    """

    caches: int
    container_bytes: int
    nominal_bytes: int


def build(
    folder: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    accuracy_level: int = 0,
    head_bits: int | None = None,
) -> Built:
    """Write model.onnx and model.onnx.data into `out` for the checkpoint in `folder`.

    Inputs: input_ids (B, S), attention_mask (B, P + S), past_key_values.i.{key,value}
    (B, kv_heads, P, head_dim); outputs: logits (B, S, V), present.i.{key,value}. Batch,
    sequence and past are dynamic; sequences are padded on the right only, because
    GroupQueryAttention takes lengths from the mask's sum.
    Raises `NotEmitted` for families and rotary scalings, `ExportError` for group sizes that the
    operators lack.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    traits_of(config)
    reader = DenseReader(folder)
    with Graph(out, dtype) as graph:
        linears = Linears(graph, reader, accuracy_level, head_bits)
        builder = _Decoder(graph, linears, config)
        builder.rotary(folder)
        builder.emit()
        graph.save()
    caches = len(builder.presents) // 2
    return Built(caches, linears.container_bytes, round(linears.nominal_bytes))


class _Decoder:
    def __init__(self, graph: Graph, linears: Linears, config: Any) -> None:
        self.g, self.linears, self.config = graph, linears, config
        self.w, self.traits = linears.reader, traits_of(config)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or self.heads
        self.head_dim = head_dim(config)
        self.tables: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.scaling: dict[int, float] = {}
        self.presents: list[tuple[ir.Value, str]] = []
        self.skipped: dict[int, list[str]] = getattr(config, "skipped", {})

    def rotary(self, folder: Path) -> None:
        """Tables of cos and sin (positions, rotated / 2) and scales, by the model's own modules."""
        model: Any = skeleton(folder)
        positions = torch.arange(self.config.max_position_embeddings, dtype=torch.float32)
        own: Any = model.get_decoder().rotary_emb
        for buffer in [n for n, _ in own.named_buffers() if n.endswith("inv_freq")]:
            if "original" in buffer:
                continue
            kind = buffer.removesuffix("inv_freq")
            angles = torch.outer(positions, getattr(own, buffer).float())
            factor = getattr(own, f"{kind}attention_scaling")
            cos = self.g.weight(f"{kind}cos_cache", angles.cos() * factor)
            self.tables[kind] = cos, self.g.weight(f"{kind}sin_cache", angles.sin() * factor)
        blocks = Blocks(model)
        for index in range(len(blocks)):
            for module in blocks.attention(index).values():
                self.scaling[index] = float(module.scaling)  # type: ignore[arg-type]

    def emit(self) -> None:
        """All nodes, in the order in which the model reads."""
        g, blocks = self.g, self.config.num_hidden_layers
        ids = g.input("input_ids", torch.int64, ["batch", "sequence"])
        mask = g.input("attention_mask", torch.int64, ["batch", "total"])
        total = g.op("Gather", g.op("Shape", mask), g.constant("one", [1]), axis=0)
        total = g.op("Cast", g.op("Squeeze", total), to=ir.DataType.INT32)
        length = g.op("ReduceSum", mask, g.constant("last_axis", [1]), keepdims=0)
        last = g.op("Cast", g.op("Sub", length, g.constant("one", [1])), to=ir.DataType.INT32)
        x = self.linears.embed(ids)
        if self.traits.scaled_embedding:
            x = g.op("Mul", x, g.constant("embedding_scale", self.config.hidden_size**0.5))
        self.stream: tuple[ir.Value, ir.Value | None] = g.name(x, "model.embed_tokens"), None
        for index in progress.track(range(blocks), "onnx", blocks):
            self.block(index, last, total)
        x = self.read("model.norm")
        logits = self._capped(self.linears.head(x))
        if g.dtype == torch.bfloat16:  # eight bits are too few to choose a token by
            logits = g.op("Cast", logits, to=ir.DataType.FLOAT)
            logits.dtype = ir.DataType.FLOAT
        g.output(logits, "logits", ["batch", "sequence", self.config.vocab_size])
        for value, name in self.presents:
            g.output(value, name, ["batch", self.kv_heads, "total", self.head_dim])

    def block(self, index: int, last: ir.Value, total: ir.Value) -> None:
        """One decoder block; a sublayer that was removed is not there."""
        path, gone = f"model.layers.{index}", self.skipped.get(index, [])
        for which, kind in enumerate(("attention", "mlp")):
            if kind in gone:
                continue
            before, after = self.traits.before[which], self.traits.after[which]
            x = self.read(before and f"{path}.{before}")
            y = self.ffn(f"{path}.mlp", x) if which else self.attention(index, x, last, total)
            if after:
                y = self.norm(f"{path}.{after}", y)
            self.stream = self.stream[0], y

    def read(self, norm: str | None) -> ir.Value:
        """Add what the last sublayer gave to the stream and return it, normed."""
        x, pending = self.stream
        if pending is not None and norm:
            y, _, _, x = self.g.op(
                "SkipSimplifiedLayerNormalization",
                x,
                pending,
                self._norm_weight(norm),
                domain=MICROSOFT,
                outputs=4,
                epsilon=float(self.config.rms_norm_eps),
            )
            self.stream = x, None
            return y
        if pending is not None:
            x = self.g.op("Add", x, pending)
        self.stream = x, None
        return self.norm(norm, x) if norm else x

    def attention(self, index: int, x: ir.Value, last: ir.Value, total: ir.Value) -> ir.Value:
        """Projections, q/k norms where there are any, rotary and attention in one operator."""
        g, path, cache = self.g, f"model.layers.{index}.self_attn", len(self.presents) // 2
        shape: list[int | str] = ["batch", self.kv_heads, "past", self.head_dim]
        past = [
            g.input(f"past_key_values.{cache}.{kind}", g.dtype, shape) for kind in ("key", "value")
        ]
        kind = getattr(self.config, "layer_types", None)
        tables = self.tables.get(f"{kind[index]}_" if kind else "") or self.tables[""]
        out, key, value = g.op(
            "GroupQueryAttention",
            *self._qkv(path, x),
            *past,
            last,
            total,
            *tables,
            domain=MICROSOFT,
            outputs=3,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            do_rotary=1,
            local_window_size=self._window(index),
            scale=self.scaling[index],
            softcap=float(getattr(self.config, "attn_logit_softcapping", None) or 0.0),
        )
        self.presents += [(key, f"present.{cache}.key"), (value, f"present.{cache}.value")]
        return g.name(self.linears(f"{path}.o_proj", out), path)

    def _qkv(self, path: str, x: ir.Value) -> list[ir.Value | None]:
        """q, k, v; or all in one, as the operator takes them where no norm stands between."""
        fused = self.w.has(f"{path}.qkv_proj.weight")
        names = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
        parts = self.linears.together([f"{path}.{name}" for name in names], x)
        normed = self.w.has(f"{path}.q_norm.weight")
        if len(parts) == 1 and not normed:
            return [*parts, None, None]
        if len(parts) == 1:
            widths = [self.heads * self.head_dim, *2 * [self.kv_heads * self.head_dim]]
            parts = self._split(parts[0], widths)
        q, k, v = parts
        if not normed:
            return [q, k, v]
        q = self._head_norm(f"{path}.q_norm", q, self.heads)
        return [q, self._head_norm(f"{path}.k_norm", k, self.kv_heads), v]

    def ffn(self, path: str, x: ir.Value) -> ir.Value:
        """down(act(gate(x)) * up(x)); stacking gate and up saves less than splitting them costs."""
        g = self.g
        if self.w.has(f"{path}.gate_up_proj.weight"):
            both = self.linears(f"{path}.gate_up_proj", x)
            gate, up = self._split(both, [self.config.intermediate_size] * 2)
        else:
            gate, up = (self.linears(f"{path}.{name}", x) for name in ("gate_proj", "up_proj"))
        if ACTIVATIONS[activation_of(self.config)] == "silu":
            gate = g.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
        else:
            gate = g.op("Gelu", gate, approximate="tanh")
        return g.name(self.linears(f"{path}.down_proj", g.op("Mul", gate, up)), path)

    def norm(self, path: str, x: ir.Value) -> ir.Value:
        """RMSNorm over the last axis, its mean square in float32."""
        return self.g.op(
            "SimplifiedLayerNormalization",
            x,
            self._norm_weight(path),
            axis=-1,
            epsilon=float(self.config.rms_norm_eps),
            stash_type=1,
        )

    def _norm_weight(self, path: str) -> ir.Value:
        weight = self.w.read(f"{path}.weight").float() + self.traits.norm_offset
        return self.g.weight(f"{path}.weight", weight)

    def _head_norm(self, path: str, x: ir.Value, heads: int) -> ir.Value:
        """q or k norm: over the full width (OLMo 2), or per head (Qwen 3, Gemma 3)."""
        if len(self.w.read(f"{path}.weight")) == heads * self.head_dim and heads > 1:
            return self.norm(path, x)
        by_head = self.g.constant(f"by_head_{heads}", [0, 0, heads, self.head_dim])
        flat = self.g.constant(f"flat_{heads}", [0, 0, heads * self.head_dim])
        return self.g.op("Reshape", self.norm(path, self.g.op("Reshape", x, by_head)), flat)

    def _split(self, x: ir.Value, widths: list[int]) -> list[ir.Value]:
        sizes = self.g.constant(f"split_{'_'.join(map(str, widths))}", widths)
        parts: list[ir.Value] = self.g.op("Split", x, sizes, outputs=len(widths), axis=-1)
        return parts

    def _capped(self, logits: ir.Value) -> ir.Value:
        """c tanh(logits / c) where the family caps its logits."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        if not cap:
            return logits
        by = self.g.constant("logit_cap", float(cap))
        return self.g.op("Mul", self.g.op("Tanh", self.g.op("Div", logits, by)), by)

    def _window(self, index: int) -> int:
        """Keys a token sees, itself included; -1 sees all."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if not window or (kinds and kinds[index] != "sliding_attention"):
            return -1
        return int(window)
