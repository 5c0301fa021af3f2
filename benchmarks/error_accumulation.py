"""The error of quantized checkpoints by depth, as numbers and as a picture.

    python benchmarks/error_accumulation.py MODEL TEXT NAME=FOLDER ... [--picture FILE.png]
        [--windows 8 --length 512]

||h - h'|| / ||h|| of the residual stream after every block on the first windows of TEXT, MODEL
against each FOLDER. The folders of docs/quantize.md came from

    for p in none tuned; do compress quantize MODEL --bits 3 --symmetric false --group-size 64 \\
        --propagation $p --text valid.txt --windows 8 --length 512 -o w3a-$p; done
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from score_walk import cut

from compressor.evaluate.accumulation import accumulation


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("folders", nargs=-1, required=True, metavar="NAME=FOLDER ...")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw the curves here.")
@click.option("--windows", default=8, show_default=True)
@click.option("--length", default=512, show_default=True)
def main(
    model: Path,
    text: Path,
    folders: tuple[str, ...],
    picture: Path | None,
    windows: int,
    length: int,
) -> None:
    """Print {name: error after every block} as JSON."""
    named = {name: Path(folder) for name, _, folder in (each.partition("=") for each in folders)}
    curves = accumulation(model, named, cut(model, text, windows, length))
    click.echo(json.dumps(curves, indent=1))
    if picture:
        draw(curves, picture)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """One line per checkpoint over depth."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(len(curve)), curve, marker=".", label=name)
    axes.set_xlabel("block")
    axes.set_ylabel("‖h - h'‖ / ‖h‖ after it")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
