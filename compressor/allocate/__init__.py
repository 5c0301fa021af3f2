"""Allocate: which linear gets how many bits, from what each width costs and a budget."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from compressor.methods import Method, Params
from compressor.records import Bits


def _listed(value: Any) -> Any:
    """[2, 4] from `2,4`, as typed on a command line."""
    if isinstance(value, int):
        return [value]
    return [int(part) for part in value.split(",")] if isinstance(value, str) else value


Widths = Annotated[tuple[Bits, ...], BeforeValidator(_listed), Field(min_length=1)]


BUDGET = frozenset({"average_bits", "max_bytes", "refine"})
"""Parameters that no cost depends on."""


class AllocateParams(Params):
    """The budget, one of `average_bits` and `max_bytes`, and what may be spent on."""

    average_bits: float | None = Field(
        None, gt=0, description="bits per weight to spend at most; codes only, without scales"
    )
    max_bytes: ByteSize | None = Field(
        None, description="size of the weight files at most, everything in them: 90MB, 85MiB"
    )
    widths: Widths = Field((2, 3, 4, 8), description="bits a linear may get")
    group_size: int = Field(128, ge=0, description="inputs that share a scale; 0: whole rows")
    symmetric: bool = Field(True, description="no zero points, which every reader loads")
    format: Literal["compressed-tensors", "gptq"] = Field(
        "compressed-tensors", description="what the file will be written in"
    )
    max_windows: int = Field(8, gt=0, description="windows that costs are measured on")
    refine: int = Field(
        0, ge=0, description="losses of the rounded model to measure for swaps after the rule"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.average_bits is None) == (self.max_bytes is None):
            raise ValueError("give either average_bits or max_bytes")
        return self


class FisherParams(AllocateParams):
    """Parameters of the Fisher-weighted error."""

    seed: int = Field(0, description="of the tokens drawn from the model's own predictions")
    skip: int = Field(
        1, ge=0, description="first tokens of a window, attention sinks, that do not count"
    )


class ImportanceParams(AllocateParams):
    """Parameters of scores times errors."""

    score: str = Field("lim", description="the score to go by: of linears, or else of blocks")


METHODS = {
    "fisher": Method(
        "compressor.allocate.fisher:fisher",
        FisherParams,
        "second-order rise in KL: output errors weighted by the Fisher information behind them",
        "GuidedQuant, arXiv:2505.07004 section 3.2; BRECQ, arXiv:2102.05426 section 3.2",
        "about 3 forwards and one quantization per width, on max_windows",
        ("calibration", "costs"),
        4,
    ),
    "importance": Method(
        "compressor.allocate.importance:importance",
        ImportanceParams,
        "a score of the block or linear times the relative error of its output",
        "LIM and ZD, arXiv:2406.17415 section 3; times sensitivity, Mix-QViT, arXiv:2501.06357",
        "a forward and one quantization per width, on max_windows",
        ("calibration", "costs", "scores"),
        4,
    ),
}
