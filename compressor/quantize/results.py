"""What quantizing a block came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from compressor.quantize.grid import QuantizedWeight


@dataclass
class BlockResult:
    """One quantized block.

    Attributes:
        weights: the integers of each linear by full name.
        report: per linear, `relative_error` ||(W - Q) X|| / ||W X|| (of its weights without
            text; W as corrected), `damp` of the quantizer, `ridge` of the correction and, where
            its inputs were scaled, `beta`.
        drift: ||h - h'|| / ||h|| of the residual stream after the block, original or teacher
            against compressed; None where the original's stream is not kept.
        dense: other tensors of the block that scaling changed, by full name.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    drift: float | None = None
    dense: dict[str, Tensor] = field(default_factory=dict)
