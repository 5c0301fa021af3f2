"""One thread per test process, no network, and the same products on every processor."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`forwards: auto` means float32 here, whatever the processor."""
    monkeypatch.setattr("compressor.quantize.precision.has_bfloat16", lambda: False)
