"""A run in several processes (torchrun, accelerate launch): rank 0 does all but the training.

Every process walks the same plan. What rank 0 makes, the others wait for in the store; a
stage in `SHARED` they make together, and rank 0 commits it. When one process fails the
launcher ends the others, so that nobody waits for what will not come.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED = ("heal",)
"""Verbs whose function runs in all processes."""

_LOOK_EVERY_SECONDS = 0.2


def rank() -> int:
    """Number of this process, 0 when it is the only one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is thrown away, for a stage that another process commits."""
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        yield Path(folder)


def wait_until(there: Callable[[], bool]) -> None:
    """Look again and again."""
    while not there():
        time.sleep(_LOOK_EVERY_SECONDS)
