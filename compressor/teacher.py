"""The outputs of a parent over a text, computed once by the walk and kept on disk.

A student is trained against these files, so the parent is never in memory beside it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.decoder import Decoder
from compressor.errors import ArtifactError, CompressError, SelectionError
from compressor.lineage import sketch
from compressor.targets import (
    RECORD,
    Dtype,
    TeacherRecord,
    buckets,
    check_student,
    normalised,
    text_digest,
    vocabulary_digest,
)
from compressor.walk import Stream, storage, walk

SHARD_BYTES = 2**28
"""A file holds this much, or one batch of windows where that is more."""
WALK_TOKENS = 2**16
"""Tokens that go through the blocks together: a block is read from disk once for so many."""
HEAD_TOKENS = 256
"""Tokens whose float32 logits exist at once."""


def cache(
    parent: Path,
    out: Path,
    work: Path,
    tokens: Tensor,
    *,
    teacher_dtype: Dtype,
    top_k: int | None,
    hidden: tuple[int, ...],
    student: Path | None = None,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Write what `parent` says of windows (N, T) into `out`, as `compressor.targets` reads it.

    One walk per 65536 tokens; a file is written whole into `work` and linked into `out`, so a
    killed run goes on behind its last file and ends in the same bits. Raises before the walk:
    `SelectionError` for blocks or a `top_k` beyond the parent's, `CheckpointError` for a `student`
    that is not its child, `ArtifactError` when the disk is too small. Raises `CompressError` for
    logits that are not finite.
    """
    decoder = Decoder(parent, device)
    record = _record(
        decoder, tokens, batch_size, teacher_dtype=teacher_dtype, top_k=top_k, hidden=hidden
    )
    if student:
        check_student(record, student)
    work.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(tokens), record.per_shard)
    missing = [start for start in starts if not (work / record.shard(start)).exists()]
    forecast = record.window_bytes * len(tokens)
    _check_disk(work, forecast, len(missing) / len(starts))
    together = max(1, WALK_TOKENS // (record.per_shard * record.length))
    for i in range(0, len(missing), together):
        group = missing[i : i + together]
        windows = torch.cat([tokens[start : start + record.per_shard] for start in group])
        stream = Stream(decoder, windows, batch_size)
        files = _files(stream, record, f"teacher ({_size(forecast)} on disk)")
        for start, tensors in zip(group, files, strict=True):
            _write(tensors, work / record.shard(start))
    for start in starts:
        _link(work / record.shard(start), out / record.shard(start))
    record.save(out / RECORD)
    return {"windows": record.windows, "tokens": tokens.numel(), "bytes": forecast}


def _record(
    decoder: Decoder,
    tokens: Tensor,
    batch_size: int,
    *,
    teacher_dtype: Dtype,
    top_k: int | None,
    hidden: tuple[int, ...],
) -> TeacherRecord:
    folder, depth = decoder.reader.checkpoint.folder, len(decoder.blocks)
    x = decoder.embed(tokens[:1, :1])
    record = TeacherRecord(
        num_blocks=depth,
        vocab_size=decoder.logits(x).shape[-1],
        width=x.shape[-1],
        tokenizer=vocabulary_digest(folder),
        blocks=sketch(folder),
        windows=len(tokens),
        length=tokens.shape[1],
        text=text_digest(tokens),
        per_shard=batch_size,
        teacher_dtype=teacher_dtype,
        top_k=top_k,
        hidden=hidden,
    )
    wrong = [block for block in hidden if not 0 <= block < depth]
    if wrong:
        raise SelectionError(f"hidden {wrong}: {folder} has the blocks 0 to {depth - 1}")
    if top_k is not None and top_k >= record.vocab_size:
        raise SelectionError(
            f"top_k {top_k}: the vocabulary of {folder} has {record.vocab_size} tokens; leave it "
            "out to keep them all"
        )
    # Whole batches, so that a window's numbers do not depend on where a run was killed.
    batches = max(1, SHARD_BYTES // (record.window_bytes * batch_size))
    return record.model_copy(update={"per_shard": batches * batch_size})


def _files(stream: Stream, record: TeacherRecord, label: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after the other, from one walk over all of their windows."""
    hidden = {block: storage(tuple(stream.x.shape), record.dtype) for block in record.hidden}
    for step in walk(stream, label):
        if step.index in hidden:
            for rows, _, x in step.advance():
                hidden[step.index][rows] = normalised(x).to(record.dtype)
    for start in range(0, len(stream.tokens), record.per_shard):
        rows = slice(start, start + record.per_shard)
        windows = [_logits(stream.decoder, x, record) for x in stream.x[rows]]
        tensors = {name: torch.stack([each[name] for each in windows]) for name in windows[0]}
        yield tensors | {f"hidden.{block}": x[rows].clone() for block, x in hidden.items()}


def _logits(decoder: Decoder, x: Tensor, record: TeacherRecord) -> dict[str, Tensor]:
    """`logits` and `indices` of one window's final stream (T, D), a few tokens at a time."""
    logits, indices = [], []
    for part in x.split(HEAD_TOKENS):
        z = decoder.logits(part[None])[0]
        # The same distribution, with what is likely near 0, where floats are dense.
        z = z - z.amax(-1, keepdim=True)
        if z.isnan().any():
            raise CompressError(
                f"{decoder.reader.checkpoint.folder}: its logits overflow in {decoder.dtype}; "
                "compute in float32 (device: cpu), or check the checkpoint for damage"
            )
        if record.top_k:
            chosen = z.topk(record.top_k).indices
            z = buckets(z, chosen)
            indices.append(chosen.int().cpu())
        logits.append(z.clamp(min=torch.finfo(record.dtype).min).to(record.dtype).cpu())
    told = {"logits": torch.cat(logits)}
    return told | ({"indices": torch.cat(indices)} if indices else {})


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file whole or not at all."""
    draft = path.with_suffix(".part")
    save_file(tensors, draft)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def _link(path: Path, to: Path) -> None:
    """A second name for the file: the first keeps it until the artifact is committed."""
    try:
        os.link(path, to)
    except OSError:  # a file system without links
        shutil.copyfile(path, to)


def _check_disk(folder: Path, forecast: int, missing: float) -> None:
    free = shutil.disk_usage(folder).free
    if missing * forecast > free:
        raise ArtifactError(
            f"{folder}: the parent's outputs take {_size(missing * forecast)}, but only "
            f"{_size(free)} are free; set heal.top_k: 64, give fewer healing windows, or put the "
            "store elsewhere"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
