"""Select: which blocks go. Pure functions of scores; no torch."""

from __future__ import annotations

from pydantic import Field

from compressor.methods import Method, Params

_N = "how many blocks to remove"
_PROTECT = "blocks to keep; negative counts from the end"


class ContiguousParams(Params):
    """Parameters of the contiguous selection."""

    n: int = Field(ge=0, description=_N)
    protect: tuple[int, ...] = Field((-1,), description=_PROTECT)


class SimpleParams(Params):
    """Parameters of the simple heuristic."""

    n: int = Field(ge=0, description=_N)


class LowestParams(Params):
    """Parameters of the lowest-n selection."""

    n: int = Field(ge=0, description=_N)
    score: str = Field("block_influence", description="the score to go by")
    protect: tuple[int, ...] = Field((), description=_PROTECT)


class FixedParams(Params):
    """Parameters of an explicit list."""

    blocks: tuple[int, ...] = Field((), description="the blocks to remove")
    attention: tuple[int, ...] = Field((), description="the blocks to remove the attention of")
    ffn: tuple[int, ...] = Field((), description="the blocks to remove the feed-forward of")


_SOURCE = "arXiv:2403.17887 section 3.2"
METHODS = {
    "contiguous": Method(
        "compressor.select.contiguous:contiguous",
        ContiguousParams,
        "the n neighbouring blocks with the least angular distance across them",
        _SOURCE,
        "none",
    ),
    "simple": Method(
        "compressor.select.contiguous:simple",
        SimpleParams,
        "the deepest n blocks but the very last",
        _SOURCE,
        "none; needs no scores",
    ),
    "lowest": Method(
        "compressor.select.lowest:lowest",
        LowestParams,
        "the n blocks with the lowest score, wherever they are",
        "arXiv:2403.03853 section 3.2",
        "none",
    ),
    "fixed": Method(
        "compressor.select.lowest:fixed",
        FixedParams,
        "an explicit list",
        "you",
        "none; needs no scores",
    ),
}
