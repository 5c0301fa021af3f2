"""Quantize: fewest bits for least loss, in a file that stock runtimes load."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods import Method, Params

Bits = Literal[2, 3, 4, 5, 6, 8]


class RtnParams(Params):
    """Parameters of round-to-nearest."""

    bits: Bits = Field(4, description="bits per weight")
    group_size: int = Field(128, ge=0, description="inputs that share a scale; 0: whole rows")
    symmetric: bool = Field(True, description="no zero points, which every reader loads")
    search: bool = Field(True, description="shrink each scale to the least squared error")


class GptqParams(RtnParams):
    """Parameters of GPTQ."""

    damp: float = Field(
        0.01, gt=0, le=1, description="ridge, as a share of the gram's mean diagonal"
    )
    act_order: bool = Field(True, description="columns with the largest inputs first")


METHODS = {
    "gptq": Method(
        "compressor.quantize.gptq:gptq",
        GptqParams,
        "column by column, each error folded into the columns to come",
        "arXiv:2210.17323 section 3",
        "about 2 forwards and one factorisation per group of linears",
        ("calibration",),
    ),
    "rtn": Method(
        "compressor.quantize.rtn:rtn",
        RtnParams,
        "round to nearest, group by group",
        "arXiv:2210.17323 section 4 (baseline)",
        "weights only",
    ),
}
