"""Everything that differs between model families, as data and nowhere else.

The defaults resolve attention and feed-forward of almost every causal language
model in transformers; a family that names them otherwise is one row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Names:
    """Names of a block's children, by role; the first that exists counts."""

    attention: tuple[str, ...] = ("self_attn", "attn", "attention", "self_attention")
    ffn: tuple[str, ...] = ("mlp", "feed_forward", "ffn")


FAMILIES: dict[str, Names] = {
    "opt": Names(ffn=("fc1", "fc2")),
}
"""Rows for the families that the defaults do not fit, by `model_type`."""

LLAMA_SHAPED = ("llama", "mistral")
"""Families whose blocks compute what Llama's do, so that their weights fit `nemotron-nas`."""

SHIPPED = {
    "shallow": ("configuration_shallow.py", "modeling_shallow.py", "sublayer_removal.py"),
    "nemotron-nas": ("configuration_decilm.py", "modeling_decilm.py", "sublayer_removal.py"),
}
"""Checkpoints without some sublayers, and the files of `compressor/shallow` they carry."""

DEPTH_DEPENDENT = ("scale_attn_by_inverse_layer_idx",)
"""Config switches that tie a block's arithmetic to its index: such a model cannot lose blocks."""

NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "bad_words_ids")
"""Config lists whose length may equal the number of blocks by accident."""

TUPLE_OUTPUT = ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt")
"""Families whose blocks return a tuple with the hidden states first, not a tensor."""

RENAMED_ON_DISK = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}
"""Parameters whose name in the file is not their name in the module."""

POSITIONS_FROM_MASK = ("bloom", "opt")
"""Families that count positions on a 2-D attention mask, so cannot be handed a ready 4-D one."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What servers call the linears that they load as one; their rules are looked up by that name."""


def family_of(config: Any) -> str:
    """The native `model_type` of a config, also of one whose blocks lack sublayers."""
    name: str = getattr(config, "base_model_type", None) or config.model_type
    return name


def native_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The native part of a config.json: all of it, unless blocks lack sublayers."""
    if "base_config" not in raw:
        return raw
    return {**raw["base_config"], "model_type": raw["base_model_type"]}


def legacy_rope(native: dict[str, Any]) -> dict[str, Any]:
    """What transformers before 5 and many servers read for `rope_parameters`.

    They know no such key and fall back on theta 10000 without a word.
    """
    rope = native.get("rope_parameters") or {}
    tables = {kind: table for kind, table in rope.items() if isinstance(table, dict)}
    whole = dict(tables.get("full_attention", {}) if tables else rope)
    if not whole:
        return {}
    theta, kind = whole.pop("rope_theta", 10000.0), whole.get("rope_type", "default")
    legacy = {"rope_theta": theta, "rope_scaling": None if kind == "default" else whole}
    if "sliding_attention" in tables:
        legacy["rope_local_base_freq"] = tables["sliding_attention"]["rope_theta"]
    return legacy
