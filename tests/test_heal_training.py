"""The shared trainer: held-out loss, the best kept, guards, filtering, budgets, resuming."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from compressor.checkpoint import Checkpoint
from compressor.errors import HealingError
from compressor.heal import LisaParams, LoraParams, TrainingParams, history, train
from compressor.heal.healer import Batch, Healer, Healing, Loss, next_token_loss
from compressor.heal.lisa import sampled
from compressor.heal.lora import adapter
from compressor.heal.trainer import HealingTrainer
from tests.healing import PARAMS, WINDOWS, Stop, digest, interrupted, run, task
from tests.tiny import save_tiny

HELD = PARAMS.model_copy(update={"validation": 0.3, "evaluate_every": 2})
LISA = LisaParams(
    steps=8, warmup_steps=2, batch_size=2, save_every=3, learning_rate=1e-2, validation=0.3,
    evaluate_every=2, blocks=2, every=2,
)  # fmt: skip
BOTH = pytest.mark.parametrize("params", [HELD, LISA], ids=["lora", "lisa"])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loss_of(folder: Path, windows: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def same_weights(a: Path, b: Path) -> bool:
    one, two = Checkpoint(a), Checkpoint(b)
    assert sorted(one.names) == sorted(two.names)
    return all(torch.equal(one.tensor(n), two.tensor(n)) for n in one.names)


def with_loss(folder: Path, params: TrainingParams, loss: Loss, name: str = "out") -> Any:
    """Train on tmp/source with another loss."""
    build = sampled if isinstance(params, LisaParams) else adapter
    (folder / name).mkdir()

    def method(healing: Healing) -> Healer:
        return dataclasses.replace(build(healing), loss=loss)

    return train.train(task(folder, params, name), method)


def climbing_from(batch: int) -> Loss:
    """A loss that is turned round from this micro batch on."""
    batches = itertools.count()

    def loss(model: Any, batch_: Batch) -> torch.Tensor:
        value = next_token_loss(model, batch_)
        return -value if model.training and next(batches) >= batch else value

    return loss


@BOTH
def test_the_best_evaluation_is_the_result(params: TrainingParams, tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    longer = {"steps": 15, "evaluate_every": 4}
    report = with_loss(tmp_path, params.model_copy(update=longer), climbing_from(8))
    evaluated = history.held_out(rows(tmp_path / "out"))
    assert [step for step, _ in evaluated] == [0, 4, 8, 12, 15]
    step, loss = min(evaluated, key=lambda each: each[1])
    assert 0 < step < 15
    assert report["held_out"] == {"before": evaluated[0][1], "after": loss, "step": step}
    assert loss_of(tmp_path / "source", WINDOWS[-2:]) == pytest.approx(evaluated[0][1], rel=1e-6)
    assert loss_of(tmp_path / "out", WINDOWS[-2:]) == pytest.approx(loss, rel=1e-5)


@BOTH
def test_what_makes_it_worse_is_not_kept(
    params: TrainingParams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path / "source", "llama").half().save_pretrained(tmp_path / "source")
    report = with_loss(tmp_path, params, climbing_from(0))
    assert report["held_out"]["step"] == 0
    assert report["held_out"]["after"] == report["held_out"]["before"]
    assert same_weights(tmp_path / "source", tmp_path / "out")
    assert "the result is the unhealed checkpoint" in caplog.text


def test_held_out_windows_do_not_train(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    seen: dict[bool, set[int]] = {True: set(), False: set()}

    def watched(model: Any, batch: Batch) -> torch.Tensor:
        seen[model.training] |= set(batch["index"].tolist())
        torch.testing.assert_close(batch["input_ids"], WINDOWS[batch["index"]])
        return next_token_loss(model, batch)

    with_loss(tmp_path, HELD, watched)
    assert seen == {True: {0, 1, 2, 3}, False: {4, 5}}


@pytest.mark.parametrize(
    ("share", "windows", "held"),
    [(0, 100, 0), (0.05, 6, 1), (0.05, 100, 5), (0.5, 1000, 64), (0.99, 2, 1)],
)
def test_how_many_windows_are_held_out(share: float, windows: int, held: int) -> None:
    params = TrainingParams(validation=share)
    assert train._held_out(params, windows) == held


def test_one_window_cannot_be_split() -> None:
    with pytest.raises(HealingError, match="one window cannot be split"):
        train._held_out(TrainingParams(), 1)


def test_patience_ends_training(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    report, out = run(tmp_path, HELD.model_copy(update={"steps": 100, "patience": 3}))
    best = report["held_out"]["step"]
    assert report["stopped"] == "patience"
    assert report["steps"] == best + 3 * 2 < 100
    assert rows(out)[-1]["step"] == report["steps"]


@BOTH
@pytest.mark.parametrize("step", [1, 5, 7, 8])
def test_resumes_to_the_same_bits(
    params: TrainingParams, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "source", "llama")
    report, whole = run(tmp_path, params)
    interrupted(tmp_path, monkeypatch, step, params)
    resumed, again = run(tmp_path, params, "cut")
    assert resumed == report
    assert digest(again) == digest(whole)
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("ending", [{"steps": 7}, {"steps": 8}, {"patience": 1, "steps": 50}])
def test_resumes_behind_the_last_step(
    ending: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops, and every step being saved, no step is made twice."""
    save_tiny(tmp_path / "source", "llama")
    params = HELD.model_copy(update={"save_every": 1, **ending})
    report, whole = run(tmp_path, params)

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(train, "_write", stop)
    with pytest.raises(Stop):
        run(tmp_path, params, "cut")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cut")
    resumed, again = run(tmp_path, params, "cut")
    assert resumed == report
    assert digest(again) == digest(whole)


def test_best_weights_outlive_the_state_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of step 3 says step 2 is best; step 4 is better, but its state is not saved."""
    save_tiny(tmp_path / "source", "llama")
    work = interrupted(tmp_path, monkeypatch, 5, HELD)
    assert {p.name for p in work.glob("best-*")} == {"best-2.safetensors", "best-4.safetensors"}
    _, out = run(tmp_path, HELD.model_copy(update={"save_every": 1}))
    kept = {p.name for p in (tmp_path / "out-work").glob("best-*")}
    assert f"best-{history.best(rows(out))[0]}.safetensors" in kept
    assert len(kept) <= 2  # the last save was before the last evaluation


def test_a_rising_loss_is_given_up_and_the_best_kept(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    batches = itertools.count()

    def worse(model: Any, batch: Batch) -> torch.Tensor:
        loss = next_token_loss(model, batch)
        return loss * max(1.0, next(batches) / 10) if model.training else loss

    params = HELD.model_copy(update={"steps": 99, "divergence_window": 4})
    with pytest.raises(HealingError, match=r"rising for 4 steps at step \d+; lower heal\.lea") as e:
        with_loss(tmp_path, params, worse)
    folder = Path(str(e.value).rpartition(" is in ")[2])
    best = float(str(e.value).partition("held-out loss ")[2].partition(")")[0])
    assert loss_of(folder, WINDOWS[-2:]) == pytest.approx(best, abs=1e-4)
    assert not list((tmp_path / "out").iterdir())


def log_of(losses: Any) -> list[dict[str, Any]]:
    return [{"loss": float(loss), "step": i} for i, loss in enumerate(losses, start=1)]


def test_what_counts_as_rising() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 4000)
    flat = 3 + noise
    assert not any(history.rising(log_of(flat[: i + 1]), 50) for i in range(0, 4000, 7))
    jump = np.r_[flat[:200], 7 + noise[200:220]]
    assert not history.rising(log_of(jump[:200]), 20)
    assert history.rising(log_of(jump), 20)
    slope = flat[:200] + np.r_[np.zeros(100), 0.02 * np.arange(100)]
    assert history.rising(log_of(slope), 50)
    assert not history.rising(log_of(slope[::-1]), 50)
    spike = np.r_[flat[:100], [30.0], flat[101:110]]
    assert not history.rising(log_of(spike), 20)
    assert not history.rising(log_of(jump), 0)
    assert not history.rising(log_of([1.0] * 39 + [2.0]), 21)


def test_welch_by_hand() -> None:
    """Means 2 and 1, variances 1 and 1 at n = 2: t = 1 / sqrt(1), which is below 4."""
    late, early = np.array([1.5, 2.5]), np.array([0.5, 1.5])
    t = (late.mean() - early.mean()) / math.sqrt((late.var(ddof=1) + early.var(ddof=1)) / 2)
    for gap in np.linspace(1, 4, 31):
        expected = t + (gap - 1) / math.sqrt(0.5) > 4
        assert history.rising(log_of([*early, *(late + gap - 1)]), 2) is bool(expected)


def test_best_and_stale_and_running() -> None:
    log = [{"held_out_loss": loss, "step": 2 * i} for i, loss in enumerate((5, 3, 4, 3, 6))]
    assert history.best(log) == (2, 3)
    assert history.stale(log) == 3
    assert history.running_loss(log_of(range(49))) is None
    assert history.running_loss(log_of(range(60))) == np.mean(range(10, 60))


def test_low_losses_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "RUNNING_STEPS", 2)
    save_tiny(tmp_path / "source", "llama")
    backwards: list[float] = []
    plain = HealingTrainer.training_step
    losses: list[tuple[float, float | None]] = []

    def watched(self: Any, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        before = history.running_loss(self.rows)
        loss = plain(self, model, inputs, *rest)
        losses.append((2 * float(loss), before))
        return loss

    def count(self: Any, loss: torch.Tensor, **_: Any) -> None:
        backwards.append(float(loss.detach()))
        loss.backward()

    monkeypatch.setattr(HealingTrainer, "training_step", watched)
    monkeypatch.setattr("accelerate.Accelerator.backward", count)
    params = PARAMS.model_copy(update={"skip_below": 1.0, "dropout": 0.0})
    report, out = run(tmp_path, params)
    low = [loss for loss, running in losses if running is not None and loss < running]
    assert 0 < len(low) < len(losses) == 16
    assert report["skipped"] == sum(row["skipped"] for row in rows(out)) == len(low)
    assert len(backwards) == 16 - len(low)


def test_everything_skipped_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "RUNNING_STEPS", 1)
    save_tiny(tmp_path / "source", "llama")
    params = PARAMS.model_copy(update={"skip_below": 100.0, "warmup_steps": 0, "save_every": 1})
    report, _ = run(tmp_path, params)
    assert report["skipped"] == 14
    one, last = (
        load_file(tmp_path / f"out-work/checkpoint-{step}/adapter_model.safetensors")
        for step in (6, 7)
    )
    assert all(torch.equal(one[name], last[name]) for name in one)


def test_filtering_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "RUNNING_STEPS", 2)
    save_tiny(tmp_path / "source", "llama")
    params = HELD.model_copy(update={"skip_below": 1.0})
    report, whole = run(tmp_path, params)
    work = interrupted(tmp_path, monkeypatch, 7, params)
    monkeypatch.setattr(history, "RUNNING_STEPS", 2)
    assert work.is_dir()
    resumed, again = run(tmp_path, params, "cut")
    assert resumed == report
    assert report["skipped"]
    assert digest(again) == digest(whole)


def test_schedule_is_the_usual_cosine(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    _, out = run(tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    usual = get_cosine_schedule_with_warmup(optimizer, 2, 8)
    expected = []
    for _ in range(8):
        expected.append(usual.get_last_lr()[0])
        optimizer.step()
        usual.step()
    assert [row["learning_rate"] for row in rows(out)] == pytest.approx(expected)


def test_a_night_ends_in_time_and_the_rate_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 1 s of the 10; resuming counts the seconds before."""
    save_tiny(tmp_path / "source", "llama")
    monkeypatch.setattr(HealingTrainer, "_elapsed", lambda self: float(self.state.global_step))
    params = PARAMS.model_copy(update={"steps": 1000, "max_seconds": 10, "warmup_steps": 0})
    report, out = run(tmp_path, params)
    assert report["stopped"] == "max_seconds"
    assert report["steps"] == 10
    assert (tmp_path / "out-work/seconds.json").read_text() == "9.0"
    rates = [row["learning_rate"] for row in rows(out)]
    assert rates[0] == 1e-2
    assert rates[-1] < 0.1 * 1e-2
    assert rates == sorted(rates, reverse=True)


def test_elapsed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "source", "llama")
    params = PARAMS.model_copy(update={"max_seconds": 1000.0})
    work = interrupted(tmp_path, monkeypatch, 7, params)
    (work / "seconds.json").write_text("990")
    report, _ = run(tmp_path, params, "cut")
    assert report["steps"] == 8
    (work / "seconds.json").unlink()


def test_checkpointing_changes_no_number(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    plain = PARAMS.model_copy(update={"dropout": 0.0})
    _, one = run(tmp_path, plain)
    _, two = run(tmp_path, plain.model_copy(update={"checkpointing": True}), "again")
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert isinstance(plain, LoraParams)


def test_nothing_is_logged_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    save_tiny(tmp_path / "source", "llama")
    _, out = run(tmp_path, HELD)
    steps = [(row["step"], "loss" in row) for row in rows(out)]
    assert len(steps) == len(set(steps)) == 8 + 5
