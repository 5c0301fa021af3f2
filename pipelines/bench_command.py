"""`compress bench`: speed, memory and size of models side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from compressor import progress
from compressor.errors import ConfigError, InferenceError, did_you_mean
from compressor.runtimes import RUNTIMES, find
from compressor.runtimes.bench import Case, Settings
from compressor.runtimes.bench import bench as run_bench
from pipelines import display, table
from pipelines.commands import JSON, QUIET, STORE
from pipelines.plan import CHECKPOINTS
from pipelines.runs import read_run

HEADINGS = (
    "model", "runtime", "threads", "size", "load s", "first token s", "prefill tok/s",
    "decode tok/s", "vs first", "roofline", "below it", "peak", "J/token",
)  # fmt: skip


_BUSY = 0.05  # share of waiting from which the rates say more of others than of the model


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="FOLDER|RUN...")
@click.option(
    "--runtime",
    "runtimes",
    default="auto",
    show_default=True,
    help="Names joined by commas: torch, onnxruntime, genai. auto takes what fits.",
)
@click.option("--threads", default="1", show_default=True, help="Counts joined by commas.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds per row, each in a fresh process, rows in turns.",
)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@STORE
@JSON
@click.option("--markdown", is_flag=True, help="As a Markdown table.")
@QUIET
def bench(
    models: tuple[str, ...],
    runtimes: str,
    threads: str,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    device: str,
    store: Path,
    as_json: bool,
    markdown: bool,
    quiet: bool,
) -> None:
    """Time FOLDERs, ours or not, or every stage of a finished RUN against its original.

    Beside each decode rate stands its roofline: memory's speed, measured in the same run, over
    the bytes that a token must read.

    \b
    compress bench exported model --runtime torch,onnxruntime --threads 1,2
    compress bench demo
    """
    cases = find_cases(models, runtimes.split(","), store)
    settings = Settings(prompt_tokens, new_tokens, repeats, _counts(threads), device)
    if not quiet:
        progress.install(display.Bars())
        _print_plan(cases, settings)
    report = run_bench(cases, settings)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif markdown:
        click.echo(as_markdown(report))
    else:
        _print_report(report)


def find_cases(models: Sequence[str], runtimes: Sequence[str], store: Path) -> list[Case]:
    """A case per folder, or stage of a run, and runtime that runs it.

    Raises `ConfigError` for an unknown runtime, `ArtifactError` for neither a folder nor a run.
    """
    for name in runtimes:
        if name not in RUNTIMES and name != "auto":
            raise ConfigError(f"--runtime {name}: none such{did_you_mean(name, RUNTIMES)}")
    names = [Path(model).name for model in models]
    cases = []
    for model, name in zip(models, names, strict=True):
        label = name if name and names.count(name) == 1 else model
        if Path(model).is_dir():
            cases += [Case(label, find(Path(model), runtime)) for runtime in runtimes]
        else:
            cases += _run_cases(model, runtimes, store)
    return cases


def _run_cases(name: str, runtimes: Sequence[str], store: Path) -> list[Case]:
    """Checkpoints and exports of a run, each in those of the runtimes that run it."""
    cases = []
    for stage in read_run(name, store)["stages"]:
        if stage["verb"] not in (*CHECKPOINTS, "export"):
            continue
        label = "original" if stage["verb"] == "model" else stage["label"]
        for runtime in runtimes:
            try:
                cases.append(Case(label, find(Path(stage["folder"]), runtime)))
            except InferenceError:  # a checkpoint has no graph, an export may lack safetensors
                continue
    if not cases:
        raise ConfigError(f"{name}: no stage of this run runs in {', '.join(runtimes)}")
    return cases


def cells(report: dict[str, Any]) -> list[list[str]]:
    """The rows in words, in the order of `HEADINGS`."""
    first = {row["threads"]: row["decode"]["median"] for row in reversed(report["rows"])}
    return [
        [
            row["label"],
            row["runtime"] + (f" ({row['device']})" if row["device"] != "cpu" else ""),
            str(row["threads"]),
            table.size(row["bytes"]),
            table.rate(row["load_seconds"], 1),
            table.rate(row["first_token_seconds"], 2),
            table.rate(row["prefill"], 0),
            table.rate(row["decode"], 1),
            f"{row['decode']['median'] / first[row['threads']]:.2f}",
            f"{row['roofline']:.0f}",
            f"{row['roofline_multiple']:.1f} x",
            table.size(row["peak_bytes"]),
            table.rate(row["joules_per_token"], 2) if row["joules_per_token"] else "-",
        ]
        for row in report["rows"]
    ]


def as_markdown(report: dict[str, Any]) -> str:
    """The table and its protocol in Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(report)]
    return "\n".join([*lines, "", protocol(report)])


def protocol(report: dict[str, Any]) -> str:
    """What the figures rest on, and whether other work disturbed them."""
    asked, machine = report["settings"], report["machine"]
    speeds = ", ".join(
        f"{each['max'] / 1e9:.1f} GB/s with {threads} thread{'s' if threads != '1' else ''}"
        for threads, each in report["bandwidth"].items()
    )
    said = (
        f"{machine['processor']}, {machine['cores']} cores; a prompt of {asked['prompt_tokens']} "
        f"tokens and {asked['new_tokens']} new ones, batch 1; median ± farthest of "
        f"{asked['repeats']} rounds, each in a fresh process, in turns. Load counts importing the "
        "runtime; first token is that of the first request. Roofline: memory read at its best "
        f"({speeds}) over the weights and cache that a token reads."
    )
    waited = max(row["waited"] for row in report["rows"])
    if waited > _BUSY:
        said += (
            f" The machine was busy: up to {100 * waited:.0f} % of the time a process waited for "
            "a processor, so read the ratios and not the rates."
        )
    return said


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(f"--threads {text}: expected counts such as 1 or 1,2")
    return counts


def _print_plan(cases: Sequence[Case], settings: Settings) -> None:
    grid = Table(box=None, pad_edge=False)
    for heading in ("model", "runtime", "folder"):
        grid.add_column(heading)
    for case in cases:
        grid.add_row(case.label, case.target.runtime, str(case.target.folder))
    display.console.print(grid)
    total = len(cases) * len(settings.threads) * settings.repeats
    display.console.print(f"{total} fresh processes, one after the other", highlight=False)


def _print_report(report: dict[str, Any]) -> None:
    rows, out = cells(report), display.stdout()
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        grid.add_column(heading, justify="right" if index > 1 else "left")
    for row in rows:
        grid.add_row(*row)
    out.print(grid)
    out.print(protocol(report), highlight=False)
