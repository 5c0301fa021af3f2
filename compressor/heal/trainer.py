"""The transformers Trainer for full windows: any loss, a log without a clock, no console."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl

from compressor import progress
from compressor.errors import HealingError
from compressor.heal.healer import Batch, Loss, Weights

_KEPT = ("loss", "grad_norm", "learning_rate")
_BESIDE = "beside"


class Windows(Dataset[Batch]):
    """Windows (N, T), each with its row."""

    def __init__(self, tokens: Tensor) -> None:
        """Serve the rows of `tokens`."""
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._tokens[index], "index": index}


class HealingTrainer(Trainer):
    """A Trainer that minimises any `Loss` and reports to a bar.

    `state.log_history` has one row per step and nothing in it depends on the clock; it is
    saved with every checkpoint, so what is derived from it resumes by itself.
    """

    def __init__(
        self, *, loss: Loss, bar: progress.Task, beside: nn.Module | None = None, **arguments: Any
    ) -> None:
        """Take the Trainer's own `arguments`; `beside` trains along with the model."""
        if beside:
            arguments["model"].add_module(_BESIDE, beside)
        super().__init__(**arguments)
        self._beside = beside
        self._loss = loss
        self._bar, self._shown = bar, 0
        self._trained = [n for n, p in self._inner.named_parameters() if p.requires_grad]
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    @property
    def _inner(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def weights(self) -> Weights:
        """The parameters that train, by name."""
        parameters = dict(self._inner.named_parameters())
        return {name: parameters[name].detach() for name in self._trained}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._beside and output_dir:  # an adapter's file has no place for it
            save_file(self._beside.state_dict(), Path(output_dir) / f"{_BESIDE}.safetensors")

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(folder, model)
        if self._beside:
            self._beside.load_state_dict(load_file(Path(folder) / f"{_BESIDE}.safetensors"))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Mean loss of a micro batch."""
        return self._loss(model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One optimizer step is done; it is not saved yet."""
        kept = {name: value for name, value in logs.items() if name in _KEPT}
        if not kept:
            return
        self.state.log_history.append({**kept, "step": self.state.global_step})
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_log(self.args, self.state, control, kept)
        self._refuse_lost(kept)
        note = f"loss {kept['loss']:.3f}, {self.state.num_input_tokens_seen:,} tokens"
        self._bar.advance(self.state.global_step - self._shown, note)
        self._shown = self.state.global_step

    def _refuse_lost(self, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            if not math.isfinite(value):
                raise HealingError(
                    f"the {name} is {value} at step {self.state.global_step}; lower "
                    f"heal.learning_rate (now {self.args.learning_rate}) or raise "
                    "heal.warmup_steps"
                )
