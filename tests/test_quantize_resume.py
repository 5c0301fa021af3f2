"""A quantization that is killed goes on and ends in the same bytes."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from compressor import progress
from compressor.prune.blocks import prune
from compressor.quantize import GptqParams, GridParams, PropagatingParams, RtnParams, driver, resume
from compressor.quantize.results import BlockResult
from compressor.quantize.resume import Saves
from compressor.quantize.teacher import Teacher
from compressor.records import Selection
from pipelines import display
from tests.command_line import CODE, compress, hashes, kill
from tests.tiny import save_project, save_tiny, tokens

DEPTH = 5
WINDOWS = tokens(4)
GPTQ = GptqParams(group_size=16, bits=3, symmetric=False)

CONFIG = """\
name: quantized
model: {path: model}
text:
  source: {path: corpus.jsonl, field: text}
  calibration: {windows: 8, length: 32}
stages:
  - quantize: {method: gptq, group_size: 16}
"""

OFTEN = (
    sys.executable,
    "-c",
    f"from compressor.quantize import resume; resume.EVERY_SECONDS = resume.SHARE = 0; {CODE}",
)
"""The command line with a save behind every block."""


class Killed(Exception):
    """The process ends here."""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(resume, "SHARE", 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=DEPTH)
    return tmp_path / "model"


Quantize = Callable[..., dict[str, bytes]]


def quantized(
    model: Path, out: Path, method: str = "gptq", params: GridParams = GPTQ, **options: Any
) -> dict[str, bytes]:
    """Every file that quantizing writes."""
    options = {"tokens": None if method == "rtn" else WINDOWS, **options}
    driver.quantize(model, out, method=method, params=params, **options)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def killed_behind(block: int, model: Path, work: Path, **options: Any) -> None:
    """Quantize, saving into `work`, and raise when so many blocks are done."""
    add = Saves.add

    def raising(self: Saves, result: BlockResult, streams: Sequence[Tensor]) -> None:
        add(self, result, streams)
        if any(f".{block - 1}." in name for name in result.weights):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saves, "add", raising)
        with pytest.raises(Killed):
            quantized(model, work.with_name("lost"), work=work, **options)
    assert json.loads((work / "state.json").read_text())["blocks"] == block


def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first linear of every block that is quantized from now on."""
    seen: list[str] = []
    add = Saves.add

    def watched(self: Saves, result: BlockResult, streams: Sequence[Tensor]) -> None:
        seen.append(next(iter(result.weights)).split(".")[2])
        add(self, result, streams)

    monkeypatch.setattr(Saves, "add", watched)
    return seen


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("gptq", GPTQ),
        ("gptq", GPTQ.model_copy(update={"propagation": "none"})),
        ("gptq", GPTQ.model_copy(update={"scaling": "awq", "symmetric": True})),
        ("qep_rtn", PropagatingParams(group_size=16)),
        ("rtn", RtnParams(group_size=16)),
    ],
    ids=["gptq", "one stream", "scaled", "qep_rtn", "rtn"],
)
def test_killed_behind_a_block_it_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, params: GridParams
) -> None:
    how: dict[str, Any] = {"method": method, "params": params}
    once = quantized(model, tmp_path / "once", **how)
    work = tmp_path / "work"
    killed_behind(2, model, work, **how)
    killed_behind(3, model, work, **how)
    blocks = worked(monkeypatch)
    assert quantized(model, tmp_path / "again", work=work, **how) == once
    assert blocks == ["3", "4"]


def test_the_teacher_goes_on_with_its_own_blocks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(model, Selection(num_blocks=DEPTH, drop_blocks=[0, 2]), tmp_path / "cut")
    how = {"teacher": Teacher(model, [1, 3, 4])}
    once = quantized(tmp_path / "cut", tmp_path / "once", **how)
    killed_behind(1, tmp_path / "cut", tmp_path / "work", **how)
    blocks = worked(monkeypatch)
    again = quantized(tmp_path / "cut", tmp_path / "again", work=tmp_path / "work", **how)
    assert again == once and blocks == ["1", "2"]


def test_one_generation_is_kept(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    killed_behind(3, model, work)
    names = {f"block-{index:05d}.safetensors" for index in range(3)}
    names |= {f"stream-{index}-behind-3" for index in range(2)}
    assert {path.name for path in work.iterdir()} == {*names, "state.json"}


def test_what_takes_less_than_the_interval_saves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "EVERY_SECONDS", 60.0)
    quantized(model, tmp_path / "out", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_finished_blocks_do_not_pile_up_in_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = quantized(model, tmp_path / "once")
    work = tmp_path / "work"
    killed_behind(2, model, work)
    monkeypatch.setattr(resume, "EVERY_SECONDS", 60.0)
    monkeypatch.setattr(resume, "PENDING_BYTES", 0)
    quantized(model, tmp_path / "more", work=work)
    assert json.loads((work / "state.json").read_text())["blocks"] == 2
    assert len(list(work.glob("block-*"))) == DEPTH
    assert quantized(model, tmp_path / "again", work=work) == once


def _cut_short(work: Path) -> None:
    path = work / "stream-1-behind-2"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(name: str) -> Callable[[Path], None]:
    def flip(work: Path) -> None:
        data = bytearray((work / name).read_bytes())
        data[-1] ^= 1
        (work / name).write_bytes(data)

    return flip


def _lose(work: Path) -> None:
    (work / "block-00001.safetensors").unlink()


def _garble(work: Path) -> None:
    (work / "state.json").write_text('{"identity": {}')


def _miscount(work: Path) -> None:
    text = (work / "state.json").read_text()
    (work / "state.json").write_text(text.replace('"blocks": 2', '"blocks": 3'))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut_short, "stream-1-behind-2 is damaged"),
        (_flip("stream-0-behind-2"), "stream-0-behind-2 is damaged"),
        (_flip("block-00000.safetensors"), "block-00000.safetensors is damaged"),
        (_lose, "block-00001.safetensors is damaged"),
        (_garble, "state.json: not valid JSON"),
        (_miscount, "block-00002.safetensors is damaged"),
    ],
    ids=["cut short", "stream", "block", "lost", "state", "count"],
)
def test_a_damaged_save_is_not_trusted(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    told: str,
) -> None:
    once = quantized(model, tmp_path / "once")
    work = tmp_path / "work"
    killed_behind(2, model, work)
    damage(work)
    with caplog.at_level(logging.WARNING):
        assert quantized(model, tmp_path / "again", work=work) == once
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("quantize: starting again from the first block; ") and told in line


@pytest.mark.parametrize("what", ["model", "text", "parameters", "version of compress"])
def test_a_save_of_something_else_is_not_trusted(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    work, how = tmp_path / "work", {"tokens": WINDOWS, "params": GPTQ}
    killed_behind(2, model, work, **how)
    if what == "model":
        model = tmp_path / "other"
        save_tiny(model, "llama", num_hidden_layers=DEPTH, rope_theta=5000.0)
    elif what == "text":
        how["tokens"] = tokens(4, seed=1)
    elif what == "parameters":
        how["params"] = GPTQ.model_copy(update={"bits": 4})
    else:
        monkeypatch.setattr(resume, "__version__", "0")
    once = quantized(model, tmp_path / "once", **how)
    assert quantized(model, tmp_path / "again", work=work, **how) == once
    assert f"{work} was saved with another {what}" in caplog.text


def test_no_save_fills_the_disk(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    quantized(model, tmp_path / "out", work=tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())
    (record,) = caplog.records
    assert "0.0 GiB are free and a save wants" in record.getMessage()


def test_a_line_says_where_it_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_behind(2, model, tmp_path / "work")
    monkeypatch.setattr(display, "_LINE_EVERY_SECONDS", 0)
    progress.install(display.Bars())
    try:
        quantized(model, tmp_path / "again", work=tmp_path / "work")
    finally:
        progress.install(None)
    told = f"  quantize: from 3 of {DEPTH}, resumed"
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == told
    assert second.startswith(f"{told} 3/{DEPTH}, about ")


def test_killed_from_outside_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    save_project(tmp_path, CONFIG, num_hidden_layers=8)
    done = compress(tmp_path, "run", "tiny.yaml", "--store", "once")
    assert done.returncode == 0, done.stderr
    sign = "killed/store/.work-quantize-*/stream-1-behind-3"
    kill(tmp_path, sign, "run", "tiny.yaml", "--store", "killed", python=OFTEN)
    (work,) = (tmp_path / "killed/store").glob(".work-quantize-*")
    assert json.loads((work / "state.json").read_text())["blocks"] >= 2
    again = compress(tmp_path, "run", "tiny.yaml", "--store", "killed")
    assert again.returncode == 0, again.stderr
    (first,) = (tmp_path / "once/store").glob("quantize-*")
    (second,) = (tmp_path / "killed/store").glob("quantize-*")
    assert hashes(first) == hashes(second)
    assert not work.exists()
