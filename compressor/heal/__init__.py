"""Heal: recover by training what pruning lost, then merge it into the dense weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compressor.errors import did_you_mean
from compressor.heal.presets import PRESETS
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
    max_seconds: float | None = Field(
        None, gt=0, description="stop after so long; the result then depends on the machine"
    )
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of the windows held out, at most 64; 0 for none"
    )
    evaluate_every: int = Field(100, gt=0, description="steps between held-out losses")
    patience: int = Field(0, ge=0, description="stop after so many without a lower one; 0: never")
    divergence_window: int = Field(
        50, ge=0, description="give up when the loss rises for so many steps; 0: never"
    )
    skip_below: float = Field(
        0, ge=0, description="no backward below this share of the running loss; 0: never"
    )
    reset_documents: bool = Field(
        False, description="positions and attention begin anew behind every end-of-text token"
    )
    report_to: str | None = Field(
        None, exclude=True, description="such as tensorboard; its files go where that says"
    )
    fsdp: str | None = Field(
        None, exclude=True, description="as the Trainer's, such as 'full_shard auto_wrap'"
    )


class LoraParams(TrainingParams):
    """Parameters of LoRA; the defaults are the healing recipe of arXiv:2403.17887 appendix A.1.

    A preset is resolved into the other parameters and not one itself, so a run that spells
    them out is the same run.
    """

    preset: str | None = Field(
        None, exclude=True, description=f"published settings: {', '.join(PRESETS)}"
    )
    rank: int = Field(64, gt=0, description="rank of the adapters")
    alpha: float | None = Field(None, description="scale numerator; the rank when not given")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the adapters")
    targets: Literal["ffn", "all"] = Field("ffn", description="linears that get an adapter")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        if name is None:
            return given
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}{did_you_mean(str(name), PRESETS)}")
        return {**PRESETS[name], **given}


class QloraParams(LoraParams):
    """Parameters of QLoRA: LoRA over a base held in 4-bit NF4 with double quantization."""


class LisaParams(TrainingParams):
    """Parameters of LISA; the defaults are those of arXiv:2403.17919."""

    learning_rate: float = Field(2e-5, gt=0, description="peak, after warm-up; cosine to zero")
    blocks: int = Field(2, gt=0, description="how many blocks train")
    every: int = Field(20, gt=0, description="steps for which they do")


class LastBlocksParams(TrainingParams):
    """Parameters of tuning a few blocks in full."""

    learning_rate: float = Field(2e-5, gt=0, description="peak, after warm-up; cosine to zero")
    blocks: int = Field(3, gt=0, description="how many blocks train")
    around_cut: bool = Field(False, description="on either side of what was removed")
    head: bool = Field(True, description="the final norm and the head train too")

    @property
    def needs(self) -> tuple[str, ...]:
        """The model before pruning, where the cut is looked for."""
        return ("unpruned",) if self.around_cut else ()


class TeacherParams(Params):
    """What is kept of the parent's outputs; nothing else but parent and text decides the files."""

    teacher_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="what the parent's outputs are stored in"
    )
    top_k: int | None = Field(
        None, gt=0, description="likeliest tokens to tell apart, the rest as one; all when null"
    )
    hidden: Annotated[tuple[int, ...], AfterValidator(lambda blocks: tuple(sorted({*blocks})))] = (
        Field((), description="the parent's blocks whose outputs are matched too")
    )


class DistillParams(LoraParams, TeacherParams):
    """Parameters of distillation; the defaults are the loss of arXiv:2408.11796."""

    train: Literal["lora", "last_blocks", "all"] = Field(
        "lora", description="adapters, the last blocks in full, or all of them; with norm and head"
    )
    blocks: int = Field(3, gt=0, description="how many are the last")
    tau: float = Field(1.0, gt=0, description="temperature of both distributions")
    ce_weight: float = Field(0.0, ge=0, lt=1, description="share of the next-token loss")
    hidden_weight: float | None = Field(
        None, gt=0, description="of the hidden states' loss; null makes it as large as the logits'"
    )
    filters: Literal["identity", "linear"] = Field(
        "identity", description="map the student's states by a matrix that is dropped at the end"
    )
    kept: tuple[int, ...] | None = Field(
        None, description="the parent's index of every block, where it is not recognised"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.top_k and self.tau != 1:
            raise ValueError("top_k keeps the mass of the rest for tau 1 only; leave one out")
        if self.reset_documents:
            raise ValueError("reset_documents: the parent has read the windows as a whole")
        return self


METHODS = {
    "qlora": Method(
        "compressor.heal.lora:heal",
        QloraParams,
        "low-rank adapters over a 4-bit NF4 base, merged into the dense weights",
        "arXiv:2403.17887 appendix A.1; arXiv:2305.14314",
        "about 3 forwards per window and pass",
        ("healing",),
        version=3,
    ),
    "lora": Method(
        "compressor.heal.lora:heal",
        LoraParams,
        "low-rank adapters over the dense base, merged into it",
        "arXiv:2106.09685 section 4",
        "about 3 forwards per window and pass",
        ("healing",),
        version=2,
    ),
    "lisa": Method(
        "compressor.heal.lisa:heal",
        LisaParams,
        "full updates of a few random blocks at a time, and of embeddings, norm and head",
        "arXiv:2403.17919 algorithm 1",
        "2 to 3 forwards per window and pass",
        ("healing",),
    ),
    "last_blocks": Method(
        "compressor.heal.last_blocks:heal",
        LastBlocksParams,
        "full updates of the last blocks, or those around the cut, and of norm and head",
        "arXiv:2411.15558 section 4",
        "1 to 3 forwards per window and pass",
        ("healing",),
    ),
    "distill": Method(
        "compressor.heal.distill:heal",
        DistillParams,
        "adapters or weights trained to predict what the model before pruning does",
        "arXiv:2408.11796 section 2 (logits), arXiv:2407.14679 section 3 (hidden states)",
        "1 forward of the parent, once; about 3 forwards per window and pass",
        ("healing", "teacher"),
    ),
}

TEACHER = Method(
    "compressor.teacher:cache",
    TeacherParams,
    "the parent's outputs over the healing windows, on disk",
    "arXiv:2408.11796 section 2",
    "1 forward of the parent",
    ("healing",),
    version=2,
)
"""How the role `teacher` is made; a stage of its own, so that all students share its files."""
