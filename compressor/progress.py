"""Progress without a display: the library reports, the command line draws.

As with `logging`, the library speaks to whatever reporter is installed in the
current context; by default nobody listens and `track` costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Task(Protocol):
    """One running bar."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Move on by `steps`, replacing the note beside the bar."""


class Reporter(Protocol):
    """Whatever draws bars."""

    def task(self, label: str, total: float, done: float = 0) -> AbstractContextManager[Task]:
        """Open a bar of `total` steps, some done by an earlier run, for a `with` block."""


class _Silent:
    def advance(self, steps: float = 1, note: str = "") -> None:
        """Ignore the report."""


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


def install(reporter: Reporter | None) -> None:
    """Send all reports of this context to `reporter`."""
    _reporter.set(reporter)


def task(label: str, total: float, done: float = 0) -> AbstractContextManager[Task]:
    """Open a bar, or nothing where nobody listens."""
    reporter = _reporter.get()
    return reporter.task(label, total, done) if reporter else nullcontext(_Silent())


def track(items: Iterable[T], label: str, total: int, done: int = 0) -> Iterator[T]:
    """Yield the items and advance a bar after each."""
    with task(label, total, done) as bar:
        for item in items:
            yield item
            bar.advance()
