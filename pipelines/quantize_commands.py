"""`compress allocate` and `compress quantize`: one width for all, or a budget of bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipelines import config as configuration
from pipelines.verbs import alone, read_yaml

_SHARED = ("group_size", "symmetric", "format")
"""Parameters that allocate and quantize must agree on."""

_BUDGET = ("average_bits", "max_bytes", "widths")
BY = click.option(
    "--by", metavar="NAME",
    help="Choose widths by fisher (default), or by a score times measured errors: lim, zd, dlp, "
    "relevance or any other score of blocks.",
)  # fmt: skip


def _budget(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `quantize` the options of a budget, in the words of `allocate`."""
    fields = configuration.methods("allocate")["fisher"].params.model_fields
    for name in reversed(_BUDGET):
        flag, said = f"--{name.replace('_', '-')}", fields[name].description
        command = click.option(flag, help=f"Mixed widths: {said}.")(command)
    return BY(command)


@alone("allocate", "calibration", own=("method", "score"))
@BY
def allocate(**params: Any) -> dict[str, Any]:
    """Choose how many bits each linear of MODEL gets on a budget; writes bits.json.

    \b
    compress allocate MODEL --average-bits 3.5 --group-size 64 --text corpus.txt -o widths
    compress allocate MODEL --max-bytes 90MB --by relevance --text corpus.txt -o widths
    compress quantize MODEL --scheme widths/bits.json --text corpus.txt
    """
    return {"stages": allocation(params, params.pop("by", "fisher"))}


@alone("quantize", "calibration")
@_budget
def quantize(scheme: Any = None, by: str | None = None, **params: Any) -> dict[str, Any]:
    """Store the linears of MODEL in few bits, in a file that runtimes load, and say which do.

    One width for all (--bits), your own (--scheme), or the widths that lose least on a budget
    (--average-bits or --max-bytes).

    \b
    compress quantize MODEL --bits 4 --group-size 64 --text corpus.txt -o model-4bit
    compress quantize MODEL --average-bits 3.5 --text corpus.txt -o model-mixed
    compress quantize MODEL --max-bytes 90MB --text corpus.txt -o model-90mb
    compress quantize MODEL --bits 4 --scheme widths.yaml --text corpus.txt -o model-own
    """
    budget = {name: params.pop(name) for name in _BUDGET if name in params}
    if (by or "widths" in budget) and not budget.keys() - {"widths"}:
        raise click.UsageError("--by and --widths need --average-bits or --max-bytes")
    if budget and "bits" in params:
        raise click.UsageError("--bits is one width for all: give it or a budget, not both")
    shared = {name: params[name] for name in _SHARED if name in params}
    stages = allocation(budget | shared, by or "fisher") if budget else []
    if isinstance(scheme, str):
        scheme = read_yaml(Path(scheme), "--scheme")
    return {"stages": [*stages, {"quantize": params | ({"scheme": scheme} if scheme else {})}]}


def allocation(params: dict[str, Any], by: str) -> list[dict[str, Any]]:
    """The stages that spend a budget by a method of `allocate` or by a score."""
    if by in configuration.methods("score"):
        return [{"score": [by]}, {"allocate": {"method": "importance", "score": by, **params}}]
    return [{"allocate": {"method": by, **params}}]
