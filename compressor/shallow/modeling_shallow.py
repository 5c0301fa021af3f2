"""A native causal language model without the attention or feed-forward parts of some blocks.

This file is copied into checkpoint folders: it needs torch and transformers and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any, Self

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationMixin,
    PreTrainedModel,
)

from .configuration_shallow import ShallowConfig
from .sublayer_removal import remove_sublayers, share_sublayers


class ShallowForCausalLM(PreTrainedModel, GenerationMixin):
    """The native model of `config.base_model_type`, its parameters under their native names.

    A removed branch adds exactly nothing to the residual stream and has no parameters; a borrowed
    one runs with those of another block.
    """

    config_class = ShallowConfig

    def __init__(self, config: Any) -> None:
        """Build the native model and take out what its blocks do without."""
        super().__init__(config)
        blocks: Any = self.get_submodule(config.blocks)
        remove_sublayers(blocks, config.skipped, config.branches)
        share_sublayers(blocks, config.reused, config.branches)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Self:
        """Load a folder, by the class that is the native one too."""
        if not isinstance(config, ShallowConfig):
            config = ShallowConfig.from_pretrained(config or path)
        if cls is ShallowForCausalLM:
            return _class_of(config.base_model_type).from_pretrained(
                path, *args, config=config, **kwargs
            )
        return super().from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Self:
        if cls is ShallowForCausalLM:
            return _class_of(config.base_model_type)._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)


@functools.cache
def _class_of(model_type: str) -> Any:
    """The class that is both `ShallowForCausalLM` and the native model class of a family."""
    native = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return type("ShallowForCausalLM", (ShallowForCausalLM, native), {"__module__": __name__})
