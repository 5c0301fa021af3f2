"""Memory: gathered into huge pages it holds what it held; freed, it is kept only inside."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compressor import memory
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


def test_freed_memory_is_kept_inside_and_given_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    library = SimpleNamespace(
        mallopt=lambda *option: calls.append(option), malloc_trim=lambda pad: calls.append((pad,))
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    with memory.freed_memory_kept():
        assert calls == [(-1, 2**31 - 1), (-4, 0)]  # never trimmed, nothing mapped
    assert calls[2:] == [(-1, 2**26), (-4, 2**16), (0,)]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    with memory.freed_memory_kept():
        pass
