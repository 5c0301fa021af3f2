"""Checkpoints without some sublayers: their classes, made known to transformers.

The other files of this folder are copied into the checkpoints, so that these load without us.
"""

from __future__ import annotations

import functools

from transformers import AutoConfig, AutoModelForCausalLM

from compressor.shallow.configuration_decilm import DeciLMConfig
from compressor.shallow.configuration_shallow import ShallowConfig
from compressor.shallow.modeling_decilm import DeciLMForCausalLM
from compressor.shallow.modeling_shallow import ShallowForCausalLM


@functools.cache
def register() -> None:
    """Let the Auto classes load such folders by our code, never by the folder's own."""
    AutoConfig.register(ShallowConfig.model_type, ShallowConfig)
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM)
    for config in (ShallowConfig, DeciLMConfig):
        config.register_for_auto_class()
    for model in (ShallowForCausalLM, DeciLMForCausalLM):
        model.register_for_auto_class("AutoModelForCausalLM")
