"""Where a decode step's time goes: matrices from memory, from the cache, and the rest.

    python benchmarks/decode.py FOLDER ... [--threads 1,2] [--repeats 3]

FOLDER holds a decoder graph. For each thread count, with pages of 4 KB and of 2 MB: a step behind
64 tokens, as `compress generate` runs it; its products with matrices alone, one after the other, so
that weights come from memory; the same, each repeated, so that they come from the cache (a head
from the last one); what the weights that a token reads would take if memory were all; and what a
step takes beyond its products. Milliseconds, medians of fresh processes in turns.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime

from compressor.memory import use_huge_pages
from compressor.runtimes import Target, onnx_runtime
from compressor.runtimes.roofline import bandwidth, weight_bytes
from compressor.runtimes.session import MODEL

FLOAT = ir.DataType.FLOAT
PROMPT, STEPS, MATRICES = 64, 32, ("MatMulNBits", "FusedMatMul")
HEADER = """\
| graph | threads | pages | step | matrices | from the cache | bytes / bandwidth | rest |
|---|---|---|---|---|---|---|---|
"""


def milliseconds(run: Callable[[], Any], times: int) -> float:
    """Median of `times` runs behind one that warms up."""
    run()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found) * 1e3


def alone(folder: Path, chosen: list[int], threads: int, huge: bool) -> Callable[[], None]:
    """A run of nothing but the products at these places in the graph, their inputs random."""
    model = ir.load(folder / MODEL)
    graph = model.graph
    matrices = [n for n in graph if n.op_type in MATRICES]
    kept = [matrices[index] for index in chosen]
    graph.inputs.clear()
    graph.outputs.clear()
    inputs = {width: ir.val(f"x{width}", FLOAT, [1, 1, width]) for width in map(_width, kept)}
    graph.inputs.extend(inputs.values())
    for index, node in enumerate(kept):
        node.replace_input_with(0, inputs[_width(node)])
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(FLOAT)
        node.outputs[0].shape = None
    graph.remove([n for n in graph if n not in kept], safe=True)
    graph.outputs.extend(n.outputs[0] for n in kept)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    place = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(place, str(folder))
    raw = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    if huge:
        use_huge_pages()
    binding, random = session.io_binding(), np.random.default_rng(0)
    for width in inputs:
        binding.bind_cpu_input(f"x{width}", random.standard_normal((1, 1, width), np.float32))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(output.name, value)
    return lambda: session.run_with_iobinding(binding)


def _width(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return int(node.attributes["K"].value if "K" in node.attributes else weight.shape[1])


def whole(folder: Path, threads: int) -> Callable[[], Any]:
    """A step of the whole graph behind a prompt."""
    runtime = Target(folder, "onnxruntime").open("cpu", threads)
    runtime.prefill(np.random.default_rng(0).integers(1000, size=PROMPT).tolist())
    return lambda: runtime.step(5)


def measure(folder: Path, threads: int, huge: bool) -> dict[str, float]:
    """All of one row, in this process."""
    if not huge:
        onnx_runtime.use_huge_pages = lambda: None
    step = milliseconds(whole(folder, threads), STEPS)
    nodes = [n for n in ir.load(folder / MODEL).graph if n.op_type in MATRICES]
    shapes = [str([v.shape for v in n.inputs[1:] if v]) for n in nodes]
    matrices = milliseconds(alone(folder, list(range(len(nodes))), threads, huge), STEPS)
    cached = 0.0
    for shape, count in Counter(shapes).items():
        one = alone(folder, [shapes.index(shape)], threads, huge)
        cached += count * milliseconds(one, 10 * STEPS)
    floor = weight_bytes(Target(folder, "onnxruntime")) / bandwidth(threads) * 1e3
    return {
        "step": step,
        "matrices": matrices,
        "cached": cached,
        "floor": floor,
        "rest": step - matrices,
    }


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(folders: tuple[Path, ...], threads: str, repeats: int) -> None:
    """Print a row per graph, thread count and size of pages."""
    rows = [
        (folder, count, huge)
        for folder in folders
        for count in map(int, threads.split(","))
        for huge in (False, True)
    ]
    found: dict[Any, list[dict[str, float]]] = {row: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                found[row].append(fresh.submit(measure, *row).result())
    click.echo(HEADER, nl=False)
    for (folder, count, huge), all_ in found.items():
        middle = [f"{statistics.median(one[k] for one in all_):.1f}" for k in all_[0]]
        pages = "2 MB" if huge else "4 KB"
        click.echo(f"| {folder} | {count} | {pages} | {' | '.join(middle)} |")


if __name__ == "__main__":
    main()
