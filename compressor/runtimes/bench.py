"""Benchmarks: every measurement in a process of its own, in turns, beside the roofline."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor import progress
from compressor.errors import InferenceError
from compressor.runtimes import Target
from compressor.runtimes.base import Facts
from compressor.runtimes.measure import check_room, rates, spread
from compressor.runtimes.roofline import bandwidth, weight_bytes

FORMAT = 1
_ROOT = Path(__file__).parents[2]
_WEIGHTS = (".safetensors", ".onnx", ".data", ".onnx_data")


@dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
        prompt_tokens, new_tokens: of every round; batch 1, greedy, a fixed random prompt.
        repeats: rounds per case, each in a fresh process.
        threads: thread counts to try.
        device: `auto`, `cpu` or `cuda`.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    threads: tuple[int, ...] = (1,)
    device: str = "auto"


@dataclass(frozen=True)
class Case:
    """One row: a name, and what it runs."""

    label: str
    target: Target


Answer = dict[str, Any]
Measure = Callable[[Target, Settings, int], Answer]


def bench(cases: Sequence[Case], settings: Settings, measure: Measure | None = None) -> Answer:
    """Measure every case with every thread count, `repeats` times, all in turns.

    Turns spread whatever else the machine does over all cases alike. Memory's bandwidth is
    measured in every turn too; the best one counts. Raises `InferenceError` where a round does not
    fit into a context, before anything runs, and where a process breaks off.
    """
    measure = measure or in_fresh_process
    for case in cases:
        check_room(Facts.of(case.target.folder), settings.prompt_tokens + settings.new_tokens)
    weights = {case: weight_bytes(case.target) for case in cases}
    found: dict[tuple[Case, int], list[Answer]] = {}
    speeds: dict[int, list[float]] = {}
    total = settings.repeats * len(settings.threads) * len(cases)
    with progress.task("bench", total) as bar:
        for _ in range(settings.repeats):
            for threads in settings.threads:
                speeds.setdefault(threads, []).append(bandwidth(threads))
                for case in cases:
                    answer = measure(case.target, settings, threads)
                    found.setdefault((case, threads), []).append(answer)
                    bar.advance(1, f"{case.label}, {threads} threads")
    return {
        "format": FORMAT,
        "machine": machine(),
        "settings": asdict(settings),
        "bandwidth": {str(threads): spread(each) for threads, each in speeds.items()},
        "rows": [
            _row(case, threads, answers, weights[case], max(speeds[threads]))
            for (case, threads), answers in found.items()
        ],
    }


def in_fresh_process(target: Target, settings: Settings, threads: int) -> Answer:
    """One round of a target in a new Python, which is told its thread count by every means."""
    asked = {
        "folder": str(target.folder.resolve()),
        "runtime": target.runtime,
        "device": settings.device,
        "threads": threads,
        "rounds": {
            "prompt_tokens": settings.prompt_tokens,
            "new_tokens": settings.new_tokens,
            "repeats": 1,
        },
    }
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "compressor.runtimes.measure", json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: Answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        answer = {"error": f"{target.folder}: {target.runtime} broke off ({last})"}
    if "error" in answer:
        raise InferenceError(answer["error"])
    return answer


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder, links followed, the folders in it left out."""
    files = [p for p in folder.iterdir() if p.name.endswith(_WEIGHTS)]
    return sum(p.stat().st_size for p in files)


def machine() -> dict[str, Any]:
    """The processor and how many threads it runs."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [l for l in cpuinfo.read_text().splitlines() if l.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {"processor": name or platform.machine(), "cores": os.cpu_count()}


def _row(
    case: Case, threads: int, answers: list[Answer], weights: int, bytes_per_second: float
) -> Answer:
    """One case's figures; a step reads the weights, and on average the middle round's cache."""
    new = answers[0]["new_tokens"]
    prompt = answers[0]["prompt_tokens"]
    per_token = answers[0]["cache_bytes"] / (prompt + new)
    read = weights + per_token * (prompt + (new + 1) / 2)
    decode = rates(new, [s for a in answers for s in a["decode"]])
    running = [s for a in answers for s in (*a["prefill"], *a["decode"])]
    energy = [j / new for a in answers for j in a["joules"]]
    floor = bytes_per_second / read
    return {
        "label": case.label,
        "folder": str(case.target.folder),
        "runtime": case.target.runtime,
        "device": answers[0]["device"],
        "threads": threads,
        "bytes": weight_file_bytes(case.target.folder),
        "load_seconds": spread([a["load_seconds"] for a in answers]),
        "first_token_seconds": spread([a["first"] for a in answers]),
        "prefill": rates(prompt, [s for a in answers for s in a["prefill"]]),
        "decode": decode,
        "peak_bytes": max(a["peak_bytes"] for a in answers),
        "bytes_per_token": round(read),
        "roofline": floor,
        "roofline_multiple": floor / decode["median"],
        "waited": sum(a["waited"] for a in answers) / sum(running),
        "joules_per_token": spread(energy) if energy else None,
    }
