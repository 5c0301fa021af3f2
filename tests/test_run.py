"""The whole pipeline on a tiny model: cached, partial, resumed, damaged, interrupted."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.artifact import Store
from compressor.memory import import_for_good
from compressor.records import Selection
from pipelines import table
from pipelines.config import load
from pipelines.run import ensure, make_plan
from tests.command_line import CODE, compress, start
from tests.tiny import save_project

CONFIG = """\
name: tiny
model: {path: model}
text:
  source: {path: corpus.jsonl, field: text}
  evaluation: {windows: 4, length: 32}
  calibration: {windows: 8, length: 32}
  healing: {windows: 16, length: 32}
evaluate: {prompt_tokens: 4, new_tokens: 2, repeats: 1}
stages:
  - score: [angular_distance, block_influence, lamp, layer_contribution]
  - select: {method: contiguous, n: 2}
  - prune
  - heal: {method: lora, rank: 4, steps: 12, warmup_steps: 2, batch_size: 2, save_every: 2}
  - quantize: {method: gptq, group_size: 16}
  - export
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with tokenizer, a corpus, a configuration and one finished run of it."""
    folder = tmp_path_factory.mktemp("project")
    save_project(folder, CONFIG, hidden_size=64)
    result = compress(folder, "run", "tiny.yaml", "--json")
    assert result.returncode == 0, result.stderr
    (folder / "first.json").write_text(result.stdout)
    Selection(num_blocks=30, drop_blocks=[1, 2]).save(folder / "deeper.json")
    return folder


def record(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "first.json").read_text())
    return value


def test_the_record_is_complete(project: Path) -> None:
    run = record(project)
    verbs = [s["verb"] for s in run["stages"]]
    assert verbs == [
        "model", "text", "text", "text", "evaluate", "score", "select", "prune", "evaluate",
        "heal", "evaluate", "quantize", "evaluate", "export",
    ]  # fmt: skip
    for stage in run["stages"]:
        assert Path(stage["folder"]).is_dir()
        assert stage["seconds"] > 0
        assert stage["peak_bytes"] > 2**20
    assert {row["stage"] for row in run["table"]} == {
        "original", "prune", "heal", "quantize", "onnx",
    }  # fmt: skip
    blocks = {row["stage"]: row["blocks"] for row in run["table"]}
    assert blocks == {"original": 4, "prune": 2, "heal": 2, "quantize": 2, "onnx": 2}
    saved = json.loads((project / "artifacts/runs/tiny.json").read_text())
    assert saved == {k: v for k, v in run.items() if k not in ("built", "table")}


def test_exports_load_without_our_code(project: Path) -> None:
    exports = record(project)["exports"]
    script = Path(__file__).with_name("plain_runtimes.py")
    done = subprocess.run(
        [sys.executable, str(script), exports["safetensors"], exports["onnx"]],
        capture_output=True,
        text=True,
        check=False,
        cwd=project,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["same_tokens"]
    assert report["largest_logit_difference"] < 1e-3
    assert report["our_modules_imported"] == []


def test_second_run_does_nothing(project: Path) -> None:
    again = compress(project, "run", "tiny.yaml", "--json")
    assert json.loads(again.stdout)["built"] == []
    spoken = compress(project, "run", "tiny.yaml")
    assert "nothing to do" in spoken.stderr
    assert "perplexity over 4 held-out windows" in spoken.stdout


def test_one_change_runs_only_what_depends_on_it(project: Path) -> None:
    result = compress(project, "run", "tiny.yaml", "--json", "--set", "quantize.bits=8")
    built = json.loads(result.stdout)["built"]
    assert built == ["quantize", "evaluate quantize", "export"]


def test_from_to_and_force(project: Path) -> None:
    result = compress(
        project, "run", "tiny.yaml", "--json", "--from", "prune", "--to", "prune", "--force"
    )
    assert json.loads(result.stdout)["built"] == ["prune", "evaluate prune"]
    missing = compress(
        project, "run", "tiny.yaml", "--from", "quantize", "--set", "heal.steps=3", "--json"
    )
    assert missing.returncode == 1
    assert "which is not stored" in missing.stderr


def test_quiet_prints_the_exports_only(project: Path) -> None:
    result = compress(project, "run", "tiny.yaml", "--quiet")
    assert result.stdout.split() == list(record(project)["exports"].values())
    assert result.stderr == ""


def test_damage_is_set_aside_and_mended(project: Path) -> None:
    folder = next(Path(s["folder"]) for s in record(project)["stages"] if s["verb"] == "prune")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    assert "damaged" in compress(project, "plan", "tiny.yaml").stdout
    result = compress(project, "run", "tiny.yaml", "--json")
    assert json.loads(result.stdout)["built"] == ["prune"]
    assert weights.read_bytes() == good
    assert list(folder.parent.glob("prune-*.damaged-*"))


@pytest.mark.parametrize("seen", ["missing", "damaged"])
def test_what_another_process_made_meanwhile_is_taken(
    seen: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is looked at before the lock is held, and again behind it."""
    monkeypatch.chdir(project)
    config, store = load(Path("tiny.yaml")), Store("artifacts/store")
    stage, events, real = make_plan(config)[0], list[str](), Store.status
    before = store.manifest(stage.verb, stage.key)
    looks = iter([seen])
    monkeypatch.setattr(Store, "status", lambda *a: next(looks, None) or real(*a))
    ensure(stage, config, store, lambda event, _: events.append(event))
    assert events == ["cached"]
    assert store.manifest(stage.verb, stage.key) == before
    assert not list(Path("artifacts/store").glob("model-*.damaged-*"))


def test_verify_names_the_changed_file(project: Path) -> None:
    folder = next(Path(s["folder"]) for s in record(project)["stages"] if s["verb"] == "select")
    assert compress(project, "verify", str(folder)).returncode == 0
    path = folder / "selection.json"
    text = path.read_text()
    path.write_text(text.replace("2", "3", 1))
    result = compress(project, "verify", str(folder))
    path.write_text(text)
    assert result.returncode == 1
    assert "selection.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_interrupt_leaves_nothing_half_written(project: Path) -> None:
    child = start(project, "run", "tiny.yaml", "--store", "stopped")
    store = project / "stopped/store"
    while not list(store.glob("evaluate-*")):
        time.sleep(0.01)
    child.send_signal(2)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not list(store.glob(".tmp-*"))


def test_a_verb_alone_delivers_a_folder(project: Path) -> None:
    result = compress(project, "prune", "model", "--blocks", "1-2", "-o", "cut", "--quiet")
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(project / "cut")
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():
        assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    assert (
        "exists already" in compress(project, "prune", "model", "--blocks", "1", "-o", "cut").stderr
    )


def test_evaluate_alone_takes_its_settings(project: Path) -> None:
    text = ["--text", "corpus.jsonl", "--field", "text", "--windows", "2", "--length", "16"]
    timing = ["--prompt-tokens", "3", "--new-tokens", "2", "--repeats", "1", "--json"]
    result = compress(project, "evaluate", "model", *text, *timing)
    assert result.returncode == 0, result.stderr
    speed = json.loads(result.stdout)["stages"][-1]["metrics"]["speed"]
    assert (speed["prompt_tokens"], speed["new_tokens"], speed["repeats"]) == (3, 2, 1)


def test_export_alone_proves_its_graph_and_leaves_timing_to_bench(project: Path) -> None:
    result = compress(project, "export", "model", "--check-tokens", "2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["stages"][-1]["metrics"]["onnx"]
    assert found["parity"]["greedy_tokens"] == 6
    assert "speed" not in found
    assert "speed" in record(project)["stages"][-1]["metrics"]["onnx"]


def test_the_garbage_collector_is_only_off_while_libraries_are_imported(tmp_path: Path) -> None:
    assert import_for_good("pipelines.stages") is importlib.import_module("pipelines.stages")
    with pytest.raises(ModuleNotFoundError):
        import_for_good("pipelines.nowhere")
    assert gc.isenabled()


def test_pruning_weights_and_widths_from_the_command_line(project: Path) -> None:
    text = ("--text", "corpus.jsonl", "--field", "text", "--windows", "4", "--length", "32")
    for out, size, args in (
        ("sparse", 48, ("--method", "wanda", "--sparsity", "0.5", *text)),
        ("slim", 32, ("--method", "slimgpt", "--ratio", "0.4", "--multiple", "16", *text)),
    ):
        result = compress(project, "prune", "model", *args, "-o", out)
        assert result.returncode == 0, result.stderr
        model = AutoModelForCausalLM.from_pretrained(project / out)
        assert model.config.intermediate_size == size
        assert model.config.num_hidden_layers == 4


def test_an_error_names_the_model_as_it_was_given(project: Path) -> None:
    ways = ("--method", "rtn", "--group-size", "16")
    assert compress(project, "quantize", "model", *ways, "-o", "4bit").returncode == 0
    again = compress(project, "quantize", "4bit", *ways)
    assert again.returncode == 1
    assert "error: 4bit: already quantized" in again.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["run", "missing.yaml"], 1, "missing.yaml: no such file"),
        (["runn"], 2, "did you mean 'run'"),
        (["run", "tiny.yaml", "--set", "heal.rnak=3"], 1, "did you mean 'rank'"),
        (["run", "tiny.yaml", "--set", "select.n=9"], 1, "n = 9 is more than"),
        (
            ["run", "tiny.yaml", "--set", "quantize.group_size=48"],
            1,
            "not a multiple of group_size",
        ),
        (["run", "tiny.yaml", "--set", "text.evaluation.windows=4000"], 1, "give more text"),
        (["run", "tiny.yaml", "--set", "text.healing.length=129"], 1, "reads at most 128; set it"),
        (["run", "tiny.yaml", "--set", "model.path=nowhere"], 1, "nowhere: no such file or folder"),
        (["run", "tiny.yaml", "--set", "device=cuda", "--force"], 1, "sees no CUDA device"),
        (["quantize", "model", "--bits", "[1"], 2, "is not a YAML value"),
        (["select", "scores.json", "--protect", "a"], 1, "select.protect"),
        (["prune", "model"], 2, "either --selection or some of --blocks"),
        (["prune", "model", "--method", "wanda"], 1, "'prune' needs calibration"),
        (["prune", "model", "--method", "wanda", "--blocks", "1"], 2, "takes no selection"),
        (["prune", "model", "--method", "wandda"], 1, "did you mean 'wanda'"),
        (["prune", "model", "--blocks", "7"], 1, "do not exist in a model of 4"),
        (["prune", "model", "--ffn", "0,3-1"], 1, "--ffn 0,3-1: 3-1 ends before it begins"),
        (["prune", "model", "--selection", "deeper.json"], 1, "a model of 30 blocks, but this one"),
        (["score", "model", "--method", "lampp"], 1, "did you mean 'lamp'"),
        (["quantize", "model", "--group-size", "16"], 1, "add text.calibration"),
        (["show", "tny"], 1, "did you mean 'tiny'"),
        (["bench", "/no/model"], 1, "/no/model: neither a folder nor a run in artifacts/runs"),
        (["evaluate", "model"], 2, "evaluate needs --text"),
    ],
)
def test_bad_input_is_one_clear_line(project: Path, args: list[str], code: int, said: str) -> None:
    before = sorted((project / "artifacts/store").glob("*"))
    result = compress(project, *args)
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1
    assert not list((project / "artifacts/store").glob(".tmp-*"))
    assert set(before) <= set((project / "artifacts/store").glob("*"))


def test_full_disk_is_explained(project: Path) -> None:
    """A file-size limit stands in for a full disk: writes fail part of the way through."""
    limited = "import errno\nfrom compressor.spool import Spool\n" + (
        "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "Spool.save = full\n"
    )
    python = (sys.executable, "-c", limited + CODE)
    result = compress(project, "run", "tiny.yaml", "--store", "full", python=python)
    assert result.returncode == 1
    assert "the disk is full" in result.stderr
    assert not list((project / "full/store").glob(".tmp-*"))


def test_a_healing_that_helped_nothing_is_named() -> None:
    def stage(label: str, **metrics: Any) -> dict[str, Any]:
        return {"verb": label.split()[0], "label": label, "metrics": metrics}

    stages = [
        stage("evaluate original", nll=3.0), stage("evaluate prune", nll=4.0),
        stage("heal", held_out={"before": 4.1, "after": 4.1, "step": 0}),
        stage("evaluate heal", nll=4.0),
    ]  # fmt: skip
    told = table.healing({"stages": stages})
    assert told is not None
    assert told.startswith("pruning added 1.000 nats per token; healing closed 0.000 (0 %)")
    assert "heal kept the unhealed weights" in told
    stages[2]["metrics"]["held_out"]["step"] = 3
    assert "kept" not in str(table.healing({"stages": stages}))
