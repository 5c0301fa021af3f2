"""Which way a selection is removed: in the native architecture where it can express the result."""

from __future__ import annotations

from pathlib import Path

from compressor.checkpoint import read_json
from compressor.errors import NotApplicable
from compressor.families import SHIPPED
from compressor.prune import blocks, nemotron_nas, sublayers
from compressor.records import Selection


def prune(source: Path, selection: Selection, out: Path, *, flavour: str) -> None:
    """Write `source` into `out` without what the selection names, streaming.

    Raises what the chosen way raises, and `NotApplicable` for a `nemotron-nas` source.
    """
    family = read_json(source / "config.json").get("model_type", "")
    if family in nemotron_nas.MADE:
        raise NotApplicable(
            f"{source}: a {family} checkpoint is made for servers and not cut again; cut the one "
            "it was made from"
        )
    if flavour == "nemotron-nas":
        nemotron_nas.prune(source, selection, out)
    elif flavour == "auto" and not selection.sublayers and family not in SHIPPED:
        blocks.prune(source, selection, out)
    else:
        sublayers.prune(source, selection, out, native=flavour == "auto")
