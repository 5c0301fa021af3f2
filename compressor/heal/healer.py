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
"""`input_ids` (B, T) and `index` (B,), the rows of `Healing.tokens` that they are.

With `reset_documents` also `position_ids` (B, T), from 0 in every document, and `labels`
(B, T), -100 for the first token of each.
"""

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
        parent: the checkpoint that `source` was cut from, for what looks for the cut.
    """

    source: Path
    out: Path
    work: Path
    tokens: Tensor
    params: TrainingParams
    seed: int
    device: str
    teacher: Path | None = None
    parent: Path | None = None

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
        loss_bytes: what a `loss` of its own takes of memory for a micro batch, at its peak,
            beside what autograd keeps of the model up to the logits.
        callbacks: of the method, told of every step.
        beside: what trains along for the loss alone and is dropped at the end.
        together: how many weights train at a time, where which ones do changes from step to
            step; None where those that require a gradient do throughout.
    """

    model: nn.Module
    write: Callable[[Weights, Path], None]
    loss: Loss | None = None
    loss_bytes: int = 0
    callbacks: tuple[TrainerCallback, ...] = ()
    beside: nn.Module | None = None
    together: int | None = None


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over windows and positions of -log p(token | those before it), in nats."""
    tokens = batch["input_ids"]
    inputs = {"labels": tokens, **{k: v for k, v in batch.items() if k != "index"}}
    loss: Tensor = model(**inputs, use_cache=False).loss
    return loss


def document_positions(tokens: Tensor, end: int) -> Tensor:
    """Position (T,) of each token in its document, the tokens (T,) up to and with an `end`."""
    places = torch.arange(len(tokens))
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[1:] = tokens[:-1] == end
    return places - places.where(first, torch.zeros(())).cummax(0).values.long()
