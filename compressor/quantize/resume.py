"""What a killed quantization goes on from: its finished blocks and the streams behind the last.

`state.json` is replaced last and names every file with its sha256, so a save is there whole or
not at all. The streams of the save before are deleted after it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from compressor import __version__
from compressor.artifact import canonical, sync
from compressor.errors import SelectionError
from compressor.fetch import fingerprint_folder
from compressor.quantize import METHODS, GridParams
from compressor.quantize.formats import Grids
from compressor.quantize.grid import QuantizedWeight
from compressor.quantize.results import BlockResult
from compressor.quantize.teacher import Teacher
from compressor.records import Record
from compressor.sources import file_digest
from compressor.targets import text_digest

EVERY_SECONDS = 60.0
"""No save comes sooner after another, so that what takes less saves nothing."""
SHARE = 20
"""Seconds of work that go by for each that the last save took: saves take 5 % at most."""
PENDING_BYTES = 2**25
"""Finished blocks in memory above this size are written ahead of the save that names them."""

log = logging.getLogger(__name__)
_STATE = "state.json"


class _State(Record):
    """state.json: whose save it is, how many blocks are done, the sha256 of each file."""

    identity: dict[str, Any]
    blocks: int
    files: dict[str, str]


class Saves:
    """The work folder of one walk; without a folder nothing is saved or found."""

    def __init__(
        self, folder: Path | None = None, identity: Callable[[], dict[str, Any]] = dict
    ) -> None:
        """Save into `folder`; `identity` says what decides the results, when that is needed."""
        self._folder, self._identity = folder, identity
        self._pending: list[BlockResult] = []
        self._files: dict[str, str] = {}
        self._due = time.monotonic() + EVERY_SECONDS

    def restore(self, streams: Sequence[Tensor]) -> int:
        """Put the streams (N, T, D) behind the last saved block; returns how many are done.

        0, with a line that says why, for a save that is damaged or of other inputs.
        """
        if self._folder is None or not (self._folder / _STATE).exists():
            return 0
        try:
            state = _State.load(self._folder / _STATE)
            fault = self._fault(state, len(streams))
        except SelectionError as error:
            fault = str(error)
        if fault:
            log.warning("quantize: starting again from the first block; %s", fault)
            (self._folder / _STATE).unlink()
            return 0
        self._files = {_block(index): state.files[_block(index)] for index in range(state.blocks)}
        for index, stream in enumerate(streams):
            with (self._folder / _stream(index, state.blocks)).open("rb") as file:
                file.readinto(_bytes(stream))
        return state.blocks

    def blocks(self, grids: Grids) -> Iterator[BlockResult]:
        """Yield the results of the blocks that `restore` found."""
        for name in list(self._files):
            assert self._folder
            yield _read(self._folder / name, grids)

    def add(self, result: BlockResult, streams: Sequence[Tensor]) -> None:
        """Take one more block, behind which the streams stand, and save where it is due."""
        if self._folder is None:
            return
        self._pending.append(result)
        size = sum(w.integers.nbytes for each in self._pending for w in each.weights.values())
        due = time.monotonic() >= self._due
        if not due and size <= PENDING_BYTES:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        needed = 2 * (size + sum(stream.nbytes for stream in streams))
        if free < needed:
            log.warning(
                "quantize: %s: %.1f GiB are free and a save wants %.1f, so there are no more; make "
                "room, or a run that is killed does all of this again",
                self._folder, free / 2**30, needed / 2**30,
            )  # fmt: skip
            self._folder = None
            return
        for each in self._pending:
            self._write(_block(len(self._files)), _packed(each))
        self._pending = []
        if due:
            self._save(streams)

    def _save(self, streams: Sequence[Tensor]) -> None:
        assert self._folder
        began, done, blocks = time.monotonic(), len(self._files), dict(self._files)
        for index, stream in enumerate(streams):
            self._write(_stream(index, done), _bytes(stream))
        draft = self._folder / ".part"
        _State(identity=self._identity(), blocks=done, files=self._files).save(draft)
        for name in (*self._files, draft.name):
            sync(self._folder / name)
        os.replace(draft, self._folder / _STATE)
        sync(self._folder)
        for path in self._folder.iterdir():
            if path.name not in (*self._files, _STATE):
                path.unlink()
        self._files = blocks
        now = time.monotonic()
        self._due = now + max(EVERY_SECONDS, SHARE * (now - began))

    def _write(self, name: str, data: bytes | memoryview) -> None:
        assert self._folder
        with (self._folder / name).open("wb") as file:
            file.write(data)
        self._files[name] = hashlib.sha256(data).hexdigest()

    def _fault(self, state: _State, streams: int) -> str | None:
        """Why a save cannot be gone on from, None where it can."""
        assert self._folder
        own = json.loads(canonical(self._identity()))
        for name in own.keys() | state.identity.keys():
            if own.get(name) != state.identity.get(name):
                return f"{self._folder} was saved with another {name}"
        names = [_block(index) for index in range(state.blocks)]
        for name in names + [_stream(index, state.blocks) for index in range(streams)]:
            path = self._folder / name
            if not path.is_file() or file_digest(path) != state.files.get(name):
                return f"{path} is damaged"
        return None


def identity_of(
    source: Path,
    tokens: Tensor | None,
    method: str,
    params: GridParams,
    teacher: Teacher | None,
    device: str,
    batch_size: int,
) -> dict[str, Any]:
    """All that decides what a walk comes to, but the number of threads; reads the models once."""
    row = {"name": method, "version": METHODS[method].version}
    aim = teacher and [fingerprint_folder(teacher.folder), list(teacher.kept)]
    return {
        "version of compress": __version__,
        "version of torch": torch.__version__,
        "device": device,
        "model": fingerprint_folder(source),
        "text": None if tokens is None else text_digest(tokens),
        "method": row,
        "parameters": params.model_dump(mode="json"),
        "teacher": aim,
        "batch size": batch_size,
    }


def _packed(result: BlockResult) -> bytes:
    """A block's results as a safetensors file."""
    tensors = {f"dense {name}": tensor for name, tensor in result.dense.items()}
    for name, weight in result.weights.items():
        tensors |= {f"integers {name}": weight.integers, f"scale {name}": weight.scale}
        if weight.zero_point is not None:
            tensors[f"zero_point {name}"] = weight.zero_point
    told = {"report": result.report, "drift": result.drift, "dense": list(result.dense)}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(whole, {"told": json.dumps(told)})


def _read(path: Path, grids: Grids) -> BlockResult:
    """The results that `_packed` wrote, in their order, which is that of the report."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["told"])
        names = set(file.keys())
        weights = {}
        for name, row in told["report"].items():
            zero = f"zero_point {name}"
            weights[name] = QuantizedWeight(
                file.get_tensor(f"integers {name}"),
                file.get_tensor(f"scale {name}"),
                file.get_tensor(zero) if zero in names else None,
                grids[name],
                row["damp"],
            )
        dense = {name: file.get_tensor(f"dense {name}") for name in told["dense"]}
    return BlockResult(weights, told["report"], told["drift"], dense)


def _bytes(stream: Tensor) -> memoryview:
    return stream.view(-1).view(torch.uint8).numpy().data


def _block(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _stream(index: int, blocks: int) -> str:
    return f"stream-{index}-behind-{blocks}"
