"""Memory gathered into huge pages holds what it held."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from compressor.memory import from_proc, use_huge_pages

ROLLUP = "/proc/self/smaps_rollup"


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
    if not gathered:
        pytest.skip("this system gathers no pages when told to")
    assert gathered >= 12 * 2**20  # all but what stands before and behind whole pages
