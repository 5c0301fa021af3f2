"""Training on the transformers Trainer, resumable to the bit; what every method shares."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from compressor import progress
from compressor.errors import HealingError
from compressor.heal import TrainingParams, history
from compressor.heal.arguments import arguments, check, document_end, processes
from compressor.heal.healer import Healer, Healing, Weights, next_token_loss
from compressor.heal.memory import explain, forecast
from compressor.heal.trainer import HealingTrainer, Windows
from compressor.heal.write import rewrite

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
_MOST_HELD_OUT = 64


def train(healing: Healing, method: Callable[[Healing], Healer]) -> dict[str, Any]:
    """Minimise the loss of what `method` builds over the windows, and write the result.

    The last `validation` of the windows are held out. Their loss is measured before the first
    step, every `evaluate_every` steps and after the last, and the weights of the lowest are
    the result: those of `source`, bit by bit, when no step has a lower loss than they.

    Writes the healed checkpoint and `metrics.jsonl` into `healing.out`. Optimizer, schedule,
    random state and data position are saved in `healing.work`; when it holds a whole
    checkpoint training goes on from there and ends in the same bits (same thread count).
    Raises `HealingError` when the loss or its gradient is no longer finite, or the loss keeps
    rising; the best weights are then in `healing.work`.
    """
    held = _held_out(healing.params, len(healing.tokens))
    check(healing, len(healing.tokens) - held)
    torch.manual_seed(healing.seed)
    healer = method(healing)
    if healing.params.checkpointing:
        model: Any = healer.model
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = forecast(healing, healer)
    label = f"heal (up to {expected['total'] / 2**30:.2f} GiB)"
    with progress.task(label, healing.params.steps) as bar:
        trainer = _trainer(healing, healer, held, bar)
        _run(trainer, healer, healing)
    weights = trainer.weights()
    if trainer.is_world_process_zero():
        healing.out.mkdir(parents=True, exist_ok=True)
        _save_metrics(trainer.rows, healing.out / METRICS)
        _write(trainer, healer, healing, weights)
    return _report(trainer, healing.tokens[held:].numel()) | {"forecast": expected}


def _trainer(healing: Healing, healer: Healer, held: int, bar: progress.Task) -> HealingTrainer:
    params, tokens = healing.params, healing.tokens
    end = document_end(healing, healer.model) if params.reset_documents else None
    split = len(tokens) - held
    trainer = HealingTrainer(
        model=healer.model,
        args=arguments(healing, changing=healer.together is not None),
        train_dataset=Windows(tokens, range(split), end),
        eval_dataset=Windows(tokens, range(split, len(tokens)), end) if held else None,
        callbacks=list(healer.callbacks),
        loss=healer.loss or next_token_loss,
        beside=healer.beside,
        settings=params,
        bar=bar,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(trainer: HealingTrainer, healer: Healer, healing: Healing) -> None:
    """Train from the last whole checkpoint to the end; words for what can go wrong."""
    try:
        with trainer.args.main_process_first(local=False):
            checkpoint = _whole_checkpoint(healing.work)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.judge()
    except HealingError as error:
        kept = _kept(trainer, healer, healing) if trainer.is_world_process_zero() else ""
        trainer.accelerator.wait_for_everyone()
        raise HealingError(f"{error}{kept}") from error
    except (RuntimeError, MemoryError) as error:
        raise explain(error, healing.params, trainer.state.global_step) or error from error


def _held_out(params: TrainingParams, windows: int) -> int:
    """How many windows are held out."""
    if not params.validation:
        return 0
    if windows == 1:
        raise HealingError("one window cannot be split; give more, or heal.validation: 0")
    return min(max(1, round(params.validation * windows)), _MOST_HELD_OUT, windows - 1)


def _write(trainer: HealingTrainer, healer: Healer, healing: Healing, last: Weights) -> None:
    """Write the weights of the best evaluation; without any, the last."""
    evaluated = history.held_out(trainer.rows)
    step = history.best(trainer.rows)[0] if evaluated else trainer.state.global_step
    if step == trainer.state.global_step:
        healer.write(last, healing.out)
    elif step:
        healer.write(trainer.best_weights(), healing.out)
    else:
        log.warning(
            "heal: no evaluation found a lower held-out loss than that before healing, %.4f; "
            "the result is the unhealed checkpoint. Lower heal.learning_rate, or give more text",
            evaluated[0][1],
        )
        rewrite(healing.source, healing.out, {})


def _kept(trainer: HealingTrainer, healer: Healer, healing: Healing) -> str:
    """Where the best weights of a lost training are, having been put there."""
    evaluated = history.held_out(trainer.rows)
    if not evaluated:
        return ""
    step, loss = history.best(trainer.rows)
    if not step:
        return "; nothing so far was better than the unhealed checkpoint"
    folder = healing.work / f"best-{step}"
    healer.write(trainer.best_weights(), folder)
    return f"; the best so far, of step {step} (held-out loss {loss:.4f}), is in {folder}"


def _report(trainer: HealingTrainer, tokens: int) -> dict[str, Any]:
    losses = [row["loss"] for row in trainer.rows if "loss" in row]
    seen = trainer.state.num_input_tokens_seen
    report: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "stopped": trainer.stopped,
        "tokens": seen,
        "passes": seen / tokens,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trainable": sum(weight.numel() for weight in trainer.weights().values()),
    }
    if skipped := sum(row.get("skipped", 0) for row in trainer.rows):
        report["skipped"] = skipped
    if evaluated := history.held_out(trainer.rows):
        step, loss = history.best(trainer.rows)
        report["held_out"] = {"before": evaluated[0][1], "after": loss, "step": step}
    return report


def _whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint in `work` that was written to its end, or None.

    Of several processes each writes its random state, the first trainer_state.json after its
    own; a folder that lacks any of them was cut off.
    """
    while work.is_dir() and (newest := get_last_checkpoint(str(work))):
        if _whole(Path(newest)):
            return str(newest)
        shutil.rmtree(newest)
    return None


def _whole(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return len(list(folder.glob("rng_state*.pth"))) == processes()


def _save_metrics(rows: list[dict[str, Any]], path: Path) -> None:
    lines = [json.dumps(row, sort_keys=True) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
