"""Score: how much does each block matter? Higher saliency means keep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods import Method, Params


class AngularDistanceParams(Params):
    """Parameters of the angular distance."""

    positions: Literal["last", "all"] = Field("last", description="last token (paper) or all")


class BlockInfluenceParams(Params):
    """Block influence has no parameters."""


class LampParams(Params):
    """Parameters of LAMP."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="global share of weights to remove")


_WINDOWS = "calibration windows to use at most"


class LayerContributionParams(Params):
    """Parameters of the layer contribution."""

    max_windows: int = Field(4, gt=0, description=_WINDOWS)
    positions: Literal["last", "alternate", "all"] = Field(
        "alternate",
        description="tokens whose outputs count: last of a window, every second, or all",
    )
    direction: Literal["full_skip", "skip_full"] = Field(
        "full_skip", description="KL(full || skipped) or KL(skipped || full)"
    )


class PerplexityParams(Params):
    """Parameters of the leave-one-out perplexity."""

    max_windows: int = Field(4, gt=0, description=_WINDOWS)
    positions: Literal["alternate", "all"] = Field(
        "alternate", description="tokens whose next one is predicted: every second, or all"
    )


class TaylorParams(Params):
    """Parameters of the Taylor score."""

    max_windows: int = Field(10, gt=0, description=_WINDOWS)


class RelevanceParams(Params):
    """Parameters of the layer-wise relevance."""

    max_windows: int = Field(10, gt=0, description=_WINDOWS)
    positions: Literal["last", "all"] = Field(
        "last", description="tokens whose prediction is explained: last of a window, or all"
    )


METHODS = {
    "angular_distance": Method(
        "compressor.score.angular_distance:AngularDistance",
        AngularDistanceParams,
        "angle between the residual stream before and after every run of n blocks",
        "arXiv:2403.17887 section 3.2",
        "1 forward, shared",
        ("calibration",),
    ),
    "block_influence": Method(
        "compressor.score.block_influence:BlockInfluence",
        BlockInfluenceParams,
        "1 - mean cosine between a block's input and output",
        "arXiv:2403.03853 section 3.1",
        "1 forward, shared",
        ("calibration",),
    ),
    "layer_contribution": Method(
        "compressor.score.layer_contribution:LayerContribution",
        LayerContributionParams,
        "KL divergence of the output distribution when one block is bypassed",
        "ShortV (ICCV 2025), here for every token of a text model",
        "(L+1)/2 forwards, blocks loaded once; positions=all: the head twice as often",
        ("calibration",),
        version=2,
    ),
    "perplexity": Method(
        "compressor.score.perplexity:Perplexity",
        PerplexityParams,
        "loss that one block's absence adds, in nats per token",
        "Shortened LLaMA, arXiv:2402.02834 section 3.2",
        "(L+1)/2 forwards, shared with layer_contribution",
        ("calibration",),
    ),
    "taylor": Method(
        "compressor.score.taylor:Taylor",
        TaylorParams,
        "first-order change of the loss when a block's weights go to zero",
        "Shortened LLaMA, arXiv:2402.02834 section 3.2",
        "1 forward, shared, then about 3 on the way back; blocks loaded twice",
        ("calibration",),
    ),
    "relevance": Method(
        "compressor.score.relevance:Relevance",
        RelevanceParams,
        "share of a prediction that passes through each block, sublayer and linear",
        "AttnLRP, arXiv:2402.05602; as a layer's weight: LRP-QViT",
        "1 forward, shared, then about 2 on the way back; blocks loaded twice",
        ("calibration",),
    ),
    "lamp": Method(
        "compressor.score.lamp:lamp",
        LampParams,
        "share of a block's weights that survive a global LAMP threshold",
        "Lee et al., ICLR 2021, arXiv:2010.07611 section 3",
        "weights only",
    ),
}
