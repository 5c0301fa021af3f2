"""Freed memory stays with the process where that is asked for, and only there."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from compressor import memory


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
