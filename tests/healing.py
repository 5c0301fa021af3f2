"""Healing tiny models in tests: one run, one interrupted run, the hash of a result."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from compressor.heal import METHODS, LoraParams, TrainingParams
from compressor.heal.healer import Healing
from compressor.heal.trainer import HealingTrainer
from tests.tiny import tokens

WINDOWS = tokens(6, 16)
PARAMS = LoraParams(
    rank=4, steps=8, warmup_steps=2, batch_size=2, save_every=3, learning_rate=1e-2, validation=0
)


def run(
    folder: Path, params: TrainingParams = PARAMS, name: str = "out"
) -> tuple[dict[str, Any], Path]:
    """Heal tmp/source into tmp/<name> by the method that these parameters are of.

    The report comes without its forecast, which depends on the process.
    """
    (folder / name).mkdir()
    healing = task(folder, params, name)
    row = next(row for row in METHODS.values() if row.params is type(params))
    report = row.load()(healing)
    assert report.pop("forecast")
    return report, healing.out


def task(folder: Path, params: TrainingParams = PARAMS, name: str = "out") -> Healing:
    """Healing of tmp/source, cut from tmp/parent if that is there, into tmp/<name>, not begun."""
    parent = folder / "parent"
    return Healing(
        source=folder / "source",
        out=folder / name,
        work=folder / f"{name}-work",
        tokens=WINDOWS,
        params=params,
        seed=0,
        device="cpu",
        teacher=folder / "teacher",
        parent=parent if parent.exists() else None,
    )


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


class Stop(Exception):
    """Stands in for the end of the process."""


def interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, params: TrainingParams = PARAMS
) -> Path:
    """Run until `step` and stop; returns the work folder."""
    log = HealingTrainer.log

    def stopping(self: Any, logs: Any, start_time: Any = None) -> None:
        log(self, logs, start_time)
        if self.state.global_step == step:
            raise Stop

    monkeypatch.setattr(HealingTrainer, "log", stopping)
    with pytest.raises(Stop):
        run(folder, params, "cut")
    monkeypatch.undo()
    shutil.rmtree(folder / "cut")
    return folder / "cut-work"
