"""A parent's outputs on disk: what the files hold, and how a student's training reads them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import rms_norm

from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint
from compressor.decoder import skeleton
from compressor.errors import CheckpointError
from compressor.families import native_config
from compressor.lineage import Sketch
from compressor.model import load_tokenizer
from compressor.records import Record

RECORD = "teacher.json"
Dtype = Literal["float16", "bfloat16", "float32"]


class TeacherRecord(Record):
    """What the files hold, and of which parent and text.

    Attributes:
        num_blocks, vocab_size, width: L, V and D of the parent.
        tokenizer: sha256 of its vocabulary; None for a parent without one.
        blocks: the parent's, as `sketch` has them, to know them again.
        windows, length: N and T of the text.
        text: sha256 of its tokens.
        per_shard: windows in a file.
        teacher_dtype: of every stored float.
        top_k: how many of the likeliest tokens are told apart; None for all.
        hidden: blocks whose outputs are stored.
    """

    num_blocks: int
    vocab_size: int
    width: int
    tokenizer: str | None
    blocks: Sketch
    windows: int
    length: int
    text: str
    per_shard: int
    teacher_dtype: Dtype
    top_k: int | None
    hidden: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of every stored float."""
        dtype: torch.dtype = getattr(torch, self.teacher_dtype)
        return dtype

    @property
    def window_bytes(self) -> int:
        """Bytes of a window: T (V + H D) floats; with top_k T (k + 1 + H D) and T k int32."""
        logits = self.vocab_size if self.top_k is None else self.top_k + 1
        floats = logits + self.width * len(self.hidden)
        return self.length * (floats * self.dtype.itemsize + 4 * (self.top_k or 0))

    def shard(self, start: int) -> str:
        """The file that begins with window `start`; its name says which windows are in it."""
        return f"windows-{start:06d}-{min(start + self.per_shard, self.windows):06d}.safetensors"


@dataclass(frozen=True)
class Targets:
    """What the parent says of some windows, in the dtype that it is stored in.

    Attributes:
        logits: (B, T, V) less their maximum, or `buckets` of them at the k highest.
        indices: (B, T, k), which tokens those are; None when all are there.
        hidden: block -> its `normalised` output, (B, T, D).
    """

    logits: Tensor
    indices: Tensor | None
    hidden: dict[int, Tensor]


class Teacher:
    """Reads the outputs of a parent, window by window, from mapped files."""

    def __init__(self, folder: Path) -> None:
        """Open what `compressor.teacher.cache` wrote into `folder`."""
        self.folder = folder
        self.record: TeacherRecord = TeacherRecord.load(folder / RECORD)

    def targets(self, rows: list[int], device: torch.device | str = "cpu") -> Targets:
        """What the parent says of the windows at `rows` of its text."""
        hidden = self.record.hidden
        return Targets(
            self._read("logits", rows).to(device),
            self._read("indices", rows).to(device).long() if self.record.top_k else None,
            {block: self._read(f"hidden.{block}", rows).to(device) for block in hidden},
        )

    def _read(self, name: str, rows: list[int]) -> Tensor:
        return torch.stack([self._window(name, row) for row in rows])

    def _window(self, name: str, row: int) -> Tensor:
        """A view that keeps its file mapped: no longer, or all that was ever read is resident."""
        place = row % self.record.per_shard
        with safe_open(self.folder / self.record.shard(row - place), framework="pt") as file:
            window: Tensor = file.get_slice(name)[place]
        return window


def normalised(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, float32: a stream as the next norm will see it."""
    return rms_norm(x.float(), x.shape[-1:])


def buckets(logits: Tensor, indices: Tensor | None) -> Tensor:
    """Logits (..., V) as they are, or those at `indices` (..., k) and the others as one behind.

    That one is their logsumexp, so a softmax over the k + 1 gives each of the k its probability
    and the last what is left. Keeps the gradient.
    """
    if indices is None:
        return logits
    others = logits.scatter(-1, indices, torch.finfo(logits.dtype).min)
    return torch.cat([logits.gather(-1, indices), others.logsumexp(-1, keepdim=True)], -1)


def text_digest(tokens: Tensor) -> str:
    """Sha256 of windows (N, T)."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def vocabulary_digest(folder: Path) -> str | None:
    """Sha256 of a tokenizer's words and their ids, None where there is no tokenizer."""
    try:
        vocabulary = load_tokenizer(folder).get_vocab()
    except CheckpointError:
        return None
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def check_student(record: TeacherRecord, student: Path) -> None:
    """Raise `CheckpointError` unless a parent of this record can teach `student`.

    They must have the same vocabulary and tokenizer, and the parent no fewer blocks. The parent
    may be quantized: its outputs are what its integers compute.
    """
    size = native_config(Checkpoint(student).config).get("vocab_size")
    tokenizer, depth = vocabulary_digest(student), len(Blocks(skeleton(student)))
    fault = None
    if size != record.vocab_size:
        fault = f"its vocabulary has {size} tokens, its parent's {record.vocab_size}"
    elif None not in (tokenizer, record.tokenizer) and tokenizer != record.tokenizer:
        fault = "its tokenizer is not its parent's"
    elif depth > record.num_blocks:
        fault = f"it has {depth} blocks, its parent only {record.num_blocks}"
    if fault:
        raise CheckpointError(f"{student}: {fault}; give the parent that it was cut from")
