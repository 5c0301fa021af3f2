"""A checkpoint folder: read lazily, tensor by tensor; written streaming, shard by shard.

Only safetensors is read. Pickled weights can run code when opened and are refused.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.families import SHIPPED
from compressor.spool import DTYPES, Spool

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 * 2**30
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WEIGHTS = ("*.safetensors", INDEX, *_PICKLES, "*.gguf")
_CODE = Path(__file__).parent / "shallow"
_REPORTS = ("manifest.json", "metrics.jsonl", "sparsity.json", "width.json")
_NOT_CARRIED = ("config.json", "README.md", ".gitattributes", *_REPORTS)


class Checkpoint:
    """A Hugging Face folder, checked when opened, read tensor by tensor.

    Raises `CheckpointError` for a missing config or shard, a truncated shard, an
    index that points outside the folder, and pickled weights.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the folder and check its index and the length of every shard."""
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        self._shards = self._find_shards()
        self._open: dict[Path, Any] | None = None
        self.entries: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for shard in self._shards:
            for name, (dtype, shape) in read_header(shard).items():
                self.entries[name] = (shard, dtype, shape)

    def _find_shards(self) -> list[Path]:
        if (self.folder / INDEX).exists():
            listed = read_json(self.folder / INDEX).get("weight_map", {})
            shards = sorted({self._inside(str(name)) for name in listed.values()})
        elif (self.folder / SINGLE).exists():
            shards = [self.folder / SINGLE]
        else:
            pickles = [p.name for pattern in _PICKLES for p in self.folder.glob(pattern)]
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickles[0]}), which can run code when "
                "opened; convert them with transformers: save_pretrained(safe_serialization=True)"
                if pickles
                else f"{self.folder}: no {SINGLE} and no {INDEX}"
            )
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"{shard}: listed in {INDEX} but missing; download it again")
        return shards

    def _inside(self, name: str) -> Path:
        if Path(name).name != name:
            raise CheckpointError(
                f"{self.folder / INDEX}: shard {name!r} points outside the folder; "
                "shards are plain file names beside the index"
            )
        return self.folder / name

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self.entries[name][2]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored."""
        dtype = self.entries[name][1]
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.folder}: {name} has dtype {dtype}, which is not read")
        return DTYPES[dtype]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that holds most of the floating-point weights."""
        sizes: dict[torch.dtype, int] = {}
        for name, (_, _, shape) in self.entries.items():
            dtype = self.stored_dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + _count(shape)
        return max(sizes, key=lambda d: sizes[d])

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, memory-mapped, as stored."""
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: no tensor named {name!r}")
        shard = self.entries[name][0]
        if self._open is not None:
            if shard not in self._open:
                self._open[shard] = safe_open(shard, framework="pt")
            return self._open[shard].get_tensor(name)
        with safe_open(shard, framework="pt") as file:
            return file.get_tensor(name)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read the header of each shard once for all tensors of a `with` block.

        Their pages stay mapped until the last of these tensors is gone, so keep a block short.
        """
        before, self._open = self._open, {} if self._open is None else self._open
        try:
            yield
        finally:
            self._open = before

    @property
    def quantized(self) -> bool:
        """Whether the linears are stored as integers."""
        return "quantization_config" in self.config

    @property
    def shares(self) -> bool:
        """Whether some block runs a sublayer with the weights of another block."""
        return self.config.get("model_type") in SHIPPED and bool(self.config.get("reused"))

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config: all that a cut must carry over.

        Code is not among them: where a format needs some, the writer adds ours.
        """
        left = {p for pattern in (*_WEIGHTS, "*.py") for p in self.folder.glob(pattern)}
        return sorted(
            p
            for p in self.folder.iterdir()
            if p.is_file() and p not in left and p.name not in _NOT_CARRIED
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.stat().st_size for shard in self._shards)


class CheckpointWriter:
    """Writes a checkpoint one tensor at a time; memory is bounded by one tensor.

    Use as a context manager; the index appears only on a clean exit.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write into `folder`, starting a new shard at `shard_bytes`."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._limit = shard_bytes
        self._pending = Spool(self.folder)
        self._written: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; full shards go to disk."""
        tensor = tensor.detach().to("cpu").contiguous()
        if self._pending.names and self._pending.nbytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending.add(name, tensor)
        self._total += tensor.nbytes

    def finish(self, config: dict[str, Any], side_files: list[Path]) -> None:
        """Write the last shard, the index, the config, its code and copies of the side files."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._shard(0).rename(self.folder / SINGLE)
        else:
            weight_map: dict[str, str] = {}
            for i, names in enumerate(self._written):
                final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
                self._shard(i).rename(self.folder / final)
                weight_map |= dict.fromkeys(names, final)
            write_json(
                self.folder / INDEX,
                {"metadata": {"total_size": self._total}, "weight_map": weight_map},
            )
        write_json(self.folder / "config.json", config)
        for path in (*code_files(config), *side_files):
            shutil.copyfile(path, self.folder / path.name)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pending.close()

    def _shard(self, index: int) -> Path:
        return self.folder / f".shard-{index:05d}"

    def _flush(self) -> None:
        if self._pending.names:
            self._pending.save(self._shard(len(self._written)))
            self._written.append(self._pending.names)
            self._pending.close()
            self._pending = Spool(self.folder)


def code_files(config: dict[str, Any]) -> list[Path]:
    """The files of ours that a checkpoint with this config.json carries, most have none."""
    return [_CODE / name for name in SHIPPED.get(config.get("model_type", ""), ())]


def read_header(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {name: (dtype, shape)} of a safetensors file, checking its length."""
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{shard}: not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    actual = shard.stat().st_size
    if actual != expected:
        raise CheckpointError(
            f"{shard}: {actual} bytes, but its header promises {expected}; "
            "the file is truncated or damaged, fetch it again"
        )
    return {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, saying which file is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and a final newline: equal values, equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
