"""Correcting towards the model that a checkpoint was cut from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compressor.artifact import Store
from compressor.decoder import Decoder
from compressor.errors import ConfigError, NotApplicable
from compressor.prune.blocks import prune
from compressor.prune.driver import prune as cut_sublayers
from compressor.prune.sublayers import blocks_left
from compressor.quantize import GptqParams
from compressor.quantize.driver import Recipe, quantize_blocks
from compressor.quantize.error_propagation import propagate_error
from compressor.quantize.results import BlockResult
from compressor.quantize.teacher import Teacher
from compressor.records import Selection
from compressor.walk import Stream, walk
from pipelines.config import load, parse
from pipelines.plan import plan
from pipelines.run import Options, run
from tests.tiny import save_corpus, save_tiny, save_tokenizer, tiny, tokens

WINDOWS = tokens(16)
DEPTH = {"num_hidden_layers": 6}
KEPT = [0, 2, 5]
PARAMS = GptqParams(
    group_size=16, bits=4, act_order=False, polish=0, alpha=1, ridge=0.01, catch_up=0
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model of 6 blocks and what is left of it without 1, 3 and 4."""
    save_tiny(tmp_path / "deep", "llama", **DEPTH)
    prune(tmp_path / "deep", Selection(num_blocks=6, drop_blocks=[1, 3, 4]), tmp_path / "cut")
    return tmp_path / "deep", tmp_path / "cut"


def quantized(
    folder: Path, teacher: Teacher | None, batch_size: int = 16
) -> tuple[list[BlockResult], Tensor]:
    """The results and the residual stream after the last block of the quantized model."""
    decoder = Decoder(folder)
    recipe = Recipe.of(decoder, "gptq", PARAMS)
    found = list(quantize_blocks(decoder, WINDOWS, recipe, batch_size, teacher))
    weights = {n: w.dequantize() for block in found for n, w in block.weights.items()}
    stream = Stream(Decoder(folder), WINDOWS)
    for step in walk(stream):
        for name, linear in stream.decoder.blocks.linears(step.index).items():
            linear.weight.data.copy_(weights[name])
    return found, stream.x


def test_blocks_that_went_in_two_halves_are_gone(tmp_path: Path) -> None:
    """The attention of a block in one cut and its feed-forward, under a new index, in the next."""
    save_tiny(tmp_path / "deep", "llama", **DEPTH)
    first = Selection(num_blocks=6, drop_blocks=[0], drop_attention=[2, 4])
    second = Selection(num_blocks=5, drop_ffn=[1])
    cut_sublayers(tmp_path / "deep", first, tmp_path / "once", flavour="auto")
    cut_sublayers(tmp_path / "once", second, tmp_path / "twice", flavour="auto")
    assert len(Decoder(tmp_path / "twice").blocks) == 4
    assert blocks_left(tmp_path / "deep", [first, second]) == [1, 3, 4, 5]
    assert blocks_left(tmp_path / "once", [second]) == [0, 2, 3, 4]
    stranger = Selection(num_blocks=4, drop_ffn=[3])
    assert blocks_left(tmp_path / "once", [second, stranger]) == [0, 2, 3, 4]


def final(folder: Path) -> Tensor:
    stream = Stream(Decoder(folder), WINDOWS)
    for _ in walk(stream):
        pass
    return stream.x


def same(some: list[BlockResult], others: list[BlockResult]) -> list[bool]:
    return [
        torch.equal(a.weights[name].integers, b.weights[name].integers)
        and torch.equal(a.weights[name].scale, b.weights[name].scale)
        for a, b in zip(some, others, strict=True)
        for name in a.weights
    ]


def test_a_teacher_that_was_not_cut_changes_nothing(pair: tuple[Path, Path]) -> None:
    deep, _ = pair
    own, others = quantized(deep, None)[0], quantized(deep, Teacher(deep, range(6)))[0]
    assert len(own) == 6 and all(same(own, others))
    assert [a.drift for a in own] == [b.drift for b in others]


def test_it_lowers_the_error_to_the_teacher(pair: tuple[Path, Path]) -> None:
    deep, cut = pair
    goal = final(deep)
    found, x = quantized(cut, Teacher(deep, KEPT))
    error = float((x - goal).norm() / goal.norm())
    assert error < 0.97 * float((quantized(cut, None)[1] - goal).norm() / goal.norm())
    assert found[-1].drift == pytest.approx(error, rel=1e-4)


def test_each_group_reads_beside_its_own_block_of_the_teacher(pair: tuple[Path, Path]) -> None:
    """Against both whole models' forwards: q, k and v of every kept block, in float64."""
    deep, cut = pair
    found, _ = quantized(cut, Teacher(deep, KEPT))
    original = tiny("llama", **DEPTH).double()
    compressed = type(original)(original.config).double()
    compressed.load_state_dict(original.state_dict())
    compressed.model.layers = torch.nn.ModuleList([compressed.model.layers[i] for i in KEPT])
    for new, old in enumerate(KEPT):
        x, low = (inputs(m, i) for m, i in ((original, old), (compressed, new)))
        cross, gram = (x - low).T @ low / len(x), low.T @ low / len(x)
        for name in ("q_proj", "k_proj", "v_proj"):
            full = f"model.layers.{new}.self_attn.{name}"
            weight = original.get_submodule(full.replace(f".{new}.", f".{old}.")).weight.data
            goal, _ = propagate_error(weight, weight @ cross, gram, alpha=1, damp=0.01)
            recipe = Recipe.of(Decoder(cut), "gptq", PARAMS)
            expected = recipe.quantizer(goal, gram, recipe.grids[full])
            agreeing = (expected.integers == found[new].weights[full].integers).float().mean()
            assert agreeing > 0.85, full  # a handful of ties; without the teacher 0.15
        for full, weights in found[new].weights.items():
            compressed.get_submodule(full).weight.data.copy_(weights.dequantize())


def inputs(model: torch.nn.Module, index: int) -> Tensor:
    """What q_proj of a block reads, (N T, I)."""
    seen: list[Tensor] = []
    linear = model.get_submodule(f"model.layers.{index}.self_attn.q_proj")
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    return seen[0].flatten(0, 1)


def test_several_batches_follow_the_teacher_as_one(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep, cut = pair
    once = quantized(cut, Teacher(deep, KEPT))[0]
    monkeypatch.setattr("compressor.quantize.driver._INPUT_BYTES", 0)
    parts = quantized(cut, Teacher(deep, KEPT), 5)[0]
    assert [b.drift for b in parts] == pytest.approx([b.drift for b in once], rel=0.02)


def test_grad_mode_is_left_as_it_was(pair: tuple[Path, Path]) -> None:
    deep, cut = pair
    quantized(cut, Teacher(deep, KEPT))
    assert torch.is_grad_enabled()


def test_models_that_do_not_fit_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    deep, cut = pair
    with pytest.raises(NotApplicable, match=r"2 of its blocks were kept, but .* has 3"):
        quantized(cut, Teacher(deep, [0, 2]))
    save_tiny(tmp_path / "wide", "llama", intermediate_size=64, **DEPTH)
    with pytest.raises(NotApplicable, match=r"down_proj reads 48 inputs, in .* block 0 64"):
        quantized(cut, Teacher(tmp_path / "wide", KEPT))
    with pytest.raises(ValidationError, match="of no use when every alpha is 0"):
        GptqParams(teacher="original", alpha=0)


CONFIG = """\
name: taught
model: {path: model}
text:
  source: {path: corpus.jsonl, field: text}
  calibration: {windows: 4, length: 32}
stages:
  - select: {method: fixed, blocks: [1]}
  - prune
  - select: {method: fixed, blocks: [2, 3]}
  - prune
  - quantize: {group_size: 16, teacher: parent}
  - quantize: {group_size: 16, teacher: original}
"""


def test_a_run_finds_its_teacher_and_what_was_cut_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", **DEPTH)
    save_tokenizer(tmp_path / "model")
    save_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "taught.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    config = load(Path("taught.yaml"))
    taught: list[Teacher] = []

    def note(*_: object, teacher: Teacher, **__: object) -> dict[str, object]:
        taught.append(teacher)
        return {}

    monkeypatch.setattr("compressor.quantize.driver.quantize", note)
    record = run(config, Store(tmp_path / "store"), Options())
    folders = {stage["label"]: Path(stage["folder"]) for stage in record["stages"]}
    found = [(teacher.folder.resolve(), list(teacher.kept)) for teacher in taught]
    assert found == [(folders["prune"], [0, 1, 4]), (folders["model"], [0, 2, 5])]


def test_a_teacher_that_nothing_makes_is_missed_when_planning() -> None:
    tree = {
        "name": "untaught",
        "model": {"path": "model"},
        "text": {"calibration": {"source": {"path": "a.txt"}, "windows": 4, "length": 32}},
        "stages": [{"quantize": {"teacher": "parent"}}],
    }
    with pytest.raises(ConfigError, match=r"needs parent, .* put a prune stage before it"):
        plan(parse(tree, "test"), {"model": "m", "calibration": "c"})
