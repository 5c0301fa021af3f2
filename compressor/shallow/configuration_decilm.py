"""Configuration of Llama-shaped blocks of which some lack a branch, as `nemotron-nas` servers read.

This file is copied into checkpoint folders: it needs transformers and nothing else.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

BRANCHES = {
    "attention": {"zero": "self_attn", "identity": ["input_layernorm"]},
    "mlp": {"zero": "mlp", "identity": ["post_attention_layernorm"]},
}
"""The children of a block that go with a branch."""


class DeciLMConfig(LlamaConfig):
    """A Llama config with one entry of `block_configs` per block.

    Attributes:
        block_configs: per block, `attention` and `ffn` with their `no_op`; servers read
            `n_heads_in_group` and `ffn_mult` of each, here they must be the same in all.
        skipped: of each block that lacks a branch, which: `["attention"]` or `["mlp"]`.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        """Read sizes off the blocks, as config.json has null in their place."""
        self.block_configs = [_namespace(block) for block in block_configs or []]
        self.skipped: dict[int, list[str]] = {}
        for index, block in enumerate(self.block_configs):
            branches = {"attention": block.attention, "mlp": block.ffn}
            gone = [kind for kind, branch in branches.items() if branch.no_op]
            if gone:
                self.skipped[index] = gone
        if self.block_configs:
            groups = {b.attention.n_heads_in_group for b in self.block_configs} - {None}
            mults = {b.ffn.ffn_mult for b in self.block_configs} - {None}
            if len(groups) > 1 or len(mults) > 1:
                raise ValueError("block_configs of different sizes are not read here")
            heads, hidden = kwargs["num_attention_heads"], kwargs["hidden_size"]
            kwargs["num_key_value_heads"] = heads // max(groups, default=1)
            kwargs["intermediate_size"] = ffn_width(max(mults, default=1.0), hidden)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json: sizes that blocks may differ in are null."""
        raw = super().to_dict()
        raw.pop("skipped", None)
        blocks = [{k: vars(v) for k, v in vars(b).items()} for b in self.block_configs]
        return raw | {
            "block_configs": blocks,
            "num_key_value_heads": None,
            "intermediate_size": None,
        }


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """Width of a feed-forward: int(2 ffn_mult D / 3), rounded up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


def _namespace(block: Any) -> Any:
    if not isinstance(block, dict):
        return block
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in block.items()})
