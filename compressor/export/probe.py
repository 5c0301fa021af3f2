"""Looking inside an exported graph: where it first differs from the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compressor.blocks import Blocks
from compressor.inputs import outputs_of
from compressor.runtimes.session import MODEL, Session, floats

_PROBE = ".probe.onnx"


@contextmanager
def probed(folder: Path, names: tuple[str, ...] = ()) -> Iterator[Session]:
    """The graph in `folder` computed in its own dtype (accuracy_level 0), for a `with` block.

    `names` are modules whose outputs it gives too. The weights are those of the folder.
    """
    model = ir.load(folder / MODEL)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        model.graph.outputs.extend(v for v in node.outputs if v.name in names)
    ir.save(model, folder / _PROBE)
    try:
        yield Session(folder, model=_PROBE)
    finally:
        (folder / _PROBE).unlink()


@torch.inference_mode()
def first_difference(model: Any, folder: Path, ids: Tensor, tolerance: float) -> str:
    """Name the first module, in the order of computation, whose output differs.

    Compared are the embedding, every attention, every feed-forward and the logits, each in
    units of the largest value of the model's own output; ids (1, S).
    """
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, output: Tensor) -> None:
        seen[name] = output.float().numpy()

    blocks = Blocks(model)
    watched = {"model.embed_tokens": model.get_input_embeddings()}
    for index in range(len(blocks)):
        watched |= blocks.attention(index) | blocks.ffn(index)
    with outputs_of(watched, keep):
        seen["logits"] = model(ids).logits.float().numpy()
    with probed(folder, tuple(watched)) as session:
        inside = session.values(ids.numpy())
    for name in (name for name in (*watched, "logits") if name in inside):
        own, other = seen[name], floats(inside[name])
        worst = np.abs(other - own).max() / max(np.abs(own).max(), 1e-30)
        if not worst <= tolerance:
            place = "the final norm or the head" if name == "logits" else name
            return f"{place} (off by {worst:.1e} of its largest output)"
    return "no module in a single forward; the cache or the padding"
