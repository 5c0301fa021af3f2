"""Select: which parts go. Pure functions of scores, without torch, and searches on true loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from compressor.methods import Method, Params
from compressor.select.protect import Part


def _listed(value: Any) -> Any:
    """[0, -1] from `0,-1`, as typed on a command line."""
    if isinstance(value, int):
        return [value]
    return value.split(",") if isinstance(value, str) else value


Indices = Annotated[tuple[int, ...], BeforeValidator(_listed)]

_N = "how many blocks (or sublayers, where those are chosen) to remove"
_PROTECT = "blocks to keep whole; negative counts from the end"
_PART = "what n counts; sublayers is attention and feed-forward in one list"
_SCORE = "the score to go by"
_START = "lowest (by score), contiguous, or a list; of sublayers, feed-forwards count from L on"
_MASKS = "masks to try at most"


class ContiguousParams(Params):
    """Parameters of the contiguous selection."""

    n: int = Field(ge=0, description=_N)
    score: str = Field("angular_distance", description=_SCORE)
    protect: Indices = Field((-1,), description=_PROTECT)


class SimpleParams(Params):
    """Parameters of the simple heuristic."""

    n: int = Field(ge=0, description=_N)


class LowestParams(Params):
    """Parameters of the lowest-n selection."""

    n: int = Field(ge=0, description=_N)
    score: str = Field("block_influence", description=_SCORE)
    part: Literal["block", "attention", "ffn"] = Field("block", description=_PART)
    protect: Indices = Field((), description=_PROTECT)


class JointParams(Params):
    """Parameters of the joint drop of attention and feed-forward."""

    n: int = Field(ge=0, description=_N)
    score: str = Field("sublayer_cosine", description=_SCORE)
    protect: Indices = Field((), description=_PROTECT)


class EvenParams(Params):
    """Parameters of the even spacing: one of the two."""

    n: int | None = Field(None, ge=0, description=_N)
    speedup: float | None = Field(None, ge=1, description="blocks over kept blocks to aim for")


class FixedParams(Params):
    """Parameters of an explicit list."""

    num_blocks: int | None = Field(None, gt=0, description="blocks of the model the list is for")
    blocks: Indices = Field((), description="the blocks to remove")
    attention: Indices = Field((), description="the blocks to remove the attention of")
    ffn: Indices = Field((), description="the blocks to remove the feed-forward of")
    reuse_attention: dict[int, int] = Field(
        {}, description="blocks whose attention runs with another's weights, and whose: {3: 2}"
    )
    reuse_ffn: dict[int, int] = Field({}, description="the same of feed-forwards")


class SlebParams(Params):
    """Parameters of the greedy search."""

    n: int = Field(ge=0, description=_N)
    part: Part = Field("block", description=_PART)
    protect: Indices = Field((0, -1), description=_PROTECT)


class ClaspParams(Params):
    """Parameters of the dynamic programming."""

    n: int = Field(ge=0, description=_N)
    protect: Indices = Field((), description=_PROTECT)


class SwapParams(Params):
    """Parameters of the local search."""

    n: int = Field(ge=0, description=_N)
    part: Part = Field("block", description=_PART)
    start: Literal["lowest", "contiguous"] | Indices = Field("lowest", description=_START)
    score: str = Field("block_influence", description=_SCORE)
    protect: Indices = Field((), description=_PROTECT)
    max_masks: int = Field(300, gt=0, description=_MASKS)
    seed: int = Field(0, description="of the order in which parts are given back")


class EvolutionParams(SwapParams):
    """Parameters of the population search."""

    population: int = Field(8, gt=0, description="masks that survive, and mutants, a generation")
    seed: int = Field(0, description="of the mutations")


class SkrrParams(Params):
    """Parameters of skip and re-use."""

    n: int = Field(ge=0, description=_N)
    beam: int = Field(3, gt=0, description="masks that go on after each round")
    reuse: bool = Field(False, description="let neighbours stand in for skipped sublayers")
    protect: Indices = Field((), description=_PROTECT)


_TEXT = ("calibration",)
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
        "the n blocks, attentions or feed-forwards with the lowest score, wherever they are",
        "arXiv:2403.03853 section 3.2",
        "none",
    ),
    "joint": Method(
        "compressor.select.lowest:joint",
        JointParams,
        "the n lowest of all attentions and feed-forwards together",
        "LLM-Drop, arXiv:2406.15786 section 3.3",
        "none",
    ),
    "even": Method(
        "compressor.select.even:even",
        EvenParams,
        "what lies between blocks kept at even distances, for a target speed-up",
        "Unified Layer Skipping, arXiv:2404.06954 section 3",
        "none; needs no scores",
    ),
    "fixed": Method(
        "compressor.select.lowest:fixed",
        FixedParams,
        "an explicit list",
        "you",
        "none; needs no scores",
    ),
    "sleb": Method(
        "compressor.select.sleb:sleb",
        SlebParams,
        "one part after the other, each time the one whose removal leaves the least loss",
        "SLEB, arXiv:2402.09025 algorithm 1",
        "about n (L - n / 2) / 2 forwards",
        _TEXT,
    ),
    "clasp": Method(
        "compressor.select.clasp:clasp",
        ClaspParams,
        "the n blocks on the best path through hidden states, by dynamic programming",
        "CLaSp made static, arXiv:2505.24196 section 3",
        "at most n + 1 forwards, blocks loaded once",
        _TEXT,
    ),
    "swap": Method(
        "compressor.select.swap:swap",
        SwapParams,
        "swaps from any start for as long as they lower the loss",
        "local search; as in SWIFT, arXiv:2410.06916 section 4, but on loss",
        "about max_masks / 2 forwards",
        _TEXT,
    ),
    "evolution": Method(
        "compressor.select.evolution:evolution",
        EvolutionParams,
        "a population of masks, mutated by swaps, the least loss surviving",
        "EvoPress, arXiv:2410.14649 section 3",
        "about max_masks / 2 forwards",
        _TEXT,
    ),
    "skrr": Method(
        "compressor.select.skrr:skrr",
        SkrrParams,
        "beam search over sublayers by distance of final states; neighbours may stand in",
        "Skrr, arXiv:2502.08690 algorithms 1 and 2",
        "about beam n (2L - n / 2) / 2 forwards",
        _TEXT,
    ),
}
