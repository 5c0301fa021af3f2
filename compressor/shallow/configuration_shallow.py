"""Configuration of a causal language model whose blocks lack attention or feed-forward parts.

This file is copied into checkpoint folders: it needs transformers and nothing else.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Self

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

GUARD = "see base_config: load with AutoModelForCausalLM and trust_remote_code=True"
"""Written as `vocab_size`, where every other class expects a number: none loads it by mistake."""

_BESIDE = ("architectures", "auto_map", "dtype", "quantization_config", "transformers_version")
"""Keys of `to_dict` that stand beside `base_config` and not inside."""


class ShallowConfig(PreTrainedConfig):
    """A model's native config and what its blocks do without.

    Every instance is one of the native class too, so the native modules read it as their own.

    Attributes:
        skipped: of each block that lacks a branch, which: `["attention"]` or `["mlp"]`.
        reused: of each block that borrows a branch, whose: `{"attention": 3}` is block 3's.
        branches: per branch, the children of a block that are gone with it: `zero`, whose
            output it adds to the residual stream, and `identity`, those before or after.
        blocks: dotted path of the list of blocks, such as `model.layers`.
    """

    model_type = "shallow"
    base_model_type = ""

    def __new__(cls, base_model_type: str = "", **_: Any) -> Self:
        """Choose the class that is a native one too."""
        return super().__new__(_class_of(base_model_type) if base_model_type else cls)

    def __init__(
        self,
        base_model_type: str = "",
        base_config: dict[str, Any] | None = None,
        per_layer_config: dict[str, dict[str, Any]] | None = None,
        reused: dict[str, dict[str, int]] | None = None,
        branches: dict[str, dict[str, Any]] | None = None,
        blocks: str = "",
        **kwargs: Any,
    ) -> None:
        """Read what `to_dict` writes; `per_layer_config` is {"3": {"skip": ["attention"]}, ...}."""
        native = dict(base_config or {})
        self.skipped = {int(i): row["skip"] for i, row in (per_layer_config or {}).items()}
        self.reused = {int(i): givers for i, givers in (reused or {}).items()}
        self.branches, self.blocks = branches or {}, blocks
        self.base_architectures = native.pop("architectures", None)
        kwargs.pop("model_type", None)
        if kwargs.get("vocab_size") == GUARD:
            del kwargs["vocab_size"]
        super().__init__(**{**native, **kwargs})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the family's name, as the class has none that could be imported."""
        return _empty, (self.base_model_type,), self.__dict__

    def to_dict(self) -> dict[str, Any]:
        """The native config under `base_config`, what is removed beside it.

        The native `model_type` stays out of it, or the native class would look for its own
        config in there, find it, and make up the missing weights.
        """
        native = super().to_dict()
        beside = {name: native.pop(name) for name in _BESIDE if name in native}
        skipped, reused = native.pop("skipped"), native.pop("reused")
        own = {"branches": native.pop("branches"), "blocks": native.pop("blocks")}
        native["architectures"] = native.pop("base_architectures")
        for name in ("model_type", "_name_or_path"):
            native.pop(name, None)
        return {
            **beside,
            **own,
            "model_type": self.model_type,
            "base_model_type": self.base_model_type,
            "vocab_size": GUARD,
            "num_hidden_layers": self.num_hidden_layers,
            "per_layer_config": {str(i): {"skip": skipped[i]} for i in sorted(skipped)},
            **({"reused": {str(i): reused[i] for i in sorted(reused)}} if reused else {}),
            "base_config": native,
        }

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """This config; for a cache (`decoder=True`) one with a layer per attention that is left.

        transformers picks masks from `layer_types` by block and cache layers by `layer_idx`,
        which counts attentions: the two differ as soon as one is gone.
        """
        gone = {i for i, branches in self.skipped.items() if "attention" in branches}
        if not decoder or encoder or not gone:
            return super().get_text_config(decoder, encoder)
        view: Any = copy.copy(self)
        view.skipped = {}
        left = [i for i in range(self.num_hidden_layers) if i not in gone]
        kinds = getattr(self, "layer_types", None)
        view.num_hidden_layers = len(left)
        if kinds is not None:
            view.layer_types = [kinds[i] for i in left]
        return view


def _empty(model_type: str) -> ShallowConfig:
    return ShallowConfig.__new__(ShallowConfig, model_type)


@functools.cache
def _class_of(model_type: str) -> type[ShallowConfig]:
    """The class that is both `ShallowConfig` and the native config class of a family."""
    from .modeling_shallow import ShallowForCausalLM

    body = {
        "__init__": ShallowConfig.__init__,
        "__module__": __name__,
        "base_model_type": model_type,
    }
    made: Any = type("ShallowConfig", (ShallowConfig, CONFIG_MAPPING[model_type]), body)
    AutoModelForCausalLM.register(made, ShallowForCausalLM)
    return made
