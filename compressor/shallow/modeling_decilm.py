"""Llama without the attention or feed-forward parts of some blocks.

This file is copied into checkpoint folders: it needs torch and transformers and nothing else.
"""

from __future__ import annotations

from transformers import LlamaForCausalLM

from .configuration_decilm import BRANCHES, DeciLMConfig
from .sublayer_removal import remove_sublayers


class DeciLMForCausalLM(LlamaForCausalLM):
    """A Llama whose `no_op` branches are absent; the others keep their native names."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        """Build the Llama and take out what its blocks do without."""
        super().__init__(config)
        remove_sublayers(self.model.layers, config.skipped, BRANCHES)
