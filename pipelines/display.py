"""What the person at the terminal sees: bars while it works, one table at the end.

Everything here goes to standard error; standard output is for results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from compressor import progress
from compressor.artifact import Store
from pipelines import table
from pipelines.plan import Stage
from pipelines.run import Event

console = Console(stderr=True)
_LINE_EVERY_SECONDS = 15
_WIDE = 124  # columns that hold the summary upright; below, stages stand side by side


def stdout() -> Console:
    """Standard output, wide enough for a table where it is not a terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=160)


class Bars:
    """Draws bars on a terminal and plain lines into a log file."""

    @contextmanager
    def task(self, label: str, total: float, done: float = 0) -> Iterator[progress.Task]:
        """Open a bar with an estimate of the time left, from this run's pace."""
        if done:
            label = f"{label}: from {done + 1:.0f} of {total:.0f}, resumed"
        if not console.is_terminal:
            if done:
                console.print(f"  {label}", highlight=False)
            yield _Lines(label, total, done)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield _Bar(bars, bars.add_task(label, total=total, completed=int(done), note=""))


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._bars.advance(self._task, steps)
        if note:
            self._bars.update(self._task, note=note)


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, label: str, total: float, done: float) -> None:
        self._label, self._total, self._done, self._before = label, total, done, done
        self._began = self._last = time.monotonic()

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_SECONDS:
            return
        self._last = now
        pace = (now - self._began) / (self._done - self._before)
        left = pace * (self._total - self._done)
        line = f"  {self._label} {self._done:.0f}/{self._total:.0f}, about {left:.0f} s left"
        console.print(f"{line} {note}".rstrip(), highlight=False)


def announce(event: Event, stage: Stage) -> None:
    """One line per stage."""
    words = {
        "cached": "[dim]= {} is there already[/]",
        "start": "[bold]> {}[/] [dim]{}[/]",
        "damaged": "[yellow]! {} was damaged: set aside, building it again[/]",
        "done": "",
    }[event]
    if words:
        console.print(words.format(stage.label, stage.method), highlight=False)


def print_plan(stages: list[Stage], store: Store, to: Console) -> None:
    """The stages in order, what is cached and what will run."""
    grid = Table(box=None, pad_edge=False)
    for heading in ("stage", "method", "key", "state"):
        grid.add_column(heading)
    for stage in stages:
        status = store.status(stage.verb, stage.key)
        state = {"cached": "[green]there already[/]", "missing": "will run"}.get(
            status, "[yellow]damaged: will run again[/]"
        )
        grid.add_row(stage.label, stage.method, stage.key[:16], state)
    to.print(grid)


def print_summary(record: dict[str, Any], to: Console) -> None:
    """The table at the end of a run, its protocol, what healing closed, where the exports are."""
    rows = table.rows(record)
    if not rows:
        _print_last(record["stages"][-1], to)
        return
    lines = [list(table.HEADINGS.values()), *(table.cells(row) for row in rows)]
    if to.width < _WIDE:
        lines = [list(column) for column in zip(*lines, strict=True)]
    grid = Table(title=record["name"], box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(lines[0]):
        grid.add_column(heading, justify="right" if index else "left")
    for line in lines[1:]:
        grid.add_row(*line)
    to.print(grid)
    to.print(table.protocol(record), highlight=False)
    if closed := table.healing(record):
        to.print(closed, highlight=False)
    for told in table.added_loss(record):
        to.print(told, highlight=False)
    for stage in record["stages"]:
        parity = stage["metrics"].get("onnx", {}).get("parity")
        if parity:
            to.print(f"ONNX against torch: {parity['summary']}", highlight=False)
    for name, folder in record["exports"].items():
        to.print(f"{name}: {folder}", highlight=False, soft_wrap=True)


def _print_last(stage: dict[str, Any], to: Console) -> None:
    """What a verb that ran alone has to say: its figures and its folder."""
    figures = {"seconds": stage["seconds"], "peak": table.size(stage["peak_bytes"])}
    for name, value in {**stage["metrics"], **figures}.items():
        lines = value if isinstance(value, dict) else {}
        to.print(f"{name}: {'' if lines else _shown(value)}".rstrip(), highlight=False)
        width = max(map(len, lines), default=0)
        for part, each in lines.items():
            to.print(f"  {part:{width}}  {_shown(each)}", highlight=False, soft_wrap=True)
    to.print(f"folder: {stage['folder']}", highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
