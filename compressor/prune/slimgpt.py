"""SlimGPT: optimal brain surgery on whole heads and channels, in a model that stays native."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blocks import weight_of
from compressor.checkpoint import CheckpointWriter, write_json
from compressor.decoder import Decoder
from compressor.errors import CompressError, UnsupportedArchitecture
from compressor.inputs import input_gram
from compressor.moments import energies
from compressor.prune.brain_surgery import remove_units
from compressor.prune.sparse import open_dense
from compressor.prune.width import Branch, Sizes, branches, narrowed, sizes_of
from compressor.walk import Step, Stream, walk

REPORT = "width.json"


def slimgpt(
    source: Path,
    out: Path,
    tokens: Tensor,
    *,
    ratio: float,
    attention_ratio: float | None,
    multiple: int,
    damp: float,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Remove key-value groups (with their query heads) and FFN channels of every block.

    Which ones go, and how the columns of o_proj and down_proj that stay make up for them, is
    optimal brain surgery on the inputs of these two matrices (SlimGPT, arXiv:2412.18110 section
    3); the matching rows of q, k, v, gate and up go with them. tokens (N, T). Every matrix sees
    inputs made by what was pruned before it. A native config has one width for all blocks, so the
    ratio is the same at every depth (the paper's grows with it). `width.json` in `out` holds what
    went and the relative error of each output. Returns the new widths.
    Raises `NotApplicable` for blocks that do not split into heads and channels and
    `UnsupportedArchitecture` when the model that transformers builds from the result differs.
    """
    decoder = open_dense(source, device)
    sizes = sizes_of(decoder)
    for index in range(len(decoder.blocks)):
        branches(decoder, index, sizes)
    share = ratio if attention_ratio is None else attention_ratio
    new = narrowed(decoder, sizes, ratio=ratio, attention_ratio=share, multiple=multiple)
    checkpoint = decoder.reader.checkpoint
    stream = Stream(decoder, tokens, batch_size)
    done: set[str] = set()
    report: list[dict[str, Any]] = []
    with CheckpointWriter(out) as writer:
        for slim, row in _blocks(stream, sizes, new, damp):
            for name, tensor in slim.items():
                writer.add(name, tensor)
            done |= slim.keys()
            report.append(row)
        for name in checkpoint.names:
            if name not in done:
                writer.add(name, checkpoint.tensor(name))
        config = checkpoint.config | new.config(decoder.model.config)
        writer.finish(config, checkpoint.side_files)
    _check(out, stream, device)
    write_json(out / REPORT, {"before": vars(sizes), "after": vars(new), "blocks": report})
    return vars(new)


def _blocks(
    stream: Stream, sizes: Sizes, new: Sizes, damp: float
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """(stored name -> narrower tensor, what went and what it cost) of block after block."""
    for step in walk(stream, "slimgpt"):
        attention, ffn = branches(stream.decoder, step.index, sizes)
        slim: dict[str, Tensor] = {}
        row: dict[str, Any] = {}
        for branch, left, unit in (
            (attention, new.groups, "groups"),
            (ffn, new.channels, "channels"),
        ):
            if left < branch.count:
                units, error = _narrow_(step, branch, left, damp)
                slim |= _slices(stream.decoder, branch, units)
                gone = sorted({*range(branch.count)} - {*units.tolist()})
                row |= {f"removed_{unit}": gone, f"{branch.output}_error": error}
        yield slim, row


def _narrow_(step: Step, branch: Branch, left: int, damp: float) -> tuple[Tensor, float]:
    """Units that stay and the relative output error; the resident output matrix is compensated.

    Its columns that go are zeroed, which is what removing them does, and the others are rounded
    to the dtype they will be stored in, so the blocks to come see what the result will compute.
    """
    decoder = step.stream.decoder
    name = f"{branch.path}.{branch.output}"
    linear = decoder.model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    weight, gram = linear.weight.data, input_gram(step, name, linear)
    try:
        units, compensated = remove_units(weight, gram, branch.size, branch.count - left, damp)
    except CompressError as fault:
        raise CompressError(f"{name}: {fault}") from fault
    slim = torch.zeros_like(weight)
    stored = decoder.reader.checkpoint.stored_dtype(_stored(decoder, name))
    slim[:, branch.columns(units)] = compensated.to(stored).to(weight.dtype)
    lost, whole = (energies(w.double(), gram.double()).sum() for w in (slim - weight, weight))
    error = lost / whole.clamp(min=1e-300)
    weight.copy_(slim)
    return units.cpu(), float(error.sqrt())


def _slices(decoder: Decoder, branch: Branch, units: Tensor) -> dict[str, Tensor]:
    """The branch's narrower tensors: rows as stored, bit for bit, and compensated columns."""
    checkpoint = decoder.reader.checkpoint
    slim: dict[str, Tensor] = {}
    for linear in branch.feeding:
        for kind in ("weight", "bias"):
            stored = decoder.reader.locate(f"{branch.path}.{linear}.{kind}")
            if stored:
                rows = branch.rows_of(linear, units)
                slim[stored] = checkpoint.tensor(stored)[rows]
    output = f"{branch.path}.{branch.output}"
    stored, weight = _stored(decoder, output), weight_of(decoder.model.get_submodule(output))
    columns = branch.columns(units).to(weight.device)
    slim[stored] = weight[:, columns].to(checkpoint.stored_dtype(stored))
    return slim


def _stored(decoder: Decoder, linear: str) -> str:
    stored = decoder.reader.locate(f"{linear}.weight")
    assert stored is not None
    return stored


def _check(out: Path, stream: Stream, device: str) -> None:
    """What transformers builds from the result must end the first window where the walk did.

    The same sums in another order differ by far less than the root of the dtype's precision.
    """
    again = Stream(Decoder(out, device), stream.tokens[:1])
    for _ in walk(again, "check"):
        pass
    expected = stream.x[:1].float()
    off = float((again.x.float() - expected).norm() / expected.norm())
    limit = torch.finfo(stream.decoder.dtype).eps ** 0.5
    if not off < limit:
        raise UnsupportedArchitecture(
            f"{type(stream.decoder.model).__name__} computes something else with fewer heads or "
            f"channels (its states differ by {off:.2g}, expected below {limit:.2g}); use "
            "prune: blocks on this family"
        )
