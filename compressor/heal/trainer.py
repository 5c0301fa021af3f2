"""The transformers Trainer for full windows: any loss, held-out evaluation, guards."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerControl

from compressor import progress
from compressor.errors import HealingError
from compressor.heal import TrainingParams, history
from compressor.heal.healer import Batch, Loss, Weights, document_positions

_KEPT = ("loss", "grad_norm", "learning_rate")
_BESIDE = "beside"
_SPENT = "seconds.json"


class Windows(Dataset[Batch]):
    """Rows of windows (N, T), each with its index."""

    def __init__(self, tokens: Tensor, rows: range, end: int | None = None) -> None:
        """Serve these rows of `tokens`; documents are apart where their `end` is given."""
        self._tokens, self._rows, self._end = tokens, rows, end

    def __len__(self) -> int:
        return len(self._rows)

    def share(self, rank: int, count: int) -> Windows:
        """What one of `count` processes sees of them."""
        return Windows(self._tokens, self._rows[rank::count], self._end)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        tokens = self._tokens[row]
        if self._end is None:
            return {"input_ids": tokens, "index": row}
        places = document_positions(tokens, self._end)
        labels = tokens.masked_fill(places == 0, -100)
        return {"input_ids": tokens, "index": row, "position_ids": places, "labels": labels}


class HealingTrainer(Trainer):
    """A Trainer that minimises any `Loss`, judges it on held-out windows and reports to a bar.

    `state.log_history` has one row per step and one per evaluation, and nothing in it depends
    on the clock. It is saved with every checkpoint, and what stops, filters or chooses is
    derived from it alone, so that it resumes by itself.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        settings: TrainingParams,
        bar: progress.Task,
        beside: nn.Module | None = None,
        **arguments: Any,
    ) -> None:
        """Take the Trainer's own `arguments`; `beside` trains along with the model."""
        if beside:
            arguments["model"].add_module(_BESIDE, beside)
        super().__init__(**arguments)
        self._loss, self._settings, self._beside = loss, settings, beside
        self._bar, self._shown = bar, 0
        self._trained = [n for n, p in self._inner.named_parameters() if p.requires_grad]
        self._skipped = 0
        self._began, self._before = time.monotonic(), _spent(self._work)
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.stopped = "steps"

    @property
    def _inner(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _work(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The log so far."""
        return self.state.log_history

    def weights(self) -> Weights:
        """The parameters that train, by name."""
        parameters = dict(self._inner.named_parameters())
        return {name: _gathered(parameters[name].detach()) for name in self._trained}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._beside and output_dir and self.args.should_save:  # adapters have no place for it
            save_file(self._beside.state_dict(), Path(output_dir) / f"{_BESIDE}.safetensors")

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(folder, model)
        if self._beside:
            self._beside.load_state_dict(load_file(Path(folder) / f"{_BESIDE}.safetensors"))

    def best_weights(self) -> Weights:
        """Those of the best evaluation, which is not the one before the first step."""
        return load_file(self._best(history.best(self.rows)[0]))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Mean loss of a micro batch."""
        return self._loss(model, inputs)

    def training_step(self, model: nn.Module, inputs: Batch, *rest: Any) -> Tensor:
        """Forward and backward of a micro batch; no backward where the loss is low already."""
        running = history.running_loss(self.rows) if self._settings.skip_below else None
        if running is None:
            return super().training_step(model, inputs, *rest)
        model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        threshold = self._settings.skip_below * running / self.current_gradient_accumulation_steps
        if loss.detach() < threshold:
            self._skipped += len(inputs["input_ids"])
        else:
            self.accelerator.backward(loss)
        return loss.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One optimizer step is done; it is not saved yet."""
        kept = {name: value for name, value in logs.items() if name in _KEPT}
        if not kept:
            return
        if self._settings.skip_below:
            kept["skipped"], self._skipped = self._skipped, 0
        self._record(kept)
        if history.rising(self.rows, self._settings.divergence_window):
            self._give_up(f"the loss has been rising for {self._settings.divergence_window} steps")
        if self._settings.max_seconds and self._elapsed() >= self._settings.max_seconds:
            self._stop("max_seconds")
        note = f"loss {kept['loss']:.3f}, {self.state.num_input_tokens_seen:,} tokens"
        self._bar.advance(self.state.global_step - self._shown, note)
        self._shown = self.state.global_step

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge where it is due; the Trainer also asks when it resumes at any other step."""
        if self.state.global_step % self._settings.evaluate_every == 0:
            self.judge()
        return {}

    @torch.no_grad()
    def judge(self) -> None:
        """Log the mean loss over the held-out windows, once per step, and keep the best weights."""
        step = self.state.global_step
        if self.eval_dataset is None or step in dict(history.held_out(self.rows)):
            return
        self._record({"held_out_loss": self._held_out_loss()})
        if history.best(self.rows)[0] == step and step:
            self._save_best(step)
        if self._settings.patience and history.stale(self.rows) >= self._settings.patience:
            self._stop("patience")

    def _held_out_loss(self) -> float:
        """Mean loss of the held-out windows, each process taking its share of them."""
        held: Windows = self.eval_dataset  # type: ignore[assignment]
        mine = held.share(self.args.process_index, self.args.world_size)
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        self._inner.eval()
        for inputs in DataLoader(mine, self.args.eval_batch_size):
            with self.compute_loss_context_manager():
                loss = self._loss(self._inner, self._prepare_inputs(inputs))
            total += loss.double() * len(inputs["input_ids"])
        total = self.accelerator.reduce(total, "sum")  # type: ignore[assignment]
        return float(total) / len(held)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """Linear warm-up, then a cosine to zero at the last step or, if that is first, second.

        After `warmup_steps`: (1 + cos(pi p)) / 2, p the share of the steps left then that is
        used up, or that of `max_seconds` where it is larger.
        """
        warmup = self._settings.warmup_steps

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            share = (step - warmup) / max(1, num_training_steps - warmup)
            if self._settings.max_seconds:
                share = max(share, self._elapsed() / self._settings.max_seconds)
            return (1 + math.cos(math.pi * min(1.0, share))) / 2

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, then drop best weights that no saved state names any more.

        Not when training ends here: the Trainer would resume such a state with one step more.
        """
        if self.control.should_training_stop:
            return
        super()._save_checkpoint(model, trial)
        elapsed = self._elapsed()
        if not self.is_world_process_zero():
            return
        if self._settings.max_seconds:
            (self._work / _SPENT).write_text(json.dumps(elapsed))
        if history.held_out(self.rows):
            kept = self._best(history.best(self.rows)[0])
            for path in set(self._work.glob("best-*.safetensors")) - {kept}:
                path.unlink()

    def _record(self, row: dict[str, float]) -> None:
        """Add a row to the log and give up when it holds what is not a number."""
        self.rows.append({**row, "step": self.state.global_step})
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_log(self.args, self.state, control, row)
        for name, value in row.items():
            if not math.isfinite(value):
                self._give_up(f"the {name} is {value}")

    def _give_up(self, reason: str) -> None:
        raise HealingError(
            f"{reason} at step {self.state.global_step}; lower heal.learning_rate (now "
            f"{self.args.learning_rate}) or raise heal.warmup_steps"
        )

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self.control.should_training_stop = True

    def _elapsed(self) -> float:
        """Seconds of training, those before an interruption included; the same on all ranks."""
        here = self._before + time.monotonic() - self._began
        if self.args.world_size == 1:
            return here
        mean: Any = self.accelerator.reduce(torch.tensor(here, device=self.args.device), "mean")
        return float(mean)

    def _best(self, step: int) -> Path:
        return self._work / f"best-{step}.safetensors"

    def _save_best(self, step: int) -> None:
        weights = {name: weight.contiguous() for name, weight in self.weights().items()}
        if self.is_world_process_zero():
            draft = self._work / ".best"
            self._work.mkdir(parents=True, exist_ok=True)
            save_file(weights, draft)
            draft.rename(self._best(step))


def _gathered(weight: Tensor) -> Tensor:
    """A weight of which the processes hold shards (FSDP), whole; in all of them at once."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _spent(work: Path) -> float:
    try:
        return float(json.loads((work / _SPENT).read_text()))
    except (OSError, ValueError):
        return 0.0
