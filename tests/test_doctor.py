"""The doctor names what is missing and the command that brings it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.doctor import report


def test_everything_here_is_reported(tmp_path: Path) -> None:
    checks = {check.name: check for check in report(tmp_path / "none/yet")}
    assert {"python", "torch", "memory", "disk", "transformers", "onnxruntime"} <= checks.keys()
    assert checks["torch"].state == "ok"
    assert all(check.fix for check in checks.values() if check.state != "ok")


def test_both_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "datasets" else "1.0")
    checks = {check.name: check for check in report(tmp_path)}
    assert checks["onnxruntime"].state == "problem"
    assert "pip uninstall" in checks["onnxruntime"].fix
    assert checks["datasets"].fix == "pip install 'compress-llm[hub]'"
