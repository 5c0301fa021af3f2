"""Score: how much does each block matter? Higher saliency means keep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods import Method, Params

_WINDOWS = "calibration windows to use at most"


class AngularDistanceParams(Params):
    """Parameters of the angular distance."""

    positions: Literal["last", "all"] = Field("last", description="last token (paper) or all")


class BlockInfluenceParams(Params):
    """Block influence has no parameters."""


class LampParams(Params):
    """Parameters of LAMP."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="global share of weights to remove")


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


class SublayerCosineParams(Params):
    """The sublayer cosine has no parameters."""


class FfnSaturationParams(Params):
    """Parameters of the FFN saturation."""

    threshold: float = Field(
        0.9, gt=-1, lt=1, description="mean cosine below which leading and trailing FFNs are cold"
    )
    warm_up: int = Field(25, ge=0, description="first tokens of each window that do not count")


class LimParams(Params):
    """Parameters of the layer input modification."""

    cosine: Literal["token", "window"] = Field(
        "token", description="of each token's state, or of all states of a window as one vector"
    )


class ZdParams(Params):
    """Parameters of the z-score distribution."""

    sides: Literal["one", "two"] = Field("one", description="count z > 1, or |z| > 1")


class DlpParams(Params):
    """Parameters of DLP."""

    statistic: Literal["median", "mean"] = Field(
        "median", description="of weight times input norm; the authors' code takes the mean"
    )


class OwlParams(Params):
    """Parameters of OWL."""

    multiple: float = Field(5.0, gt=0, description="outliers exceed this multiple of the mean (M)")


class ActivityParams(Params):
    """Parameters of the L2 activity."""

    alpha: float = Field(0.8, ge=0, description="share of the span of earlier changes to exceed")


class AttentionRankParams(Params):
    """Parameters of the attention rank."""

    max_windows: int = Field(4, gt=0, description=_WINDOWS)
    max_tokens: int = Field(128, gt=0, description="tokens of each to use; the cost is cubic in it")
    tolerance: float = Field(
        0.01, gt=0, lt=1, description="singular values count above this share of the largest"
    )


class ResidualParams(Params):
    """The diagnostics of the residual stream have no parameters."""


_SHARED = "1 forward, shared"


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
        _SHARED,
        ("calibration",),
        version=2,
    ),
    "block_influence": Method(
        "compressor.score.block_influence:BlockInfluence",
        BlockInfluenceParams,
        "1 - mean cosine between a block's input and output",
        "arXiv:2403.03853 section 3.1",
        _SHARED,
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
        version=2,
    ),
    "relevance": Method(
        "compressor.score.relevance:Relevance",
        RelevanceParams,
        "share of a prediction that passes through each block, sublayer and linear",
        "AttnLRP, arXiv:2402.05602; as a layer's weight: LRP-QViT",
        "1 forward, shared, then about 2 on the way back; blocks loaded twice",
        ("calibration",),
        version=2,
    ),
    "lamp": Method(
        "compressor.score.lamp:lamp",
        LampParams,
        "share of a block's weights that survive a global LAMP threshold",
        "Lee et al., ICLR 2021, arXiv:2010.07611 section 3",
        "weights only",
    ),
    "sublayer_cosine": Method(
        "compressor.score.sublayer_cosine:SublayerCosine",
        SublayerCosineParams,
        "1 - mean cosine across each attention and each FFN, residual included",
        "LLM-Drop, arXiv:2406.15786",
        _SHARED,
        ("calibration",),
        version=2,
    ),
    "ffn_saturation": Method(
        "compressor.score.sublayer_cosine:FfnSaturation",
        FfnSaturationParams,
        "1 - mean cosine across each FFN behind a warm-up; cold first and last FFNs go last",
        "FFN-SkipLLM made static, arXiv:2404.03865",
        _SHARED,
        ("calibration",),
        version=2,
    ),
    "lim": Method(
        "compressor.score.block_influence:LayerInputModification",
        LimParams,
        "minus the cosine between a block's input and output",
        "arXiv:2406.17415 section 3",
        _SHARED,
        ("calibration",),
    ),
    "zd": Method(
        "compressor.score.zd:ZScoreDistribution",
        ZdParams,
        "minus the share of a block's weights more than one deviation above their mean",
        "arXiv:2406.17415 section 3",
        "weights only",
    ),
    "dlp": Method(
        "compressor.score.outliers:Dlp",
        DlpParams,
        "minus the median of weight times input norm over a block's linears",
        "arXiv:2505.23807",
        _SHARED,
        ("calibration",),
    ),
    "owl": Method(
        "compressor.score.outliers:Owl",
        OwlParams,
        "share of a block's weight times input norm far above their mean",
        "arXiv:2310.05175 section 3",
        _SHARED,
        ("calibration",),
    ),
    "activity": Method(
        "compressor.score.activity:Activity",
        ActivityParams,
        "share of tokens whose residual stream a block lengthens as earlier blocks do",
        "Void in Language Models, made static, arXiv:2505.14467",
        _SHARED,
        ("calibration",),
    ),
    "attention_rank": Method(
        "compressor.score.attention_rank:AttentionRank",
        AttentionRankParams,
        "mean numerical rank of the attention maps",
        "gamma-MoD, arXiv:2410.13859",
        "1 forward, shared; attention again on max_windows x max_tokens",
        ("calibration",),
        version=2,
    ),
    "residual": Method(
        "compressor.score.residual:Residual",
        ResidualParams,
        "norm, kurtosis and relative change of the residual stream by depth; no saliency",
        "arXiv:2506.12044",
        _SHARED,
        ("calibration",),
    ),
}
