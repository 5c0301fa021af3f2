"""Quantize: fewest bits for least loss, in a file that stock runtimes load."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from compressor.methods import Method, Params
from compressor.records import BitPlan, Bits

Kind = Literal["qkv", "o", "gate_up", "down"]
"""What a linear does in its block: reads or ends the attention, reads or ends the feed-forward."""

Forwards = Literal["auto", "float32", "bfloat16"]

KINDS: tuple[Kind, ...] = get_args(Kind)
Alpha = Annotated[float, Field(ge=0, le=1)]
Ridge = Annotated[float, Field(ge=0)]
PROPAGATION: dict[str, tuple[dict[Kind, float], float]] = {
    "tuned": (dict.fromkeys(KINDS, 1.0), 1.0),
    "official": ({"qkv": 0.5, "o": 0.5, "gate_up": 0.5, "down": 0.0}, 1.0),
    "onecompression": ({"qkv": 0.5, "o": 0.5, "gate_up": 0.5, "down": 0.0}, 0.01),
    "none": (dict.fromkeys(KINDS, 0.0), 0.0),
}
"""Sets of alpha per kind and ridge: ours, the paper's command line, its later library, off.

Ours also sets `catch_up` and `fade`.
"""


class GridParams(Params):
    """Parameters of the grid."""

    bits: Bits = Field(4, description="bits per weight")
    group_size: int = Field(128, ge=0, description="inputs that share a scale; 0: whole rows")
    symmetric: bool = Field(True, description="no zero points, which every reader loads")
    search: bool = Field(True, description="place each grid where its error is least")
    scheme: BitPlan | None = Field(
        None, description="widths of some linears (on the command line a file)"
    )
    format: Literal["compressed-tensors", "gptq"] = Field(
        "compressed-tensors", description="what the file is written in"
    )


class RtnParams(GridParams):
    """Parameters of round-to-nearest."""


class PropagatingParams(GridParams):
    """Parameters of methods that correct each linear for the error of its inputs."""

    propagation: Literal["tuned", "official", "onecompression", "none"] = Field(
        "tuned", description="set of alpha and ridge for quantization error propagation"
    )
    alpha: Alpha | dict[Kind, Alpha] | None = Field(
        None, description="share of the correction, for all linears or by kind, over the set's"
    )
    ridge: Ridge | dict[Kind, Ridge] | None = Field(
        None, description="ridge of the correction over the gram's mean diagonal, over the set's"
    )
    catch_up: Alpha | None = Field(
        None, description="share of what the residual stream lost that o and down make up for"
    )
    fade: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None,
        description="tokens count ||h||^-fade in o and down, h being the residual stream they add "
        "to; 1 in the tuned set, else 0",
    )

    forwards: Forwards = Field(
        "auto",
        description="what activations are multiplied in; auto: bfloat16 up to 4 bits on a "
        "processor with instructions for it",
    )
    scaling: Literal["none", "awq"] = Field(
        "none",
        description="scales of inputs, folded into what makes them, by the mean of their size",
    )

    teacher: Literal["checkpoint", "parent", "original"] = Field(
        "checkpoint",
        description="whose activations are aimed at: the checkpoint's own, or those of the model "
        "before the last prune or before all of them",
    )

    def catching(self) -> tuple[float, float]:
        """(`catch_up`, `fade`); ours both 1, the published none."""
        ours = 1.0 if self.propagation == "tuned" else 0.0
        return (
            ours if self.catch_up is None else self.catch_up,
            ours if self.fade is None else self.fade,
        )

    @model_validator(mode="after")
    def _teachable(self) -> Self:
        if self.needs and not any(alpha for alpha, _ in self.strengths().values()):
            raise ValueError(f"teacher: {self.teacher} is of no use when every alpha is 0")
        if self.needs and self.scaling != "none":
            raise ValueError(
                f"scaling: {self.scaling} changes what linears read, which teacher: {self.teacher} "
                "still reads unscaled; set one of them to its default"
            )
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """The teacher's role, where it is another model."""
        return () if self.teacher == "checkpoint" else (self.teacher,)

    def strengths(self) -> dict[Kind, tuple[float, float]]:
        """(alpha, ridge) of each kind."""
        alphas, ridge = PROPAGATION[self.propagation]
        ridges: dict[Kind, float] = dict.fromkeys(KINDS, ridge)
        alphas = alphas | _by_kind(self.alpha)
        ridges |= _by_kind(self.ridge)
        return {kind: (alphas[kind], ridges[kind]) for kind in KINDS}


class GptqParams(PropagatingParams):
    """Parameters of GPTQ."""

    damp: float = Field(
        0.3, gt=0, le=1, description="ridge, as a share of the gram's mean diagonal"
    )
    act_order: bool = Field(True, description="columns with the largest inputs first")
    polish: int = Field(
        2, ge=0, description="rounds of coordinate descent on scales and integers after the sweep"
    )


def _by_kind(value: float | dict[Kind, float] | None) -> dict[Kind, float]:
    if value is None:
        return {}
    return value if isinstance(value, dict) else dict.fromkeys(KINDS, value)


METHODS = {
    "gptq": Method(
        "compressor.quantize.gptq:gptq",
        GptqParams,
        "column by column, each error folded into the columns to come, on corrected weights",
        "arXiv:2210.17323 section 3, arXiv:2504.09629 section 5",
        "2 forwards, 3 products of the inputs and 2 factorisations per group of linears",
        ("calibration",),
        5,
    ),
    "rtn": Method(
        "compressor.quantize.rtn:rtn",
        RtnParams,
        "round to nearest, group by group",
        "arXiv:2210.17323 section 4 (baseline)",
        "weights only",
        (),
        4,
    ),
    "qep_rtn": Method(
        "compressor.quantize.rtn:rtn",
        PropagatingParams,
        "round to nearest after correcting for the error of the inputs",
        "arXiv:2504.09629 section 5",
        "2 forwards, 3 products of the inputs and a factorisation per group of linears",
        ("calibration",),
        4,
    ),
}
