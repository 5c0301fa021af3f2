"""From a healing to the Trainer's arguments, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from compressor.checkpoint import Checkpoint
from compressor.errors import HealingError, MissingDependency, NotApplicable
from compressor.families import POSITIONS_FROM_MASK, family_of
from compressor.heal.healer import Healing
from compressor.model import load_tokenizer

log = logging.getLogger(__name__)
_MANY_PASSES = 8


def check(healing: Healing, windows: int) -> None:
    """Raise `HealingError` for settings that cannot train on so many windows; warn of passes."""
    source, params = healing.source, healing.params
    if Checkpoint(source).quantized:
        raise HealingError(f"{source}: already quantized; heal the dense checkpoint, then quantize")
    if params.batch_size % (params.micro_batch_size * processes()):
        raise HealingError(
            f"batch_size {params.batch_size} is not a multiple of micro_batch_size "
            f"{params.micro_batch_size}" + f" times {processes()} processes" * (processes() > 1)
        )
    if params.skip_below and processes() > 1:
        raise HealingError("skip_below: processes that skip cannot wait for each other; use one")
    passes = params.steps * params.batch_size / windows
    if passes > _MANY_PASSES and not params.max_seconds:
        log.warning(
            "heal: %d steps of %d windows go %.0f times over %d windows, which learns them by "
            "heart: give more text.healing.windows, or fewer heal.steps",
            params.steps, params.batch_size, passes, windows,
        )  # fmt: skip


def arguments(healing: Healing, *, changing: bool) -> TrainingArguments:
    """The Trainer's arguments; `changing` says that other weights train in other steps."""
    params = healing.params
    return TrainingArguments(
        output_dir=str(healing.work),
        max_steps=params.steps,
        per_device_train_batch_size=params.micro_batch_size,
        per_device_eval_batch_size=params.micro_batch_size,
        eval_strategy="steps" if params.validation else "no",
        eval_steps=params.evaluate_every,
        eval_on_start=bool(params.validation),
        gradient_accumulation_steps=params.batch_size // params.micro_batch_size // processes(),
        learning_rate=params.learning_rate,
        save_steps=params.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to=_reporters(params.report_to),
        disable_tqdm=True,
        seed=healing.seed,
        data_seed=healing.seed,
        use_cpu=healing.device == "cpu",
        ddp_backend="gloo" if healing.device == "cpu" and processes() > 1 else None,
        ddp_find_unused_parameters=changing,
        fsdp=params.fsdp,
        bf16=healing.dtype == torch.bfloat16,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def document_end(healing: Healing, model: nn.Module) -> int:
    """The end-of-text token, for a model that can keep the documents of a window apart.

    Raises `NotApplicable` for one that takes no positions or counts them on a mask.
    """
    end = load_tokenizer(healing.source).eos_token_id
    family = family_of(model.config)
    takes = "position_ids" in inspect.signature(type(unwrapped(model)).forward).parameters
    if end is None or not takes or family in POSITIONS_FROM_MASK:
        raise NotApplicable(
            f"heal.reset_documents: {family} models take no positions, or their tokenizer has no "
            "end-of-text token; leave it out"
        )
    return int(end)


def unwrapped(model: Any) -> nn.Module:
    """The transformers model inside an adapter, or itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _reporters(name: str | None) -> list[str]:
    if name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise MissingDependency("tensorboard", "tensorboard", "heal.report_to: tensorboard")
    return [name] if name else []


def processes() -> int:
    """How many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))
