"""`compress bench`: turns, arithmetic, what a token reads, runs and folders, fresh processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from compressor.errors import ArtifactError, ConfigError, InferenceError
from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.export.decoder_graph import build
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.runtimes import Target, counters, find, roofline
from compressor.runtimes import bench as library
from compressor.runtimes.bench import Case, Settings, bench, in_fresh_process
from compressor.runtimes.roofline import bandwidth, weight_bytes
from pipelines import bench_command
from pipelines.bench_command import HEADINGS, as_markdown, cells, find_cases
from tests.tiny import save_tiny, save_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied llama and its export."""
    folder = tmp_path_factory.mktemp("bench")
    save_tiny(folder / "model", "llama", hidden_size=64)
    save_tokenizer(folder / "model")
    onnx_export.export(folder / "model", folder, ExportParams(check_tokens=4))
    return folder


def answers() -> Iterator[dict[str, Any]]:
    """What processes say, decode twice as slow each time."""
    seconds = 1.0
    while True:
        yield {
            "device": "cpu", "load_seconds": seconds, "peak_bytes": int(100 * seconds),
            "prompt_tokens": 8, "new_tokens": 4, "first": 0.5, "prefill": [2.0],
            "decode": [seconds], "joules": [8.0], "cache_bytes": 120, "waited": seconds / 8,
        }  # fmt: skip
        seconds *= 2


@pytest.fixture
def report(exported: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two cases and two thread counts in two turns, by fake processes on a fake machine."""
    monkeypatch.setattr(library, "bandwidth", lambda threads: 1e6 * threads)
    cases = [Case("a", find(exported)), Case("b", find(exported, "torch"))]
    said, order = answers(), []

    def measure(target: Target, settings: Settings, threads: int) -> dict[str, Any]:
        order.append((target.runtime, threads))
        return next(said)

    found = bench(cases, Settings(8, 4, 2, (1, 2)), measure)
    found["order"] = order
    return found


def test_cases_take_turns(report: dict[str, Any]) -> None:
    turn = [("onnxruntime", 1), ("torch", 1), ("onnxruntime", 2), ("torch", 2)]
    assert report.pop("order") == turn * 2


def test_the_arithmetic_of_a_row(report: dict[str, Any], exported: Path) -> None:
    a, b, a2, _ = report["rows"]
    assert [(r["label"], r["threads"]) for r in report["rows"]] == [
        ("a", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert a["decode"] == {"median": (4 / 1 + 4 / 16) / 2, "min": 0.25, "max": 4.0}
    assert b["decode"]["max"] == 2.0
    assert a["prefill"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert a["peak_bytes"] == 1600
    assert a["joules_per_token"]["median"] == 2.0
    assert a["waited"] == (1 / 8 + 16 / 8) / (2 + 1 + 2 + 16)
    # 120 bytes of cache for 12 tokens; steps 1 .. 4 read 9 .. 12 tokens, 10.5 on average
    read = weight_bytes(find(exported)) + 10 * 10.5
    assert a["bytes_per_token"] == round(read)
    assert a["roofline"] == pytest.approx(1e6 / read)
    assert a2["roofline"] == pytest.approx(2e6 / read)
    assert a["roofline_multiple"] == pytest.approx(1e6 / read / 2.125)
    files = sum((exported / "onnx" / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    assert a["bytes"] == files
    assert b["bytes"] == (exported / "safetensors/model.safetensors").stat().st_size


def test_the_report_has_a_schema_and_is_json(report: dict[str, Any]) -> None:
    del report["order"]
    assert json.loads(json.dumps(report)).keys() == {
        "format", "machine", "settings", "bandwidth", "rows",
    }  # fmt: skip
    assert report["bandwidth"] == {
        "1": {"median": 1e6, "min": 1e6, "max": 1e6}, "2": {"median": 2e6, "min": 2e6, "max": 2e6},
    }  # fmt: skip
    for row in report["rows"]:
        assert row.keys() == {
            "label", "folder", "runtime", "device", "threads", "bytes", "load_seconds",
            "first_token_seconds", "prefill", "decode", "peak_bytes", "bytes_per_token", "roofline",
            "roofline_multiple", "waited", "joules_per_token",
        }  # fmt: skip


def test_the_table_compares_with_the_first_row_of_equal_threads(report: dict[str, Any]) -> None:
    rows = [dict(zip(HEADINGS, row, strict=True)) for row in cells(report)]
    assert [row["vs first"] for row in rows] == ["1.00", "0.50", "1.00", "0.50"]
    assert rows[0]["decode tok/s"] == "2.1 ±1.9"
    assert rows[0]["below it"].endswith(" x")
    text = as_markdown(report)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "0.0 GB/s with 1 thread, 0.0 GB/s with 2 threads" in text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_token_reads_all_weights_but_the_embedding_s(
    runtime: str, tied: bool, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", "llama", hidden_size=64, tie_word_embeddings=tied)
    (tmp_path / "onnx").mkdir()
    build(tmp_path / "model", tmp_path / "onnx")
    total = sum(p.numel() for p in model.parameters()) * 4
    folder = tmp_path / ("onnx" if runtime == "onnxruntime" else "model")
    read = weight_bytes(Target(folder, runtime))
    shapes = 2 * 8 + 4 * 8 + 8 + 4  # what a graph holds beside weights
    assert 0 <= read - (total - (0 if tied else 96 * 64 * 4)) <= shapes


def test_integers_are_read_as_integers_in_a_graph_and_as_floats_in_torch(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    quantize(tmp_path / "model", tmp_path / "packed", None, "rtn", RtnParams(group_size=16))
    (tmp_path / "onnx").mkdir()
    build(tmp_path / "packed", tmp_path / "onnx")
    dense = weight_bytes(Target(tmp_path / "model", "torch"))
    assert weight_bytes(Target(tmp_path / "packed", "torch")) == dense
    linears = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 48)
    saved = linears * 4 - linears // 2 - linears // 16 * 4
    graph = weight_bytes(Target(tmp_path / "onnx", "onnxruntime"))
    assert abs(dense - saved - graph) <= 64


def test_bandwidth_is_bytes_over_the_best_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0])
    monkeypatch.setattr(roofline, "_PASSES", 3)
    monkeypatch.setattr(roofline, "_BUFFER_BYTES", 4000)
    monkeypatch.setattr("compressor.runtimes.roofline.time.perf_counter", lambda: next(times))
    seen: list[int] = []
    monkeypatch.setattr(np, "max", lambda part: seen.append(part.nbytes))
    assert bandwidth(2) == 2000
    assert sum(seen) == 3 * 4000


def test_energy_is_the_sum_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "POWERCAP", tmp_path)
    monkeypatch.setattr(counters, "_nvml", lambda: None)
    assert counters.joules() is None
    for name, value in {"intel-rapl:0": 3_000_000, "intel-rapl:1": 500_000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, counted there
    (tmp_path / "intel-rapl:0:0/energy_uj").write_text("1000000\n")
    assert counters.joules() == 3.5


def test_waiting_is_read_where_the_system_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "SCHEDULE", tmp_path / "schedstat")
    assert counters.seconds_waited() == 0
    (tmp_path / "schedstat").write_text("9000000000 2500000000 7\n")
    assert counters.seconds_waited() == 2.5


def test_a_busy_machine_is_named(report: dict[str, Any]) -> None:
    assert "up to 12 % of the time" in as_markdown(report)
    for row in report["rows"]:
        row["waited"] = 0.04
    assert "busy" not in as_markdown(report)


def test_a_fresh_process_measures(exported: Path) -> None:
    settings = Settings(8, 4, 1)
    found = in_fresh_process(find(exported), settings, 1)
    assert len(found["prefill"]) == len(found["decode"]) == 1
    assert found["cache_bytes"] == 2 * 4 * 2 * 16 * 4 * 12
    # onnxruntime's own process loads neither torch nor transformers, which take 300 MB alone
    assert 2**20 < found["peak_bytes"] < 250 * 2**20


def test_a_process_that_fails_is_one_line(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InferenceError, match="vocab_size"):
        in_fresh_process(Target(tmp_path, "onnxruntime"), Settings(8, 4, 1), 1)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2\necho out of luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(InferenceError, match=r"onnxruntime broke off \(out of luck\)"):
        in_fresh_process(find(exported), Settings(8, 4, 1), 1)


def test_a_run_is_its_checkpoints_and_its_export(exported: Path, tmp_path: Path) -> None:
    stages = [
        {"verb": "model", "label": "model", "folder": str(exported / "model")},
        {"verb": "text", "label": "text evaluation", "folder": str(tmp_path)},
        {"verb": "prune", "label": "prune 2", "folder": str(exported / "model")},
        {"verb": "export", "label": "export", "folder": str(exported)},
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo.json").write_text(json.dumps({"stages": stages}))
    found = [(c.label, c.target.runtime) for c in find_cases(["demo"], ["auto"], tmp_path)]
    assert found == [("original", "torch"), ("prune 2", "torch"), ("export", "onnxruntime")]
    both = find_cases(["demo"], ["torch", "onnxruntime"], tmp_path)
    assert [c.target.runtime for c in both] == ["torch"] * 3 + ["onnxruntime"]
    with pytest.raises(ArtifactError, match=r"did you mean 'demo'"):
        find_cases(["dmo"], ["auto"], tmp_path)
    del stages[3]
    (tmp_path / "runs/demo.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(ConfigError, match="no stage of this run runs in genai"):
        find_cases(["demo"], ["genai"], tmp_path)


def test_folders_of_one_name_keep_their_path(exported: Path, tmp_path: Path) -> None:
    os.symlink(exported, tmp_path / exported.name)
    pair = [str(exported), str(tmp_path / exported.name)]
    assert [c.label for c in find_cases(pair, ["auto"], tmp_path)] == pair
    assert find_cases(pair[:1], ["auto"], tmp_path)[0].label == exported.name


def test_the_command_plans_measures_and_prints(
    exported: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fake(cases: list[Case], settings: Settings) -> dict[str, Any]:
        asked.append((len(cases), settings))
        return report

    monkeypatch.setattr(bench_command, "run_bench", fake)
    args = [str(exported), "--runtime", "torch,onnxruntime", "--threads", "1,2", "--repeats", "3"]
    done = CliRunner().invoke(bench_command.bench, args)
    assert done.exit_code == 0
    assert asked == [(2, Settings(128, 32, 3, (1, 2)))]
    assert "vs first" in done.stdout
    as_json = CliRunner().invoke(bench_command.bench, [*args, "--json", "-q"])
    assert json.loads(as_json.stdout)["rows"] == report["rows"]
    assert as_json.stderr == ""
    shown = CliRunner().invoke(bench_command.bench, [*args, "--markdown", "-q"])
    assert shown.stdout.startswith("| model | runtime |")
