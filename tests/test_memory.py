"""Freed memory stays with the process where that is asked for, and only there."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from compressor import memory

MISSING = not hasattr(ctypes.CDLL(None), "mallopt")
PAGES = 2**26 // resource.getpagesize()


def faults() -> int:
    """Pages that the system cleared for a tensor of 64 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(MISSING, reason="not glibc")
def test_freed_memory_is_used_again_inside_and_given_back_after() -> None:
    with memory.freed_memory_kept():
        faults()
        assert faults() < PAGES / 10
    assert faults() > PAGES / 2 and faults() > PAGES / 2


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with memory.freed_memory_kept():
        pass
