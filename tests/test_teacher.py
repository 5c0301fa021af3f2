"""A parent's outputs on disk: its own, as large as forecast, whole after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM

from compressor import teacher
from compressor.errors import (
    ArtifactError,
    CheckpointError,
    CompressError,
    SelectionError,
)
from compressor.heal import DistillParams
from compressor.heal.distillation import (
    divergence,
)
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.targets import Teacher, normalised
from tests.healing import WINDOWS
from tests.tiny import save_tiny, save_tokenizer


def cached(folder: Path, **own: Any) -> tuple[dict[str, Any], Path]:
    """What folder/parent says of the windows, in folder/teacher."""
    out = folder / "teacher"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    asked: dict[str, Any] = {"teacher_dtype": "float32", "top_k": None, "hidden": ()} | own
    report = teacher.cache(
        folder / "parent", out, folder / "teacher-work", WINDOWS, batch_size=1, **asked
    )
    return report, out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_the_outputs_are_the_models_own(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", family)
    _, out = cached(tmp_path, hidden=(0, 2))
    with torch.no_grad():
        expected = model(WINDOWS, output_hidden_states=True)
    found = Teacher(out).targets([4, 0, 5])
    z = expected.logits[[4, 0, 5]]
    torch.testing.assert_close(found.logits, z - z.amax(-1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert sorted(found.hidden) == [0, 2]
    for block, x in found.hidden.items():
        own = normalised(expected.hidden_states[block + 1][[4, 0, 5]])
        torch.testing.assert_close(x, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-6), ("bfloat16", 1e-4)])
def test_what_rounding_costs(dtype: str, limit: float, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", "llama")
    report, out = cached(tmp_path, teacher_dtype=dtype)
    assert report["bytes"] == 6 * 16 * 96 * 2
    with torch.no_grad():
        logits = model(WINDOWS).logits.double()
    stored = Teacher(out).targets(list(range(6))).logits.double()
    assert 0 < divergence(stored, logits).mean() < limit


def test_the_likeliest_and_the_rest(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", "llama")
    report, out = cached(tmp_path, top_k=5, hidden=(1,))
    assert report["bytes"] == 6 * 16 * (4 * 6 + 4 * 5 + 4 * 32)
    with torch.no_grad():
        p = softmax(model(WINDOWS).logits, -1)
    found = Teacher(out).targets(list(range(6)))
    assert found.indices is not None
    assert torch.equal(found.indices, p.topk(5).indices)
    kept = softmax(found.logits, -1)
    torch.testing.assert_close(kept[..., :5], p.topk(5).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[..., 5], 1 - p.topk(5).values.sum(-1), rtol=1e-4, atol=1e-5)


def test_the_forecast_is_what_the_files_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    monkeypatch.setattr(teacher, "SHARD_BYTES", 2 * 16 * 100 * 4)
    report, out = cached(tmp_path, hidden=(3,))
    files = sorted(out.glob("*.safetensors"))
    assert [f.stem for f in files] == [f"windows-{i:06d}-{i + 1:06d}" for i in range(6)]
    headers = 6 * 300
    assert 0 <= sum(f.stat().st_size for f in files) - report["bytes"] < headers


def test_a_full_disk_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: small)
    monkeypatch.setattr(teacher, "walk", None)
    with pytest.raises(ArtifactError, match=r"take 0\.00 GiB, but only 0\.00 GiB are free; set"):
        cached(tmp_path)


def test_outputs_that_overflow_are_not_stored(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", "llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    model.save_pretrained(tmp_path / "parent")
    with pytest.raises(CompressError, match=r"parent: its logits overflow in torch\.float32"):
        cached(tmp_path)
    assert not list((tmp_path / "teacher").iterdir())


def test_killed_outputs_go_on_behind_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    monkeypatch.setattr(teacher, "SHARD_BYTES", 1)
    monkeypatch.setattr(teacher, "WALK_TOKENS", 32)
    _, out = cached(tmp_path)
    whole = {f.name: f.read_bytes() for f in out.iterdir()}
    shutil.rmtree(tmp_path / "teacher-work")
    write, written = teacher._write, []

    def killed(tensors: dict[str, Tensor], path: Path) -> None:
        if len(written) == 3:
            path.with_suffix(".part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        write(tensors, path)

    monkeypatch.setattr(teacher, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path)
    monkeypatch.setattr(teacher, "_write", lambda t, p: (written.append(p.name), write(t, p)))
    _, out = cached(tmp_path)
    assert len(written) == len(set(written)) == 6
    assert {f.name: f.read_bytes() for f in out.iterdir()} == whole


def test_what_the_parent_has_not_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "parent", "llama")
    with pytest.raises(SelectionError, match=r"hidden \[4\]: .* has the blocks 0 to 3"):
        cached(tmp_path, hidden=(1, 4))
    with pytest.raises(SelectionError, match=r"top_k 96: .* has 96 tokens"):
        cached(tmp_path, top_k=96)
    with pytest.raises(ValueError, match="top_k keeps the mass of the rest for tau 1 only"):
        DistillParams(top_k=5, tau=2.0)
    with pytest.raises(ValueError, match="reset_documents: the parent has read"):
        DistillParams(reset_documents=True)


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ({"vocab_size": 97}, "its vocabulary has 97 tokens, its parent's 96; give the parent"),
        ({"num_hidden_layers": 5}, "it has 5 blocks, its parent only 4; give the parent"),
    ],
)
def test_a_stranger_is_refused_before_the_walk(
    child: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    save_tiny(tmp_path / "source", "llama", **child)
    monkeypatch.setattr(teacher, "walk", None)
    with pytest.raises(CheckpointError, match=message):
        cached(tmp_path, student=tmp_path / "source")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for name in ("parent", "source"):
        save_tiny(tmp_path / name, "llama")
        save_tokenizer(tmp_path / name)
    cached(tmp_path, student=tmp_path / "source")
    path = tmp_path / "source/tokenizer.json"
    path.write_text(path.read_text().replace('"w3": 3', '"x3": 3'))
    with pytest.raises(CheckpointError, match="its tokenizer is not its parent's"):
        cached(tmp_path, student=tmp_path / "source")


def test_a_quantized_parent_teaches_what_it_computes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "whole", "llama")
    (tmp_path / "parent").mkdir()
    quantize(tmp_path / "whole", tmp_path / "parent", None, "rtn", RtnParams(group_size=16))
    _, out = cached(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent")
    with torch.no_grad():
        z = model(WINDOWS).logits
    expected = z - z.amax(-1, keepdim=True)
    found = Teacher(out).targets(list(range(6))).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
