"""Prune: remove blocks and sublayers structurally."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods import Method, Params


class PruneParams(Params):
    """How the result is written."""

    flavour: Literal["auto", "canonical", "nemotron-nas"] = Field(
        "auto",
        description="auto keeps the architecture where only whole blocks go, else canonical: "
        "own small model files beside the weights; nemotron-nas: what servers read without a "
        "plugin, Llama-shaped models only",
    )


METHODS = {
    "blocks": Method(
        "compressor.prune.driver:prune",
        PruneParams,
        "remove blocks, attentions and feed-forwards with all that serves them alone",
        "arXiv:2403.17887 section 3.2 (blocks), arXiv:2406.15786 section 3 (sublayers)",
        "one copy of the weights, tensor by tensor",
        ("selection",),
    ),
}
