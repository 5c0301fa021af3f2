"""LoRA and QLoRA training on the transformers Trainer, resumable to the bit."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint

from compressor import progress
from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint, read_json, write_json
from compressor.decoder import skeleton
from compressor.errors import HealingError
from compressor.heal import LoraParams, QloraParams
from compressor.heal.merge import merge

log = logging.getLogger(__name__)
ADAPTER = "adapter"
METRICS = "metrics.jsonl"
_MANY_PASSES = 8


def heal(
    source: Path,
    out: Path,
    work: Path,
    tokens: Tensor,
    params: LoraParams,
    *,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Train adapters on windows (N, T) by next-token loss and merge them into `source`.

    Writes the merged checkpoint, `adapter/` and `metrics.jsonl` into `out`. Optimizer,
    schedule, random state and data position are saved in `work`; when it holds a whole
    checkpoint training goes on from there and ends in the same bits (same thread count).
    Raises `HealingError` when the loss or its gradient is no longer finite.
    """
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
    torch.manual_seed(seed)
    model = _adapted(source, params, device)
    with progress.task("heal", params.steps) as bar:
        trainer = _FullWindows(
            model=model,
            args=_arguments(params, work, seed, device),
            train_dataset=_Windows(tokens),
            callbacks=[_Report(bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_whole_checkpoint(work))
    _save_metrics(trainer.state, out / METRICS)
    _save_adapter(model, source, out / ADAPTER)
    merge(source, out / ADAPTER, out)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seen = trainer.state.num_input_tokens_seen
    return {
        "steps": params.steps,
        "tokens": seen,
        "passes": seen / tokens.numel(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _adapted(source: Path, params: LoraParams, device: str) -> PeftModel:
    """The model with fresh adapters; its base in NF4 for QLoRA."""
    half = device != "cpu"
    compute = torch.bfloat16 if half else torch.float32
    quantization = None
    if isinstance(params, QloraParams):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=compute, quantization_config=quantization, device_map={"": device}
    )
    model.config.use_cache = False
    if params.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.rank if params.alpha is None else params.alpha,
        lora_dropout=params.dropout,
        target_modules=target_names(Blocks(model), params.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def target_names(blocks: Blocks, targets: str) -> list[str]:
    """Full names of the linears that get an adapter."""
    of = blocks.ffn_linears if targets == "ffn" else blocks.linears
    return [name for index in range(len(blocks)) for name in of(index)]


def _arguments(params: LoraParams, work: Path, seed: int, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
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
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )


class _Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._tokens[index]
        return {"input_ids": row, "labels": row}


class _FullWindows(Trainer):
    """The Trainer without its console output: the callback reports."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep what is the same in every run: no wall-clock figures."""
        kept = {k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate")}
        if kept:
            self.state.log_history.append({**kept, "step": self.state.global_step})
            control: TrainerControl = self.control  # type: ignore[has-type]
            self.control = self.callback_handler.on_log(self.args, self.state, control, kept)


class _Report(TrainerCallback):
    """Moves the bar and stops a run whose loss or gradient is lost."""

    def __init__(self, bar: progress.Task) -> None:
        self._bar = bar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the bar where training resumes."""
        self._bar.advance(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """One optimizer step is done; it is not saved yet."""
        logs = rest["logs"]
        if "loss" not in logs:
            return
        for name, value in logs.items():
            if not math.isfinite(value):
                raise HealingError(
                    f"the {name} is {value} at step {state.global_step}; lower "
                    f"heal.learning_rate (now {args.learning_rate}) or raise heal.warmup_steps"
                )
        self._bar.advance(1, f"loss {logs['loss']:.3f}, {state.num_input_tokens_seen:,} tokens")


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


def _save_adapter(model: PeftModel, source: Path, folder: Path) -> None:
    """Save the adapter as one of `source`, with equal bytes for equal weights.

    peft writes a set and a local path; and bitsandbytes turned GPT-2's transposed weights
    upright, which those of `source` are not.
    """
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    config = read_json(folder / "adapter_config.json")
    linears = Blocks(skeleton(source)).linears(0).values()
    config |= {
        "target_modules": sorted(config["target_modules"]),
        "base_model_name_or_path": None,
        "fan_in_fan_out": any(isinstance(linear, Conv1D) for linear in linears),
    }
    write_json(folder / "adapter_config.json", config)


def _save_metrics(state: TrainerState, path: Path) -> None:
    lines = [json.dumps(row, sort_keys=True) for row in state.log_history]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
