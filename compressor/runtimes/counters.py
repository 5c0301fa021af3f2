"""What the system counts beside time: energy used, and waiting for a processor."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
SCHEDULE = Path("/proc/thread-self/schedstat")


def seconds_waited() -> float:
    """How long this thread was ready to run while others had the processors; 0 where unknown."""
    try:
        return int(SCHEDULE.read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def joules() -> float | None:
    """Joules used since some fixed moment: all CPU packages (RAPL) and all GPUs (NVML).

    None where neither can be read: RAPL needs a machine that is not virtual, and often root.
    A package's counter starts anew every few minutes of full load; such a difference is negative.
    """
    packages = [_microjoules(p) for p in sorted(POWERCAP.glob("intel-rapl:*[0-9]/energy_uj"))
                if p.parent.name.count(":") == 1]  # fmt: skip
    found = [value / 1e6 for value in packages if value is not None]
    if nvml := _nvml():
        devices = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        found += [nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3 for device in devices]
    return sum(found) if found else None


def _microjoules(counter: Path) -> int | None:
    try:
        return int(counter.read_text())
    except OSError:  # root only, on most machines
        return None


@functools.cache
def _nvml() -> Any:
    """NVIDIA's management library, None where it is missing or no GPU of it counts energy."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError:
        return None
    return nvml
