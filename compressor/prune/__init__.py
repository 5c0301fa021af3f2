"""Prune: remove blocks, sublayers, heads, channels or single weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compressor.methods import Method, Params


class PruneParams(Params):
    """How the result is written."""

    flavour: Literal["auto", "canonical", "nemotron-nas"] = Field(
        "auto",
        description="auto keeps the architecture where only whole blocks go, else canonical: "
        "own small model files beside the weights; nemotron-nas: what servers read without a "
        "plugin, Llama-shaped models only",
    )


class MagnitudeParams(Params):
    """Parameters of magnitude pruning."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the blocks' weights to zero")


class WandaParams(MagnitudeParams):
    """Parameters of Wanda."""

    allocation: Literal["uniform", "dlp", "owl"] = Field(
        "uniform", description="the same sparsity in every block, or more where less matters"
    )
    alpha: float = Field(
        0.15, gt=0, lt=0.5, description="half the span of the blocks' sparsities; OWL has 0.08"
    )
    outlier: float = Field(5.0, gt=1, description="owl: times the mean that makes an outlier")
    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        "unstructured", description="weights to keep in every run of inputs"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pattern != "unstructured" and (self.sparsity, self.allocation) != (0.5, "uniform"):
            raise ValueError(f"pattern {self.pattern} is a uniform sparsity of 0.5 and no other")
        return self


class SlimgptParams(Params):
    """Parameters of SlimGPT."""

    ratio: float = Field(0.2, gt=0, lt=1, description="share of the blocks' weights to remove")
    attention_ratio: float | None = Field(
        None, ge=0, lt=1, description="share of key-value groups to remove, null for ratio"
    )
    multiple: int = Field(64, gt=0, description="the FFN width is a multiple of this")
    damp: float = Field(
        0.01, gt=0, le=1, description="ridge, as a share of the gram's mean diagonal"
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
    "magnitude": Method(
        "compressor.prune.magnitude:magnitude",
        MagnitudeParams,
        "zero the smallest weights, tensor by tensor, under one global LAMP threshold",
        "Lee et al., ICLR 2021, arXiv:2010.07611 section 3",
        "weights only, read three times",
    ),
    "wanda": Method(
        "compressor.prune.wanda:wanda",
        WandaParams,
        "zero in every row the weights of least |W_ij| ||X_j||, block by block",
        "arXiv:2306.11695 section 3; dlp arXiv:2505.23807, owl arXiv:2310.05175",
        "2 forwards; 3 with dlp or owl",
        ("calibration",),
    ),
    "slimgpt": Method(
        "compressor.prune.slimgpt:slimgpt",
        SlimgptParams,
        "remove key-value groups and FFN channels of every block; what stays makes up for them",
        "arXiv:2412.18110 section 3",
        "3 forwards, an inverse and its updates per output matrix",
        ("calibration",),
    ),
}
