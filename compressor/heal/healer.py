"""What the trainer is given: the task of one healing, and what a method makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from compressor.heal import TrainingParams

Batch = dict[str, Tensor]
"""`input_ids` (B, T) and `index` (B,), the rows of `Healing.tokens` that they are."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of a micro batch, a scalar that the gradient flows from."""

Weights = dict[str, Tensor]
"""Trained tensors by their name in the model that trains."""


@dataclass(frozen=True)
class Healing:
    """One healing, whatever the method.

    Attributes:
        source: the checkpoint to heal.
        out: an empty folder for the result.
        work: a folder that survives a crash, for resuming.
        tokens: (N, T) int64; every window is full.
        params: of the method.
        seed: of data order, dropout and schedules.
        device: `cpu` or `cuda`.
        teacher: the folder of a parent's outputs over `tokens`, for methods that need one.
    """

    source: Path
    out: Path
    work: Path
    tokens: Tensor
    params: TrainingParams
    seed: int
    device: str
    teacher: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What matrices are multiplied in: bfloat16 on a device that has it, else float32."""
        half = self.device != "cpu" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32


@dataclass(frozen=True)
class Healer:
    """What a method gives the trainer.

    Attributes:
        model: what trains; only parameters that require a gradient do.
        write: writes the checkpoint that these trained weights make into a folder.
        loss: what is minimised; next-token loss unless the method has its own.
        callbacks: of the method, told of every step.
        beside: what trains along for the loss alone and is dropped at the end.
        changing: whether the parameters that train change from step to step.
    """

    model: nn.Module
    write: Callable[[Weights, Path], None]
    loss: Loss | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    beside: nn.Module | None = None
    changing: bool = False


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over windows and positions of -log p(token | those before it), in nats."""
    tokens = batch["input_ids"]
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss
