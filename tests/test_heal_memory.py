"""The forecast of memory, and what is said when it runs out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import HealingError
from compressor.heal import (
    TEACHER,
    DistillParams,
    LastBlocksParams,
    LisaParams,
    LoraParams,
    TrainingParams,
    memory,
)
from compressor.heal.distill import student
from compressor.heal.healer import Healer
from compressor.heal.last_blocks import thawed
from compressor.heal.lisa import sampled
from compressor.heal.lora import adapter
from compressor.heal.trainer import HealingTrainer
from tests.healing import PARAMS, run, task
from tests.test_teacher import cached
from tests.tiny import save_tiny, tiny, tokens

ROOT = Path(__file__).parents[1]
MEASURE = """
import sys
from pathlib import Path
from compressor.heal import METHODS
from compressor.heal.healer import Healing
from compressor.memory import peak, reset_peak
from tests.tiny import tokens
import json
method, settings = sys.argv[1], json.loads(sys.argv[2])
row = METHODS[method]
train = row.load()
reset_peak()
report = train(Healing(Path("source"), Path("out"), Path("work"), tokens(8, 256),
    row.params(**settings), 0, "cpu", Path("teacher")))
print(json.dumps([peak(), report["forecast"]]))
"""


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("lora", {}),
        pytest.param("lora", {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("lisa", {}, marks=pytest.mark.slow),
        pytest.param(
            "distill",
            {"hidden": [1, 6], "filters": "linear", "teacher_dtype": "float32"},
            marks=pytest.mark.slow,
        ),
        pytest.param("distill", {"top_k": 64}, marks=pytest.mark.slow),
    ],
)
def test_the_peak_stays_under_the_forecast(
    method: str, own: dict[str, Any], tmp_path: Path
) -> None:
    """12 M weights, windows of 256 tokens, four at a time, in a process of its own."""
    size = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
    save_tiny(tmp_path / "source", "llama", **size, num_hidden_layers=8)
    settings = {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "validation": 0, **own}
    if method == "distill":
        asked = {name: own.get(name, default) for name, default in TEACHER.params()}
        (tmp_path / "teacher").mkdir()
        folders = (tmp_path / name for name in ("source", "teacher", "teacher-work"))
        TEACHER.load()(*folders, tokens(8, 256), **asked)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, method, json.dumps(settings)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, forecast = json.loads(done.stdout)
    assert peak < forecast["total"], forecast
    grown = peak - forecast["resident"]
    assert forecast["total"] - forecast["resident"] < 3 * grown


def trained(healer: Healer) -> int:
    return sum(p.numel() for p in healer.model.parameters() if p.requires_grad)


def test_gradients_and_moments_are_those_of_what_trains(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    model = tiny("llama")
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 4 * block
    expected = {
        adapter: (PARAMS, 4 * 4 * 3 * (32 + 48)),
        sampled: (LisaParams(blocks=2), outside + 2 * block),
        thawed: (LastBlocksParams(blocks=1), block + 32 + 96 * 32),
    }
    for method, (params, count) in expected.items():
        healing = task(tmp_path, params)
        found = memory.forecast(healing, method(healing))  # type: ignore[operator]
        assert found["gradients"] == 4 * count
        assert found["optimizer"] == 8 * count


def test_what_is_read_of_a_parent_counts(tmp_path: Path) -> None:
    """Targets twice, as read and as a batch; filters train with the adapters."""
    for name in ("source", "parent"):
        save_tiny(tmp_path / name, "llama")
    found = {}
    for dtype, hidden in (("float16", ()), ("float32", ()), ("float32", (0, 3))):
        shutil.rmtree(tmp_path / "teacher", ignore_errors=True)
        shutil.rmtree(tmp_path / "teacher-work", ignore_errors=True)
        cached(tmp_path, teacher_dtype=dtype, hidden=hidden)
        own = {"teacher_dtype": dtype, "hidden": hidden, "filters": "linear"}
        healing = task(tmp_path, DistillParams(rank=4, micro_batch_size=2, **own))
        found[dtype, hidden] = memory.forecast(healing, student(healing))
    half, exact, more = (each["activations"] for each in found.values())
    assert exact - half == 2 * 2 * (2 * 16 * 96 * 2)  # scattered, windows, floats, bytes
    assert more - exact == 2 * 2 * (2 + 5) * (2 * 16 * 32 * 4)
    last, first = found["float32", (0, 3)], found["float32", ()]
    assert last["gradients"] - first["gradients"] == 4 * 2 * 32 * 32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_continued_exactly(attention: str, tmp_path: Path) -> None:
    """What three short windows tell of 128 tokens is what 128 tokens keep."""
    model = save_tiny(tmp_path / "source", "llama")
    model.set_attn_implementation(attention)
    healing = task(tmp_path)
    windows = tokens(1, 128)
    object.__setattr__(healing, "tokens", windows)
    found = memory._continued(model, healing, 128)
    assert found == pytest.approx(memory._saved(model, windows), rel=0.01)
    maps = 4 * 4 * 128 * 128 * 4  # blocks, heads, T, T, bytes
    assert (found > 2 * maps) is (attention == "eager")


def test_the_probes_draw_no_random_number(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    healing = task(tmp_path)
    healer = adapter(healing)
    before = torch.get_rng_state()
    memory.forecast(healing, healer)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path / "source", "llama")
    monkeypatch.setattr(memory, "_free", lambda device: 1000)
    run(tmp_path)
    assert "GiB are free; set heal.checkpointing: true, or heal with qlora" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_explained(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "source", "llama")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(HealingTrainer, "training_step", fail)
    with pytest.raises(
        HealingError, match=r"out of memory at step 1; lower heal\.micro_batch_size"
    ):
        run(tmp_path, PARAMS.model_copy(update={"micro_batch_size": 2}))


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "source", "llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(HealingTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(tmp_path)


def test_remedies_name_what_is_left() -> None:
    assert memory.remedies(TrainingParams(checkpointing=True)) == "or heal with qlora"
    assert "now 4" in memory.remedies(LoraParams(micro_batch_size=4))
