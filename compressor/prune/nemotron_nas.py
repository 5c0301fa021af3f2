"""The `nemotron-nas` flavour: Llama-shaped blocks without some branches, as servers read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compressor.blocks import Blocks
from compressor.decoder import skeleton
from compressor.errors import NotApplicable
from compressor.families import LLAMA_SHAPED, family_of, legacy_rope
from compressor.prune import sublayers
from compressor.records import Selection
from compressor.shallow.configuration_decilm import DeciLMConfig, ffn_width

MADE = (DeciLMConfig.model_type,)
"""The families that this flavour makes."""

_BLOCK = {
    "self_attn": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    "mlp": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    "input_layernorm": ("weight",),
    "post_attention_layernorm": ("weight",),
}
_PLAIN = {"replace_with_linear": False, "sparsify": None}
_WINDOW = {
    "window_length": None,
    "num_sink_tokens": None,
    "use_prefill_window_in_sink_attention": False,
    "unshifted_sink": False,
}


def prune(source: Path, selection: Selection, out: Path) -> None:
    """Write what the selection leaves as `DeciLMForCausalLM` with one block_configs entry each.

    Names stay `model.layers.i.self_attn|mlp`, as in the canonical checkpoint. Raises
    `NotApplicable`, saying why, for a model or a selection that the format cannot hold.
    """
    _check_shape(source)
    sublayers.write(source, selection, out, config)


def config(cut: sublayers.Cut) -> dict[str, Any]:
    """The config.json: the Llama config, sizes that blocks may differ in written per block."""
    native = dict(cut.native)
    if cut.reused:
        raise NotApplicable(
            "nemotron-nas: its layers cannot run with another layer's weights; drop these "
            "sublayers, or write the canonical flavour"
        )
    if "attention" in cut.skipped.get(0, ()):
        raise NotApplicable(
            "nemotron-nas: layer 0 must keep its attention, servers start the residual stream "
            "there; keep it, or write the canonical flavour"
        )
    parsed: Any = AutoConfig.for_model(**native)
    heads, hidden = parsed.num_attention_heads, parsed.hidden_size
    group = heads // parsed.num_key_value_heads
    ffn_mult = 3 * parsed.intermediate_size / (2 * hidden)
    blocks = []
    for index in range(cut.depth):
        gone = cut.skipped.get(index, ())
        no_attention, no_ffn = "attention" in gone, "mlp" in gone
        attention = {"no_op": no_attention, "n_heads_in_group": None if no_attention else group}
        ffn = {"no_op": no_ffn, "ffn_mult": None if no_ffn else ffn_mult}
        blocks.append({"attention": attention | _PLAIN | _WINDOW, "ffn": ffn | _PLAIN})
    return {
        **native,
        **legacy_rope(native),
        "model_type": DeciLMConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": blocks,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": None,
        "num_key_value_heads": None,
    }


def _check_shape(source: Path) -> None:
    """Refuse what is not computed exactly as a plain Llama."""
    native: Any = AutoConfig.from_pretrained(source)
    family, model = family_of(native), skeleton(source)
    known = {f"{child}.{name}" for child, names in _BLOCK.items() for name in names}
    extra = {n for block in Blocks(model) for n, _ in block.named_parameters()} - known
    heads, hidden, reason = native.num_attention_heads, native.hidden_size, ""
    if extra:
        reason = f"its blocks also hold {', '.join(sorted(extra))}"
    elif family not in LLAMA_SHAPED:
        reason = f"{family} blocks compute something else"
    elif getattr(native, "sliding_window", None):
        reason = f"its attention is limited to a window of {native.sliding_window} tokens"
    elif (native.head_dim or hidden // heads) * heads != hidden:
        reason = f"its {heads} heads of {native.head_dim} do not make up hidden_size {hidden}"
    else:
        width = native.intermediate_size
        reproduced = ffn_width(3 * width / (2 * hidden), hidden)
        if reproduced != width:
            reason = f"widths are multiples of 256, its {width} would be read as {reproduced}"
    if reason:
        raise NotApplicable(
            f"{source}: nemotron-nas holds plain Llama blocks only: {reason}; write the canonical "
            "flavour"
        )
