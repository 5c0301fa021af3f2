"""Laws of scaled inputs: the model computes what it did, and AWQ's search step by step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.decoder import Decoder
from compressor.quantize import GptqParams, PropagatingParams, scaling
from compressor.quantize.driver import Recipe, quantize, quantize_blocks
from compressor.quantize.folds import Fold, find_fold
from compressor.quantize.grid import Grid
from compressor.quantize.inputs import input_groups
from compressor.quantize.rtn import rtn
from compressor.quantize.scaling import best_beta, scale_block, scales
from compressor.walk import Stream, walk
from tests.tiny import save_tiny, tokens

PLAIN = {"group_size": 16, "propagation": "none", "scaling": "awq"}


def uneven(folder: Path, family: str, **overrides: object) -> PreTrainedModel:
    """A tiny model whose norms weigh their channels from a tenth to ten."""
    model = save_tiny(folder, family, **overrides)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and name.endswith("layernorm.weight"):
                weight.mul_(10 ** torch.linspace(-1, 1, len(weight)))
    model.save_pretrained(folder)
    return model


def folds(folder: Path) -> dict[str, Fold | None]:
    """What each group of block 0 folds into, by its leader's name inside the block."""
    decoder = Decoder(folder)
    probe, found = decoder.embed(tokens(1, 8)), {}
    with decoder.resident(0), torch.no_grad():
        groups = input_groups(decoder, probe, 0)
        for place, group in enumerate(groups):
            fold = find_fold(decoder, probe, 0, groups[:place], group)
            found[group.leader.partition(".0.")[2]] = fold
    return found


@pytest.mark.parametrize(
    ("family", "into"),
    [
        ("llama", ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]),
        ("qwen3", ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]),
        ("gemma3_text", ["input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"]),
        ("opt", ["self_attn_layer_norm", "v_proj", "final_layer_norm", "fc1"]),
        ("gpt2", ["ln_1", None, "ln_2", None]),
        ("phi3", ["input_layernorm", None, "post_attention_layernorm", None]),
        ("gpt_neox", ["input_layernorm", None, "post_attention_layernorm", None]),
        ("olmo2", [None, "v_proj", None, "up_proj"]),
        ("cohere", ["input_layernorm", "v_proj", "up_proj"]),
    ],
)
def test_what_folds(family: str, into: list[str | None], tmp_path: Path) -> None:
    """Fused and bent outputs take no scale, nor does a stream; Gemma's norms add 1."""
    save_tiny(tmp_path, family)
    found = list(folds(tmp_path).values())
    assert [fold and fold.name.rpartition(".")[2] for fold in found] == into
    norms = [fold.offset for fold in found if fold and "norm" in fold.name]
    assert norms == [1.0 if family == "gemma3_text" else 0.0] * len(norms)


@pytest.mark.parametrize(
    ("family", "heads"),
    [("llama", 1), ("llama", 4)]
    + [(name, 2) for name in ("llama", "qwen2", "gemma3_text", "opt", "gpt2", "cohere")],
)
def test_scaling_leaves_the_logits(
    family: str, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path, family, num_key_value_heads=heads)
    monkeypatch.setattr(scaling, "best_beta", lambda *_: 0.6)
    decoder = Decoder(tmp_path)
    probe, stream = decoder.embed(tokens(1, 8)), Stream(decoder, tokens())
    recipe = Recipe.of(decoder, "gptq", GptqParams(**PLAIN))
    changed: dict[str, Tensor] = {}
    for step in walk(stream):
        before = {n: w.clone() for n, w in step.block.state_dict().items()}
        scaled = scale_block(step, probe, recipe.grids)
        assert scaled.betas and set(scaled.betas.values()) == {0.6}
        path = f"{decoder.blocks.prefix}.{step.index}."
        after = step.block.state_dict()
        moved = {path + n for n in before if not torch.equal(before[n], after[n])}
        assert {n for n in moved if after[n.removeprefix(path)].ndim == 1} == set(scaled.dense)
        assert {f"{name}.weight" for name in scaled.betas} <= moved
        changed |= scaled.dense
    assert changed
    logits = torch.cat([found for _, found in stream.logits()])
    torch.testing.assert_close(logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_heads_that_share_values_share_scales(tmp_path: Path) -> None:
    """Four query heads of 8 on two heads of values: rows 0 to 7 serve inputs 0 to 7 and 8 to 15."""
    save_tiny(tmp_path, "llama")
    fold = folds(tmp_path)["self_attn.o_proj"]
    assert fold is not None
    first, second = list(range(8)), list(range(8, 16))
    assert fold.rows.tolist() == [*first, *first, *second, *second]
    sizes = fold.mean(torch.arange(32.0))
    assert sizes.tolist() == [c + 4.0 for c in first] + [c + 12.0 for c in second]


def test_search_is_that_of_the_paper(tmp_path: Path) -> None:
    """AWQ's loop over ratios, on inputs and outputs themselves."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=draw) * 10 ** torch.linspace(-1, 1, 32)
    weights = [torch.randn(rows, 32, generator=draw) for rows in (12, 8)]
    grid = Grid(3, 16, torch.float32, search=False)
    losses = []
    for ratio in [i / 20 for i in range(20)]:
        s = x.abs().mean(0).pow(ratio).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        off = [x @ w.T - (x / s) @ rtn(w * s, None, grid).dequantize().T for w in weights]
        losses.append(sum(float(each.square().sum()) for each in off))
    expected = min(range(20), key=losses.__getitem__)
    fold = Fold("norm", torch.nn.LayerNorm(32), torch.arange(32))
    pairs = [(weight, Grid(3, 16, torch.float32)) for weight in weights]
    found = best_beta(pairs, x.T @ x / len(x), x.abs().mean(0), fold)
    assert 0 < expected < 19 and found == expected / 20
    assert torch.equal(scales(x.abs().mean(0), 0.0), torch.ones(32))


def test_beta_zero_leaves_all_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BETAS", [0.0])
    uneven(tmp_path / "source", "llama")
    for name, given in (("none", {}), ("awq", {"scaling": "awq"})):
        params = GptqParams(group_size=16, **given)
        quantize(tmp_path / "source", tmp_path / name, tokens(4), "gptq", params)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("none", "awq")]
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_land_in_the_file(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 8 bits the loaded model is the original, with other norms; so it is from bfloat16."""
    monkeypatch.setattr(scaling, "best_beta", lambda *_: 0.5)
    save_tiny(tmp_path / "source", "qwen2")
    path = tmp_path / "source/model.safetensors"
    save_file({n: w.to(dtype) for n, w in load_file(path).items()}, path, {"format": "pt"})
    source = load_file(path)
    params = PropagatingParams(bits=8, **PLAIN)
    summary = quantize(tmp_path / "source", tmp_path / "out", tokens(4), "qep_rtn", params)
    assert "unscaled" not in summary
    report = json.loads((tmp_path / "out/quantization.json").read_text())["linears"]
    assert all(row["beta"] == 0.5 for row in report.values())
    written = load_file(tmp_path / "out/model.safetensors")
    other = {n for n in source.keys() & written.keys() if not torch.equal(source[n], written[n])}
    kinds = {name.split(".", 3)[3] for name in other}
    assert {"input_layernorm.weight", "self_attn.v_proj.bias"} <= kinds
    assert all(written[name].dtype == dtype for name in other)
    original, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens()).logits
        for name in ("source", "out")
    )
    assert (found - original).norm() < 0.02 * original.norm()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_rounded_norm_loses_nothing(offset: float) -> None:
    """The scale is that of the norm as stored, and a channel that is off stays off."""
    norm = torch.nn.RMSNorm(4, dtype=torch.float32)
    norm.weight.data.copy_(torch.tensor([-offset, 0.3, 1.7, -2.0]))
    fold, before = Fold("norm", norm, torch.arange(4), offset), norm.weight.data + offset
    scale = fold.divide(torch.tensor([2.0, 3.0, 0.7, 1.1]), torch.bfloat16)
    after = norm.weight.data
    assert torch.equal(after, after.bfloat16().float()) and scale[0] == 1
    torch.testing.assert_close((after + offset) * scale, before)


def test_it_helps_where_inputs_are_uneven(tmp_path: Path) -> None:
    uneven(tmp_path, "llama")
    errors = []
    for given in ({"scaling": "none"}, {}):
        params = PropagatingParams(bits=3, search=False, **(PLAIN | given))
        recipe = Recipe.of(Decoder(tmp_path), "qep_rtn", params)
        blocks = list(quantize_blocks(Decoder(tmp_path), tokens(8), recipe))
        rows = itertools.chain(*(block.report.values() for block in blocks))
        errors.append(sum(row["relative_error"] for row in rows))
    assert errors[1] < 0.95 * errors[0]


def test_what_does_not_fold_is_told(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "olmo2")
    params = GptqParams(**PLAIN)
    summary = quantize(tmp_path / "source", tmp_path / "out", tokens(4), "gptq", params)
    tails = {name.rpartition(".")[2] for name in summary["unscaled"]}
    assert tails == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_a_teacher_reads_no_scaled_inputs() -> None:
    with pytest.raises(ValueError, match="scaling: awq changes what linears read"):
        GptqParams(scaling="awq", teacher="parent")
