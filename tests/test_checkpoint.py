"""Checkpoint folders: sound ones round-trip, unsound ones are named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compressor.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointWriter
from compressor.errors import CheckpointError
from compressor.spool import DTYPES

TENSORS = {f"t{i}": torch.arange(i * 10, i * 10 + 10).half() for i in range(5)}


def write(folder: Path, shard_bytes: int = 2**20) -> Path:
    (folder / "side").mkdir(parents=True)
    (folder / "side/tokenizer.json").write_text("{}")
    out = folder / "out"
    with CheckpointWriter(out, shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.finish({"model_type": "llama"}, [folder / "side/tokenizer.json"])
    return out


@pytest.mark.parametrize(("shard_bytes", "shards"), [(2**20, 1), (45, 3), (1, 5)])
def test_round_trip(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    out = write(tmp_path, shard_bytes)
    assert len(list(out.glob("*.safetensors"))) == shards
    assert (out / INDEX).exists() is (shards > 1)
    checkpoint = Checkpoint(out)
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.shape(name) == (10,)
    assert checkpoint.dtype == torch.float16
    for report in ("manifest.json", "metrics.jsonl", "sparsity.json", "width.json"):
        (out / report).write_text("{}")  # of the stage that wrote it, not of a later one
    assert [p.name for p in checkpoint.side_files] == ["tokenizer.json"]
    assert not checkpoint.quantized


def test_a_shard_is_opened_once_for_all_tensors_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(write(tmp_path))
    plain = {name: checkpoint.tensor(name) for name in checkpoint.names}
    opens: list[Path] = []

    def counted(path: Path, framework: str) -> Any:
        opens.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("compressor.checkpoint.safe_open", counted)
    with checkpoint.opened():
        for name, tensor in plain.items():
            with checkpoint.opened():
                assert torch.equal(checkpoint.tensor(name), tensor)
    assert len(plain) > len(opens) == len(set(opens)) == 1
    checkpoint.tensor(next(iter(plain)))
    assert len(opens) == 2


@pytest.mark.parametrize("most", [5, 2**31])
def test_every_dtype_reads_back_from_an_aligned_file(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, so that nothing is aligned by chance; read back by safetensors' own loader."""
    tensors = {
        f"{code}{size}": torch.arange(size).view(shape).to(dtype)
        for size, shape in ((3, (3,)), (0, (2, 0)), (1, ()))
        for code, dtype in reversed(DTYPES.items())
    }
    send = os.sendfile  # the kernel's own limit is 2 GiB at a time
    monkeypatch.setattr(os, "sendfile", lambda a, b, at, size: send(a, b, at, min(size, most)))
    with CheckpointWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({"model_type": "llama"}, [])
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / SINGLE, framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert {path.name for path in tmp_path.iterdir()} == {SINGLE, "config.json"}
    for _, (start, _), size in offsets(tmp_path / SINGLE):
        assert not start % size


def offsets(path: Path) -> list[tuple[str, list[int], int]]:
    """(name, offsets, bytes of a number) of every tensor."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    return [(n, e["data_offsets"], DTYPES[e["dtype"]].itemsize) for n, e in header.items()]


def test_an_aborted_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.add("a", torch.ones(2))
        writer.add("b", torch.ones(2))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    out = write(tmp_path, 45)
    next(out.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*missing"):
        Checkpoint(out)


@pytest.mark.parametrize("cut", [1, 40])
def test_truncated_shard(tmp_path: Path, cut: int) -> None:
    shard = write(tmp_path) / SINGLE
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="its header promises"):
        Checkpoint(shard.parent)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    shard = write(tmp_path) / SINGLE
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint(shard.parent)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    out = write(tmp_path)
    (out / INDEX).write_text(json.dumps({"weight_map": {"t0": name}}))
    with pytest.raises(CheckpointError, match="points outside the folder"):
        Checkpoint(out)


def test_pickles_are_refused_with_a_remedy(tmp_path: Path) -> None:
    out = write(tmp_path)
    (out / SINGLE).rename(out / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights .* convert them"):
        Checkpoint(out)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_bad_config(tmp_path: Path, text: str) -> None:
    out = write(tmp_path)
    (out / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: (not valid|expected a) JSON"):
        Checkpoint(out)


def test_unknown_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor named 'nope'"):
        Checkpoint(write(tmp_path)).tensor("nope")
