"""Memory gathered into huge pages holds what it held."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from compressor.memory import from_proc, use_huge_pages

ROLLUP = "/proc/self/smaps_rollup"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gathers() -> bool:
    """Whether this is a Linux of 6.1 or later that has huge pages."""
    known = SETTING.exists() and "[never]" not in SETTING.read_text()
    return known and tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 1)


@pytest.mark.skipif(not gathers(), reason="this system gathers no pages when told to")
def test_huge_pages_hold_what_was_there() -> None:
    with mmap.mmap(-1, 16 * 2**20, flags=mmap.MAP_PRIVATE) as held:
        held.madvise(mmap.MADV_NOHUGEPAGE)
        numbers = np.frombuffer(held, np.int32)
        numbers[:] = np.arange(len(numbers))
        held.madvise(mmap.MADV_HUGEPAGE)
        before = from_proc(ROLLUP, "AnonHugePages")
        use_huge_pages()
        gathered = from_proc(ROLLUP, "AnonHugePages") - before
        np.testing.assert_array_equal(numbers, np.arange(len(numbers)))
        del numbers
    assert gathered > 0
