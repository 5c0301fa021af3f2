"""The doctor names what is missing and the command that brings it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines import doctor
from pipelines.doctor import OPTIONAL, REQUIRED, report

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_everything_here_is_reported(tmp_path: Path) -> None:
    checks = {check.name: check for check in report(tmp_path / "none/yet")}
    assert {"python", "torch", "memory", "disk", "transformers", "onnxruntime"} <= checks.keys()
    assert checks["torch"].state == "ok"
    assert checks["4-bit healing"].found.startswith("NF4 runs on ")
    assert all(check.fix for check in checks.values() if check.state != "ok")


def test_the_lists_are_those_of_the_project() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    names = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    assert {*REQUIRED, "torch"} == names
    for name, (extra, _) in OPTIONAL.items():
        assert any(line.startswith(name) for line in project["optional-dependencies"][extra])


def test_a_full_disk_and_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_LOW_DISK_BYTES", 2**80)
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    checks = {check.name: check for check in report(tmp_path)}
    assert checks["disk"].state == "problem"
    assert {checks[name].state for name in (*REQUIRED, "torch", "onnxruntime")} == {"missing"}


def test_a_cpu_build_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    for driver, state in (("/usr/bin/nvidia-smi", "problem"), (None, "ok")):
        monkeypatch.setattr(doctor.shutil, "which", lambda name, driver=driver: driver)
        assert {c.name: c for c in report(tmp_path)}["torch"].state == state


def test_a_cuda_build_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = doctor._torch()
    assert (check.state, check.fix) == ("problem", "nvidia-smi")
    assert "no CUDA device" in check.found


@pytest.mark.parametrize(("told", "driver"), [("580.1\n580.1\n", "580.1"), (None, "unknown")])
def test_a_gpu_with_its_driver(
    told: str | None, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(name="H", major=9, minor=0, total_memory=2**30)

    def run(*args: object, **kwargs: object) -> SimpleNamespace:
        if told is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=told)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    check = doctor._torch()
    assert check.state == "ok"
    assert f"driver {driver}; H (sm_90, " in check.found


def test_packages_that_are_there_but_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("libbitsandbytes_cpu.so: cannot open\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr(functional, "quantize_4bit", fail)
        check = doctor._four_bits()
        assert check.state == "problem"
        assert check.found == "bitsandbytes does not run (libbitsandbytes_cpu.so: cannot open)"
    with monkeypatch.context() as patch:
        patch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.ones(1, 64))
        assert "wrong values" in doctor._four_bits().found
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert (doctor._torch().state, doctor._torch().fix) == ("problem", "make clean install")


def test_a_runtime_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(doctor, "_version", lambda name: "" if "gpu" in name else "1.0")
    check = {check.name: check for check in report(tmp_path)}["onnxruntime"]
    assert (check.state, check.fix) == ("problem", "pip install --force-reinstall onnxruntime")


@pytest.mark.parametrize(
    ("there", "state", "fix"),
    [
        ({"onnxruntime", "onnxruntime-genai"}, "ok", ""),
        ({"onnxruntime-gpu", "onnxruntime-genai-cuda"}, "ok", ""),
        ({"onnxruntime"}, "missing", "pip install onnxruntime-genai"),
        ({"onnxruntime-gpu"}, "missing", "pip install onnxruntime-genai-cuda"),
        (
            {"onnxruntime-gpu", "onnxruntime-genai"},
            "problem",
            "pip uninstall -y onnxruntime-genai && pip install onnxruntime-genai-cuda",
        ),
    ],
)
def test_genai_goes_with_its_onnxruntime(
    there: set[str], state: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name in there else "")
    assert (doctor._genai().state, doctor._genai().fix) == (state, fix)


def test_both_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "datasets" else "1.0")
    checks = {check.name: check for check in report(tmp_path)}
    assert checks["onnxruntime"].state == "problem"
    assert "pip uninstall" in checks["onnxruntime"].fix
    assert checks["datasets"].fix == "pip install 'compress-llm[hub]'"
