"""What scores cost beside a bare forward over the same windows, in one process.

python benchmarks/score_walk.py MODEL TEXT [--windows 8 --length 512 --repeats 3 --cpu]

The bare forward is transformers' own, without the head, its weights already in memory; the walk
reads every block from disk. The runs of one repetition follow each other, so that a machine that
slows down slows them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.decoder import Decoder
from compressor.score import METHODS
from compressor.score.collect import score
from compressor.walk import Stream, walk

TEN = (
    "angular_distance",
    "block_influence",
    "sublayer_cosine",
    "ffn_saturation",
    "lim",
    "zd",
    "dlp",
    "owl",
    "activity",
    "residual",
)
USUAL = ("bare walk", "ten scores", "ten, all positions", "ten and attention_rank")
ALL: dict[str, dict[str, Any]] = {"angular_distance": {"positions": "all"}}


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--windows", default=8, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--only", multiple=True, default=USUAL, help="What to time; may be repeated.")
@click.option("--cpu", is_flag=True, help="Count CPU seconds, which other work disturbs less.")
def main(
    model: Path,
    text: Path,
    windows: int,
    length: int,
    batch_size: int,
    repeats: int,
    only: tuple[str, ...],
    cpu: bool,
) -> None:
    """Print seconds, their spread and the ratio to the bare forward of every run."""
    tokens = cut(model, text, windows, length)
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def forward() -> None:
        with torch.no_grad():
            for rows in tokens.split(batch_size):
                whole.get_decoder()(input_ids=rows, use_cache=False)

    def bare_walk() -> None:
        for _ in walk(Stream(Decoder(model), tokens, batch_size)):
            pass

    def scores(*names: str, **options: dict[str, Any]) -> Callable[..., None]:
        asked = {name: METHODS[name].params(**options.get(name, {})) for name in names}

        def run(tokens: Tensor = tokens) -> None:
            found = score(model, tokens, asked, batch_size=batch_size)
            if found.unavailable:
                raise click.ClickException(str(found.unavailable))

        return run

    runs = {
        "bare forward": forward,
        "bare walk": bare_walk,
        "ten scores": scores(*TEN),
        "ten, all positions": scores(*TEN, **ALL),
        "ten and attention_rank": scores(*TEN, "attention_rank"),
        "zd": scores("zd"),
        "lamp": scores("lamp"),
    }
    runs = {name: runs[name] for name in ("bare forward", *only)}
    scores(*TEN)(tokens[:1, :64])  # imports and lazy initialisation are not the walk's
    seconds = interleaved(runs, repeats, time.process_time if cpu else time.perf_counter)
    click.echo(f"{model}: {windows} x {length} tokens, {torch.get_num_threads()} threads")
    click.echo(f"{'CPU' if cpu else 'wall':24}{'median s':>10}{'min':>8}{'max':>8}{'ratio':>8}")
    for name, taken in seconds.items():
        ratio = statistics.median(
            a / b for a, b in zip(taken, seconds["bare forward"], strict=True)
        )
        low, high = min(taken), max(taken)
        click.echo(f"{name:24}{statistics.median(taken):10.2f}{low:8.2f}{high:8.2f}{ratio:8.3f}")


def cut(model: Path, text: Path, windows: int, length: int) -> Tensor:
    """The first tokens of a text as windows (N, T)."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    if len(ids) < windows * length:
        raise click.ClickException(f"{text} holds {len(ids)} tokens, {windows * length} are needed")
    return ids[: windows * length].view(windows, length)


def interleaved(
    runs: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every run, one after the other, `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return seconds


if __name__ == "__main__":
    main()
