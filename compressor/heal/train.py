"""Training on the transformers Trainer, resumable to the bit; what every method shares."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from compressor import progress
from compressor.checkpoint import Checkpoint
from compressor.errors import HealingError
from compressor.heal.healer import Healer, Healing, next_token_loss
from compressor.heal.trainer import HealingTrainer, Windows

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
_MANY_PASSES = 8


def train(healing: Healing, method: Callable[[Healing], Healer]) -> dict[str, Any]:
    """Minimise the loss of what `method` builds over the windows, and write the result.

    Writes the healed checkpoint and `metrics.jsonl` into `healing.out`. Optimizer, schedule,
    random state and data position are saved in `healing.work`; when it holds a whole
    checkpoint training goes on from there and ends in the same bits (same thread count).
    Raises `HealingError` when the loss or its gradient is no longer finite.
    """
    _check(healing)
    params, tokens = healing.params, healing.tokens
    torch.manual_seed(healing.seed)
    healer = method(healing)
    model: Any = healer.model
    if params.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with progress.task("heal", params.steps) as bar:
        trainer = HealingTrainer(
            model=model,
            args=_arguments(healing),
            train_dataset=Windows(tokens),
            callbacks=list(healer.callbacks),
            loss=healer.loss or next_token_loss,
            beside=healer.beside,
            bar=bar,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_whole_checkpoint(healing.work))
    _save_metrics(trainer.state, healing.out / METRICS)
    healer.write(trainer.weights(), healing.out)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seen = trainer.state.num_input_tokens_seen
    return {
        "steps": trainer.state.global_step,
        "tokens": seen,
        "passes": seen / tokens.numel(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trainable": sum(weight.numel() for weight in trainer.weights().values()),
    }


def _check(healing: Healing) -> None:
    source, params, tokens = healing.source, healing.params, healing.tokens
    if Checkpoint(source).quantized:
        raise HealingError(f"{source}: already quantized; heal the dense checkpoint, then quantize")
    if params.batch_size % params.micro_batch_size:
        raise HealingError(
            f"batch_size {params.batch_size} is not a multiple of micro_batch_size "
            f"{params.micro_batch_size}"
        )
    passes = params.steps * params.batch_size / len(tokens)
    if passes > _MANY_PASSES:
        log.warning(
            "heal: %d steps of %d windows go %.0f times over %d windows, which learns them by "
            "heart: give more text.healing.windows, or fewer heal.steps",
            params.steps, params.batch_size, passes, len(tokens),
        )  # fmt: skip


def _arguments(healing: Healing) -> TrainingArguments:
    params = healing.params
    return TrainingArguments(
        output_dir=str(healing.work),
        max_steps=params.steps,
        per_device_train_batch_size=params.micro_batch_size,
        gradient_accumulation_steps=params.batch_size // params.micro_batch_size,
        learning_rate=params.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=params.warmup_steps,
        save_steps=params.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to=[],
        disable_tqdm=True,
        seed=healing.seed,
        data_seed=healing.seed,
        use_cpu=healing.device == "cpu",
        bf16=healing.dtype == torch.bfloat16,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint in `work` that was written to its end, or None.

    The Trainer writes trainer_state.json last; a folder without a readable one was cut off.
    """
    while work.is_dir() and (newest := get_last_checkpoint(str(work))):
        try:
            json.loads((Path(newest) / "trainer_state.json").read_text())
            return str(newest)
        except (OSError, ValueError):
            shutil.rmtree(newest)
    return None


def _save_metrics(state: TrainerState, path: Path) -> None:
    lines = [json.dumps(row, sort_keys=True) for row in state.log_history]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
