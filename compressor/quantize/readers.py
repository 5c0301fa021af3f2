"""Who can load a quantized checkpoint, and how fast it runs there: a table and its lookup.

Every row was read in the source it names; docs/formats.md says which were also run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from compressor.quantize.formats import Grids
from compressor.quantize.grid import Grid

Speed = Literal["fast", "slow", "dense", "no"]
SPEEDS: tuple[Speed, ...] = ("fast", "slow", "dense", "no")
"""Tuned integer kernels; other integer kernels; expanded to floats; does not load."""

Shapes = Mapping[str, tuple[int, int]]
Units = Sequence[tuple[str, ...]]

_ALL = (2, 3, 4, 5, 6, 8)
_BLOCKS = (16, 32, 64, 128, 256)
_MARLIN = (0, 32, 64, 128)


class Kernel(NamedTuple):
    """What a reader runs, and the linears it runs it for.

    Attributes:
        words: what it is called.
        groups: group sizes it takes, 0 for whole rows; None: any.
        align: what the outputs and inputs of a linear must be multiples of.
        step: groups that are no whole rows are multiples of this.
    """

    words: str
    speed: Speed
    bits: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True, False)
    groups: tuple[int, ...] | None = None
    align: tuple[int, int] = (1, 1)
    step: int = 1

    def takes(self, grid: Grid, shape: tuple[int, int]) -> bool:
        """Whether it runs a linear of this grid and shape."""
        aligned = all(size % step == 0 for size, step in zip(shape, self.align, strict=True))
        sized = self.groups is None or (grid.group_size or 0) in self.groups
        span = grid.span(shape[1])
        sized &= span % self.step == 0 or span == shape[1]
        return grid.bits in self.bits and grid.symmetric in self.symmetric and sized and aligned


class Reader(NamedTuple):
    """A program that opens quantized checkpoints.

    Attributes:
        kernels: best first.
        source: where its limits are written.
        uniform: it takes files of one grid only.
        uniform_asymmetric: it takes asymmetric grids only in files of one grid.
        whole_zeros: packed zero points of fused linears must end on whole words.
        note: what else to know.
    """

    name: str
    format: str
    kernels: tuple[Kernel, ...]
    source: str
    uniform: bool = False
    uniform_asymmetric: bool = False
    whole_zeros: bool = False
    note: str = ""


class Verdict(NamedTuple):
    """What a reader makes of a file."""

    reader: str
    speed: Speed
    why: str


READERS: tuple[Reader, ...] = (
    Reader(
        "vLLM 0.33 on CUDA",
        "compressed-tensors",
        (
            Kernel("Marlin or Machete", "fast", (4, 8), (True,), _MARLIN),
            Kernel("Marlin or Machete", "fast", (4,), (False,), _MARLIN),
            Kernel("Humming", "slow", _ALL),
        ),
        "vllm 0.33.0 kernels/linear/mixed_precision, schemes/compressed_tensors_wNa16.py",
        whole_zeros=True,
    ),
    Reader(
        "vLLM 0.33 on CPU",
        "compressed-tensors",
        (Kernel("its own kernel", "fast", (4,), align=(32, 32)),),
        "vllm 0.33.0 kernels/linear/mixed_precision/cpu.py",
        whole_zeros=True,
    ),
    Reader(
        "SGLang",
        "compressed-tensors",
        (
            Kernel("Marlin", "fast", (4, 8), (True,), _MARLIN, (64, 128)),
            Kernel("Marlin", "fast", (4,), (False,), _MARLIN, (64, 128)),
        ),
        "sglang compressed_tensors_wNa16.py; sglang#32736",
        whole_zeros=True,
        note="before July 2026 it read mixed files as dense without a word",
    ),
    Reader(
        "transformers 5.23, compressed-tensors 0.18 to 0.20",
        "compressed-tensors",
        (Kernel("expansion to floats", "dense", _ALL),),
        "transformers 5.23.0 and compressed-tensors 0.20.0, run by tests/test_formats.py",
        uniform_asymmetric=True,
    ),
    Reader(
        "transformers up to 5.22, compressed-tensors 0.18 to 0.20",
        "compressed-tensors",
        (Kernel("expansion to floats", "dense", _ALL),),
        "transformers 5.20.0 to 5.22.0 and compressed-tensors 0.20.0, run once",
    ),
    Reader(
        "transformers 5.23, compressed-tensors 0.15 to 0.17",
        "compressed-tensors",
        (Kernel("expansion to floats", "dense", (2, 4, 8)),),
        "compressed-tensors 0.15.0 and 0.17.0, run once; #732 changed 3, 5 and 6 bits",
    ),
    Reader(
        "vLLM 0.33 on CUDA",
        "gptq",
        (Kernel("Marlin or Machete", "fast", (4, 8), (True,), _MARLIN),),
        "vllm 0.33.0 layers/quantization/auto_gptq.py",
        note="run it in float16, which its scales are stored in",
    ),
    Reader(
        "GPTQModel 7.7",
        "gptq",
        (Kernel("its own kernels", "fast", (2, 4, 8), groups=(0, *_BLOCKS)),),
        "gptqmodel 7.7.0 nn_modules/qlinear/torch.py",
    ),
    Reader(
        "transformers with optimum and gptqmodel",
        "gptq",
        (Kernel("GPTQModel's kernels", "fast", (2, 4, 8), groups=(0, *_BLOCKS)),),
        "transformers 5.23 quantizers/quantizer_gptq.py, which ignores `dynamic`",
        uniform=True,
    ),
    Reader(
        "onnxruntime-genai 0.18 builder",
        "gptq",
        (Kernel("MatMulNBits", "fast", (2, 4, 8), (True,), _BLOCKS),),
        "onnxruntime-genai 0.18.0 models/loaders/gptq.py, which takes every file for version 1",
    ),
    *(
        Reader(
            "onnxruntime MatMulNBits",
            form,
            (
                Kernel("MatMulNBits", "fast", (2, 4, 8), step=16),
                Kernel("MatMulNBits in codes of 4 or 8 bits", "fast", (3, 5, 6), step=16),
            ),
            "onnxruntime 1.31 and 1.32 on the CPU; export/nbits.py cuts groups into its blocks",
            note="a graph is needed: compress export",
        )
        for form in ("compressed-tensors", "gptq")
    ),
)
"""Of one program the newest version stands first."""


def verdicts(grids: Grids, shapes: Shapes, units: Units, form: str) -> list[Verdict]:
    """What each reader of `form` makes of a file of `grids`, in the order of the table."""
    return [_verdict(r, grids, shapes, units) for r in READERS if r.format == form]


def in_words(grid: Grid) -> str:
    """Such as `4 bits, groups of 64, symmetric`."""
    groups = f"groups of {grid.group_size}" if grid.group_size else "one group a row"
    return f"{grid.bits} bits, {groups}, {'symmetric' if grid.symmetric else 'asymmetric'}"


def _verdict(reader: Reader, grids: Grids, shapes: Shapes, units: Units) -> Verdict:
    mixed = len(set(grids.values())) > 1
    asymmetric = [name for name, grid in grids.items() if not grid.symmetric]
    if mixed and reader.uniform:
        return Verdict(reader.name, "no", "it takes one grid for the whole file")
    if mixed and reader.uniform_asymmetric and asymmetric:
        return Verdict(reader.name, "no", f"{asymmetric[0]} is asymmetric in a file of many grids")
    for unit in units if reader.whole_zeros else ():
        for name in unit if len(unit) > 1 and not grids[unit[0]].symmetric else ():
            if shapes[name][0] * grids[name].bits % 32:
                why = f"{name}: the zero points of {shapes[name][0]} outputs fill no whole words"
                return Verdict(reader.name, "no", why)
    chosen: Counter[Kernel] = Counter()
    for name, grid in grids.items():
        kernel = next((k for k in reader.kernels if k.takes(grid, shapes[name])), None)
        if kernel is None:
            rows, columns = shapes[name]
            why = f"no kernel for {name} ({rows} x {columns}, {in_words(grid)})"
            return Verdict(reader.name, "no", why)
        chosen[kernel] += 1
    speed = max((kernel.speed for kernel in chosen), key=SPEEDS.index)
    counts: Counter[str] = Counter()
    for kernel, count in chosen.items():
        counts[kernel.words] += count
    why = ", ".join(f"{count} linears by {words}" for words, count in counts.items())
    return Verdict(reader.name, speed, f"{why}; {reader.note}" if reader.note else why)
