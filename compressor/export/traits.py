"""What a family's blocks compute beyond what the tensors' names show, as data and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.errors import NotEmitted
from compressor.families import family_of


@dataclass(frozen=True)
class Traits:
    """A family of Llama-shaped decoders: RMSNorms, rotary attention, gated feed-forward.

    Attributes:
        before, after: norms on the input and on the output of attention and of feed-forward,
            by name in the block; None where there is none.
        norm_offset: added to every norm's weight; Gemma's are stored less one.
        scaled_embedding: multiply the embedding by sqrt(hidden_size).
    """

    before: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str | None, str | None] = (None, None)
    norm_offset: float = 0.0
    scaled_embedding: bool = False


_PRE_NORM = Traits()
_POST_NORM = Traits(
    before=(None, None), after=("post_attention_layernorm", "post_feedforward_layernorm")
)
_GEMMA = Traits(
    before=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
)
TRAITS: dict[str, Traits] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "olmo2": _POST_NORM,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}
"""Families that are emitted, by `model_type`."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
"""Names of gate activations in configs, and what they are."""

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def traits_of(config: Any) -> Traits:
    """The traits of a config's family.

    Raises `NotEmitted` for families, activations, widths of heads and rotary scalings that are
    not emitted.
    """
    family = family_of(config)
    if family not in TRAITS:
        raise NotEmitted(f"{family}: no ONNX nodes are emitted for this family")
    activation = activation_of(config)
    if activation not in ACTIVATIONS:
        raise NotEmitted(
            f"{family}: activation {activation!r} is not emitted; only {', '.join(ACTIVATIONS)}"
        )
    if head_dim(config) % 16:
        raise NotEmitted(
            f"{family}: heads of {head_dim(config)} channels; "
            "GroupQueryAttention takes multiples of 16"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in {table.get("rope_type", "default") for table in _tables(rope)}:
        if kind not in _STATIC_ROPE:
            raise NotEmitted(
                f"{family}: rotary scaling {kind!r} depends on the length and is not emitted; "
                f"supported: {', '.join(_STATIC_ROPE)}"
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise NotEmitted(f"{family}: attention to later tokens is not emitted")
    return TRAITS[family]


def activation_of(config: Any) -> str:
    """The gate's activation, as the config names it."""
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))


def head_dim(config: Any) -> int:
    """Channels per head."""
    own: int | None = getattr(config, "head_dim", None)
    return own or int(config.hidden_size // config.num_attention_heads)


def _tables(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Rotary parameters: of the model, or one set per kind of layer."""
    nested = [table for table in rope.values() if isinstance(table, dict)]
    return nested or [rope]
