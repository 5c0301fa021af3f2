"""Prune: remove blocks structurally; the result needs no code of ours."""

from __future__ import annotations

from compressor.methods import Method, Params


class BlocksParams(Params):
    """Removing blocks has no parameters beside the selection."""


METHODS = {
    "blocks": Method(
        "compressor.prune.blocks:prune",
        BlocksParams,
        "remove whole blocks, renumber the rest, cut every per-layer array of the config",
        "arXiv:2403.17887 section 3.2",
        "one copy of the weights, tensor by tensor",
        ("selection",),
    ),
}
