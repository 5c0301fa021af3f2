"""Heal: recover by training what pruning lost, then merge it into the dense weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods import Method, Params


class TrainingParams(Params):
    """What every method that trains has in common."""

    learning_rate: float = Field(3e-4, gt=0, description="peak, after warm-up; cosine to zero")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up")
    steps: int = Field(5000, gt=0, description="optimizer steps")
    batch_size: int = Field(16, gt=0, description="windows per optimizer step")
    micro_batch_size: int = Field(1, gt=0, description="windows that are in memory together")
    save_every: int = Field(50, gt=0, description="steps between resumable checkpoints")
    checkpointing: bool = Field(False, description="recompute activations to save memory")


class LoraParams(TrainingParams):
    """Parameters of LoRA; the defaults are the healing recipe of arXiv:2403.17887 appendix A.1."""

    rank: int = Field(64, gt=0, description="rank of the adapters")
    alpha: float | None = Field(None, description="scale numerator; the rank when not given")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the adapters")
    targets: Literal["ffn", "all"] = Field("ffn", description="linears that get an adapter")


class QloraParams(LoraParams):
    """Parameters of QLoRA: LoRA over a base held in 4-bit NF4 with double quantization."""


METHODS = {
    "qlora": Method(
        "compressor.heal.lora:heal",
        QloraParams,
        "low-rank adapters over a 4-bit NF4 base, merged into the dense weights",
        "arXiv:2403.17887 appendix A.1; arXiv:2305.14314",
        "about 3 forwards per window and pass",
        ("healing",),
    ),
    "lora": Method(
        "compressor.heal.lora:heal",
        LoraParams,
        "low-rank adapters over the dense base, merged into it",
        "arXiv:2106.09685 section 4",
        "about 3 forwards per window and pass",
        ("healing",),
    ),
}
