"""Memory, as the system counts it."""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python has no name for
_HUGE = 2 * 2**20

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, and what glibc starts with
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_MAX: 2**16}


def reset_peak() -> None:
    """Start measuring peak memory anew, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak() -> int:
    """Peak resident bytes of this process since `reset_peak`, mapped files included."""
    if found := from_proc("/proc/self/status", "VmHWM"):
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for what is allocated next (glibc), and give it back at the end.

    Large tensors are otherwise mapped anew each time, and the system clears every page of them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt:
        yield
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            mallopt(option, value)
        release()


def release() -> None:
    """Give freed memory back to the system where the C library keeps it for itself (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def use_huge_pages() -> None:
    """Gather this process's own memory into pages of 2 MB, where Linux does that when told to.

    Weights that a step streams through are then read faster: fewer address translations miss, and
    the processor's prefetching, which ends with a page, runs longer.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    for line in maps.read_text().splitlines():
        span, mode, _, _, inode = line.split()[:5]
        first, last = (int(end, 16) for end in span.split("-"))
        first, last = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if mode == "rw-p" and inode == "0" and first < last:  # refused is as good as not asked
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _COLLAPSE)


def from_proc(path: str, name: str) -> int:
    """Bytes of a line of a Linux status file; 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def import_for_good(name: str) -> ModuleType:
    """A module, its libraries hidden from the garbage collector, which would search them in vain.

    torch and transformers are some million objects that stay to the end.
    """
    if name not in sys.modules:
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            gc.freeze()
            gc.enable()
    return sys.modules[name]
