"""Memory, as the system counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def from_proc(path: str, name: str) -> int:
    """Bytes of a line of a Linux status file; 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
