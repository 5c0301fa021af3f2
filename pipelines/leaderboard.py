"""A comparison for people: one row per choice with a map of what goes, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from compressor.errors import MissingDependency
from compressor.records import Selection

HEADINGS = (
    "choice", "loss", "added", "perplexity", "KL", "top-1", "forwards", "seconds", "what goes",
)  # fmt: skip
_LEGEND = "█ block, ▀ attention, ▄ feed-forward gone, ○ run with another block's weights, · kept"


def describe(selection: Selection) -> str:
    """What goes, in a few words: `blocks 13-18, ffn 3`."""
    named = {
        name: ranges(getattr(selection, f"drop_{name}")) for name in ("blocks", "attention", "ffn")
    }
    return ", ".join(f"{name} {text}" for name, text in named.items() if text) or "nothing removed"


def ranges(indices: list[int]) -> str:
    """`3,13-18` for [3, 13, 14, 15, 16, 17, 18]."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def map_of(parts: Mapping[str, Any]) -> str:
    """One character per block, in order."""
    marks = {"blocks": "█", "attention": "▀", "ffn": "▄"}
    cells = ["·"] * parts["num_blocks"]
    for kind in ("attention", "ffn"):
        for index in parts[f"reuse_{kind}"]:
            cells[int(index)] = "○"
    for kind, mark in marks.items():
        for index in parts[f"drop_{kind}"]:
            cells[index] = mark
    return "".join(cells)


def cells(board: Mapping[str, Any]) -> list[list[str]]:
    """The rows in words, in the order of `HEADINGS`; the original first."""
    first = {"choice": "(nothing removed)", **board["original"], "added": 0.0}
    return [_cells(row) for row in (first, *board["rows"])]


def _cells(row: Mapping[str, Any]) -> list[str]:
    spent, seconds = row.get("evaluations"), row.get("seconds")
    perplexity = math.exp(min(row["loss"], 700))
    return [
        row["choice"],
        f"{row['loss']:.3f}",
        f"{row['added']:+.3f}",
        f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}",
        f"{row['kl']:.3f}",
        f"{100 * row['top1_agreement']:.1f} %",
        "-" if spent is None else f"{spent:.1f}",
        "-" if seconds is None else f"{seconds:.1f}",
        map_of(row["parts"]) if "parts" in row else "",
    ]


def notes(board: Mapping[str, Any]) -> list[str]:
    """What the table rests on, and what could not be made."""
    found = [
        f"loss in nats per token on held-out text before healing; forwards and seconds are what "
        f"each choice took beside the scores ({board['score_seconds']:.1f} s for all)",
        _LEGEND,
    ]
    return found + [f"not possible: {row['choice']}: {row['reason']}" for row in board["failed"]]


def show(board: Mapping[str, Any], to: Console) -> None:
    """Print the leaderboard."""
    grid = Table(title=board["name"], box=SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        left = heading in ("choice", "what goes")
        grid.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in cells(board):
        grid.add_row(*row)
    to.print(grid)
    for note in notes(board):
        to.print(note, highlight=False)


def markdown(board: Mapping[str, Any]) -> str:
    """The leaderboard as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|"]
    for *words, drawn in cells(board):
        lines.append(f"| {' | '.join(words)} | {f'`{drawn}`' if drawn else ''} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(board))]) + "\n"


def plot(board: Mapping[str, Any], path: Path) -> None:
    """Draw what goes, block by block, beside the loss it adds; raises `MissingDependency`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise MissingDependency("matplotlib", "plot", "drawing the leaderboard") from None
    rows = board["rows"]
    figure = Figure(figsize=(11, 1.2 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    parts, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        for part, base, height in (
            ("blocks", 0.0, 0.8),
            ("attention", 0.0, 0.4),
            ("ffn", 0.4, 0.4),
        ):
            for index in row["parts"][f"drop_{part}"]:
                corner = (index - 0.45, y - 0.4 + base)
                parts.add_patch(Rectangle(corner, 0.9, height, color=_COLOURS[part]))
    parts.set_xlim(-0.5, board["num_blocks"] - 0.5)
    parts.set_yticks(range(len(rows)), [row["choice"] for row in rows])
    parts.set_ylim(len(rows) - 0.4, -0.6)
    parts.set_xlabel("block removed (upper half: attention, lower half: feed-forward)")
    drawn = bars.barh(range(len(rows)), [row["added"] for row in rows], color=_COLOURS["bar"])
    bars.bar_label(drawn, fmt="%.2f", padding=3)
    bars.margins(x=0.2)
    bars.set_xlabel("added loss, nats per token")
    bars.set_xlim(left=min(0.0, *(row["added"] for row in rows)))
    figure.savefig(path, dpi=120, metadata={"Software": None})


_CELLS = {"blocks": (-0.4, 0.8), "attention": (-0.4, 0.4), "ffn": (0.0, 0.4)}
_COLOURS = {"blocks": "#333333", "attention": "#c2571a", "ffn": "#1a6fc2", "bar": "#7a7a7a"}
