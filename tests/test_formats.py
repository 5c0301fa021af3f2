"""What is written, who can load it, and proof that it loads."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint import Checkpoint, write_json
from compressor.decoder import Decoder
from compressor.dense import DenseReader
from compressor.errors import CheckpointError, ExportError, QuantizationError
from compressor.export.nbits import block_size
from compressor.layouts import Codes, Gptq, Packed
from compressor.quantize import RtnParams
from compressor.quantize.driver import Recipe, quantize, quantize_blocks
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.lint import lint
from compressor.quantize.plan import grids, units
from compressor.quantize.readers import verdicts
from compressor.records import BitPlan, Width
from tests.tiny import save_tiny, tokens

BITS = (2, 3, 4, 5, 6, 8)
MIXED = BitPlan.model_validate(
    {
        "linears": {
            "*.0.mlp.down_proj": 8,
            "*.mlp.down_proj": {"bits": 2, "group_size": 8},
            "re:model[.]layers[.](1|3)[.]self_attn[.].*": {"bits": 3, "group_size": 32},
            "*.o_proj": {"bits": 6, "group_size": 0},
        }
    }
)
"""Over a stage of 4 bits in groups of 16: five grids, two of them in some blocks only."""


def codes(rows: int, columns: int, bits: int, groups: int, symmetric: bool) -> Codes:
    """Random integers of the whole range with half-precision scales."""
    draw = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    integers = torch.randint(low, high, (rows, columns), generator=draw, dtype=torch.int8)
    zero = torch.randint(low, high, (rows, groups), generator=draw, dtype=torch.int8)
    scale = torch.randn(rows, groups, generator=draw).half()
    return Codes(integers, scale, None if symmetric else zero)


def stream(values: list[int], bits: int) -> list[int]:
    """Unsigned values as one little-endian bit stream, cut into 32-bit words."""
    whole = sum(value << (bits * k) for k, value in enumerate(values))
    return [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]


def words(tensor: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in tensor.tolist()]


def same(left: Codes, right: Codes) -> bool:
    pairs = [(left.integers, right.integers), (left.scale, right.scale)]
    if left.zero_point is not None and right.zero_point is not None:
        pairs.append((left.zero_point, right.zero_point))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_packed_layout_is_a_dense_stream_along_the_inputs(bits: int, symmetric: bool) -> None:
    wanted, layout = codes(20, 24, bits, 3, symmetric), Packed(bits, symmetric)
    tensors, half = layout.write(wanted), 2 ** (bits - 1)
    assert set(tensors) == set(layout.names)
    assert tensors["weight_packed"].shape == (20, -(-24 * bits // 32))
    for row, packed in zip(wanted.integers.tolist(), tensors["weight_packed"], strict=True):
        assert words(packed) == stream([q + half for q in row], bits)
    assert tensors["weight_shape"].tolist() == [20, 24]
    if wanted.zero_point is not None:
        for group, packed in zip(wanted.zero_point.T, tensors["weight_zero_point"].T, strict=True):
            assert words(packed) == stream([z + half for z in group.tolist()], bits)
    assert same(layout.read(tensors), wanted)


@pytest.mark.parametrize(("symmetric", "version"), [(True, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_layout_unpacked_by_hand(bits: int, symmetric: bool, version: int) -> None:
    wanted, per_word = codes(32, 48, bits, 3, symmetric), 32 // bits
    layout = Gptq(bits, version)
    tensors = layout.write(wanted)
    assert tensors["qweight"].shape == (48 // per_word, 32)
    assert tensors["qzeros"].shape == (3, 32 // per_word) and tensors["scales"].shape == (3, 32)
    assert tensors["qweight"].dtype == tensors["qzeros"].dtype == tensors["g_idx"].dtype
    mask, weight = 2**bits - 1, torch.empty(32, 48)
    for i in range(48):
        group = int(tensors["g_idx"][i])
        assert group == i // 16
        for o in range(32):
            q = int(tensors["qweight"][i // per_word, o]) >> (bits * (i % per_word)) & mask
            z = int(tensors["qzeros"][group, o // per_word]) >> (bits * (o % per_word)) & mask
            weight[o, i] = (q - z - (2 - version)) * float(tensors["scales"][group, o])
    assert torch.equal(weight, wanted.dequantize())
    assert torch.equal(layout.read(tensors).dequantize(), weight)


def test_a_column_order_is_refused() -> None:
    layout = Gptq(4, 1)
    tensors = dict(layout.write(codes(32, 32, 4, 2, True)))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(CheckpointError, match="desc_act"):
        layout.read(tensors)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_words_without_straddling_elements_are_refused(bits: int) -> None:
    """compressed-tensors to 0.17 put floor(32 / b) elements into a word."""
    wanted, layout = codes(32, 32, bits, 2, symmetric=False), Packed(bits, symmetric=False)
    tensors = dict(layout.write(wanted))
    words = -(-32 // (32 // bits))
    for name, shape in (("weight_packed", (32, words)), ("weight_zero_point", (words, 2))):
        old = tensors | {name: torch.zeros(shape, dtype=torch.int32)}
        with pytest.raises(CheckpointError, match=f"its {name} is .* before 0.18"):
            layout.read(old)


@pytest.mark.parametrize("said", ["in the config", "by a tensor"])
def test_groups_of_reordered_inputs_are_refused(said: str, tmp_path: Path) -> None:
    _, out = written(tmp_path, "llama", RtnParams(bits=4, group_size=16))
    checkpoint = Checkpoint(out)
    config, tensors = checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.names}
    if said == "in the config":
        (group,) = config["quantization_config"]["config_groups"].values()
        group["weights"]["actorder"] = "group"
    else:
        tensors["model.layers.0.self_attn.q_proj.weight_g_idx"] = torch.arange(32) % 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config)
    with pytest.raises(CheckpointError, match="actorder: group"):
        DenseReader(out)


def in_memory(source: Path, params: RtnParams) -> tuple[Any, dict[str, QuantizedWeight]]:
    """The model with quantized weights as floats, made without any file, and its integers."""
    decoder = Decoder(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    found: dict[str, QuantizedWeight] = {}
    for result in quantize_blocks(decoder, None, Recipe.of(decoder, "rtn", params)):
        found |= result.weights
    for name, weight in found.items():
        model.get_submodule(name).weight.data.copy_(weight.dequantize())
    return model, found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(3, seed=1)).logits


def written(tmp_path: Path, family: str, params: RtnParams, **shape: Any) -> tuple[Path, Path]:
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, family, **shape)
    quantize(source, out, None, "rtn", params)
    return source, out


CASES = {
    **{f"{b} bits": RtnParams(bits=b, group_size=16) for b in BITS},
    **{f"{b} bits, rows": RtnParams(bits=b, group_size=0) for b in (3, 4)},
    "mixed": RtnParams(bits=4, group_size=16, scheme=MIXED),
    **{f"{b} bits, zeros": RtnParams(bits=b, group_size=16, symmetric=False) for b in BITS},
    "5 bits, zeros, rows": RtnParams(bits=5, group_size=0, symmetric=False),
}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("llama", case) for case in sorted(CASES)),
        *itertools.product(("phi3", "qwen3", "gemma3_text"), ("mixed", "3 bits, zeros")),
    ],
)
def test_plain_transformers_computes_what_we_measured(
    family: str, case: str, tmp_path: Path
) -> None:
    params = CASES[case]
    source, out = written(tmp_path, family, params)
    model, found = in_memory(source, params)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
    for name, weight in found.items():
        assert torch.equal(DenseReader(out).read(f"{name}.weight"), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_asymmetric_files_of_half_precision_are_rounded_once(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """They are unpacked while they are read, in the dtype their scales are stored in."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, "llama").to(dtype).save_pretrained(source)
    quantize(source, out, None, "rtn", RtnParams(bits=8, group_size=16, symmetric=False))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight.data, DenseReader(out).read(name).to(dtype).float()), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes_are_what_servers_allocate(symmetric: bool, tmp_path: Path) -> None:
    """vLLM's `CompressedTensorsWNA16.create_weights`, for its fused linears as a whole."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    params = RtnParams(bits=4, group_size=16, symmetric=symmetric, scheme=MIXED)
    source, out = written(tmp_path, "llama", params, **shape)
    decoder, file = Decoder(source), Checkpoint(out)
    plan = grids(decoder, params, MIXED)
    for unit in units(decoder):
        grid, parts = plan[unit[0]], [Checkpoint(source).shape(f"{n}.weight") for n in unit]
        rows, columns = sum(r for r, _ in parts), parts[0][1]
        groups = columns // (grid.group_size or columns)
        wanted = {
            "weight_packed": (rows, -(-columns * grid.bits // 32)),
            "weight_scale": (rows, groups),
            "weight_zero_point": (-(-rows * grid.bits // 32), groups),
        }
        for name in wanted if not symmetric else list(wanted)[:2]:
            shapes = [file.shape(f"{n}.{name}") for n in unit]
            assert (sum(s[0] for s in shapes), shapes[0][1]) == wanted[name], (unit, name)
        assert ("weight_zero_point" in str(file.names)) != symmetric


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = AutoModelForCausalLM.from_pretrained(sys.argv[1])(tokens).logits
assert not [m for m in sys.modules if m.split(".")[0] in ("compressor", "pipelines")]
sys.exit(0 if torch.equal(found, expected) else "logits differ")
"""


def test_a_mixed_file_needs_nothing_of_ours(tmp_path: Path) -> None:
    params = CASES["mixed"]
    source, out = written(tmp_path, "llama", params)
    model, _ = in_memory(source, params)
    torch.save((tokens(3, seed=1), logits(model)), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "expected.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_targets_name_each_linear_once(tmp_path: Path) -> None:
    _, out = written(tmp_path, "llama", CASES["mixed"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert len(groups) == 5 and "dequantize" not in config
    decoder = Decoder(out)
    wanted = grids(decoder, CASES["mixed"], MIXED)
    assert {grid.bits for grid in wanted.values()} == {2, 3, 4, 6, 8}
    for name, grid in wanted.items():
        hits = [
            group["weights"]
            for group in groups
            for target in group["targets"]
            if re.match(target.removeprefix("re:"), name)
        ]
        assert [weights["num_bits"] for weights in hits] == [grid.bits], name
        assert hits[0].get("group_size", 0) == grid.group_size
    strangers = [n.replace("layers.1.", "layers.11.") for n in wanted if ".1." in n]
    strangers += [f"extra.{n}" for n in wanted] + [f"{n}.lora_A" for n in wanted]
    for name in [*strangers, "lm_head", "model.embed_tokens"]:
        specific = [t for g in groups for t in g["targets"] if "[0-9]+" not in t]
        assert not any(re.match(target.removeprefix("re:"), name) for target in specific), name
    assert config["ignore"] == ["lm_head"]


def test_asymmetric_files_of_many_grids_fail_loudly_until_upstream_mends_it(
    tmp_path: Path,
) -> None:
    """transformers 5.23 checks the shape that compressed-tensors 0.18 to 0.20 gets wrong.

    When this fails, something was mended: tell readers.py and docs/formats.md.
    """
    params = RtnParams(bits=4, group_size=16, symmetric=False, scheme=MIXED)
    _, out = written(tmp_path, "llama", params)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)
    report = json.loads((out / "quantization.json").read_text())["readers"]
    verdict = {row["reader"]: row["speed"] for row in report}
    assert verdict["transformers 5.23, compressed-tensors 0.18 to 0.20"] == "no"
    assert verdict["transformers up to 5.22, compressed-tensors 0.18 to 0.20"] == "dense"


def test_the_proposed_mend_loads_asymmetric_files_of_many_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two lines missing from `PackedQuantizationCompressor.compress` on the meta device."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    compress = PackedQuantizationCompressor.compress.__func__

    def mended(cls: Any, state: dict[str, Tensor], scheme: Any) -> dict[str, Tensor]:
        found = compress(cls, state, scheme)
        zero = found.get("weight_zero_point")
        if zero is not None and zero.device.type == "meta":
            rows = -(-zero.shape[0] * scheme.weights.num_bits // 32)
            shape = (rows, *zero.shape[1:])
            found["weight_zero_point"] = torch.empty(shape, dtype=torch.int32, device="meta")
        return found

    monkeypatch.setattr(PackedQuantizationCompressor, "compress", classmethod(mended))
    params = RtnParams(bits=4, group_size=16, symmetric=False, scheme=MIXED)
    source, out = written(tmp_path, "llama", params)
    model, _ = in_memory(source, params)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


GPTQ_MIXED = BitPlan.model_validate({"linears": {"*.1.mlp.*": 8, "*.self_attn.[qkv]_proj": 2}})


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_files_are_read_back_bit_by_bit(symmetric: bool, tmp_path: Path) -> None:
    params = RtnParams(bits=4, group_size=16, symmetric=symmetric, scheme=GPTQ_MIXED, format="gptq")
    shape = {"hidden_size": 64, "intermediate_size": 96}
    source, out = written(tmp_path, "llama", params, **shape)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 16, symmetric)
    assert sorted(rule["bits"] for rule in config["dynamic"].values()) == [2, 8]
    _, found = in_memory(source, params)
    reader = DenseReader(out)
    for name, weight in found.items():
        assert torch.equal(reader.read(f"{name}.weight"), weight.dequantize())
        assert reader.layout(f"{name}.weight").bits == weight.grid.bits
        assert Checkpoint(out).stored_dtype(f"{name}.scales") == torch.float16
    for rule, own in config["dynamic"].items():  # servers ask by the fused name
        fused = "layers.1.mlp.gate_up_proj" if own["bits"] == 8 else "layers.0.self_attn.qkv_proj"
        assert re.match(rule.removeprefix("+:"), f"model.{fused}")


def test_one_asymmetric_linear_makes_the_file_version_2(tmp_path: Path) -> None:
    plan = BitPlan.model_validate({"linears": {"*.o_proj": {"bits": 4, "symmetric": False}}})
    params = RtnParams(bits=4, group_size=16, format="gptq", scheme=plan)
    source, out = written(tmp_path, "llama", params, hidden_size=64, intermediate_size=96)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2" and config["sym"]
    assert [rule["sym"] for rule in config["dynamic"].values()] == [False]
    for name, weight in in_memory(source, params)[1].items():
        assert torch.equal(DenseReader(out).read(f"{name}.weight"), weight.dequantize())


def test_uniform_gptq_files_have_no_rules(tmp_path: Path) -> None:
    params = RtnParams(bits=8, group_size=0, format="gptq")
    _, out = written(tmp_path, "llama", params, hidden_size=64, intermediate_size=96)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "dynamic" not in config and config["group_size"] == -1


def plan(pattern: str, **width: int) -> dict[str, Any]:
    return {"scheme": {"linears": {pattern: width}}}


REFUSED = {
    "servers load q_proj, k_proj, v_proj as one": plan("*.k_proj", bits=8),
    "gate_proj, up_proj as one": plan("*.up_proj", bits=4, group_size=8),
    "first match of no linear": plan("*.q_porj", bits=8),
    "down_proj: its 48 inputs are not a multiple": plan("*.down_proj", bits=4, group_size=32),
    "read with 2, 4 or 8": {"bits": 3, "format": "gptq"},
    "do not fill whole 32-bit words": {"bits": 2, "format": "gptq", "group_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("message", sorted(REFUSED))
def test_plans_that_cannot_load_are_refused_before_any_work(message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", intermediate_size=40 if "fill" in message else 48)
    params = RtnParams(**{"group_size": 16, **REFUSED[message]})
    with pytest.raises(QuantizationError, match=message):
        quantize(tmp_path / "source", tmp_path / "out", None, "rtn", params)
    assert not (tmp_path / "out").exists()


UNITS = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


@pytest.mark.parametrize("family", sorted(UNITS))
def test_units_are_found_in_every_block(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    decoder = Decoder(tmp_path)
    found = [" ".join(sorted(n.rpartition(".")[2] for n in unit)) for unit in units(decoder)]
    assert found == [" ".join(sorted(unit.split())) for unit in UNITS[family]] * 4
    assert sorted(n for unit in units(decoder) for n in unit) == sorted(
        name for i in range(4) for name in decoder.blocks.linears(i)
    )


def test_plan_round_trip_and_order(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == MIXED
    assert MIXED.linears["*.0.mlp.down_proj"] == Width(bits=8)
    save_tiny(tmp_path / "source", "llama")
    found = grids(Decoder(tmp_path / "source"), RtnParams(bits=4, group_size=16), MIXED)
    bits = {name: (grid.bits, grid.group_size) for name, grid in found.items()}
    assert bits["model.layers.0.mlp.down_proj"] == (8, 16)
    assert bits["model.layers.2.mlp.down_proj"] == (2, 8)
    assert bits["model.layers.1.self_attn.o_proj"] == (3, 32)
    assert bits["model.layers.2.self_attn.o_proj"] == (6, 0)
    assert bits["model.layers.2.self_attn.q_proj"] == (4, 16)
    with pytest.raises(ValueError, match="not a regular expression"):
        BitPlan.model_validate({"linears": {"re:*": 4}})


def said(form: str, *plan: tuple[int, int, bool], shape: tuple[int, int] = (128, 128)) -> Any:
    """Speeds by reader for a file with one linear a grid."""
    names = [f"layers.{i}.o_proj" for i in range(len(plan))]
    dtype = torch.float16
    wanted = {n: Grid(b, g, dtype, symmetric=s) for n, (b, g, s) in zip(names, plan, strict=True)}
    found = verdicts(wanted, dict.fromkeys(names, shape), [(n,) for n in names], form)
    return {verdict.reader: verdict.speed for verdict in found}


def test_support_matrix() -> None:
    vllm, old = "vLLM 0.33 on CUDA", "transformers 5.23, compressed-tensors 0.15 to 0.17"
    new = "transformers 5.23, compressed-tensors 0.18 to 0.20"
    lax = "transformers up to 5.22, compressed-tensors 0.18 to 0.20"
    four = said("compressed-tensors", (4, 128, True))
    assert four == {
        vllm: "fast", "vLLM 0.33 on CPU": "fast", "SGLang": "fast", new: "dense", lax: "dense",
        old: "dense",        "onnxruntime MatMulNBits": "fast",
    }  # fmt: skip
    three = said("compressed-tensors", (3, 128, True), (4, 128, True))
    assert three == {
        vllm: "slow", "vLLM 0.33 on CPU": "no", "SGLang": "no", new: "dense", lax: "dense",
        old: "no",        "onnxruntime MatMulNBits": "fast",
    }  # fmt: skip
    asymmetric = said("compressed-tensors", (8, 64, False))
    assert (asymmetric[vllm], asymmetric[new], asymmetric[old]) == ("slow", "dense", "dense")
    both = said("compressed-tensors", (8, 64, False), (4, 64, True))
    assert (both[vllm], both[new], both[lax], both[old]) == ("slow", "no", "dense", "dense")
    assert said("compressed-tensors", (4, 16, True))[vllm] == "slow"
    assert said("compressed-tensors", (4, 64, True), shape=(96, 128))["SGLang"] == "no"
    onnx = "onnxruntime MatMulNBits"
    for group, speed in ((0, "fast"), (48, "fast"), (512, "fast"), (8, "no"), (24, "no")):
        shape = (96, 512) if group == 512 else (96, 144)
        assert said("compressed-tensors", (4, group, True), shape=shape)[onnx] == speed
        span = group or shape[1]
        with nullcontext() if speed == "fast" else pytest.raises(ExportError):
            assert block_size(span, shape[1]) in (16, 128)
    gptq = said("gptq", (4, 128, True), (8, 32, True))
    genai, optimum = "onnxruntime-genai 0.18 builder", "transformers with optimum and gptqmodel"
    assert (gptq[vllm], gptq["GPTQModel 7.7"], gptq[optimum]) == ("fast", "fast", "no")
    assert said("gptq", (4, 128, True))[optimum] == said("gptq", (4, 64, True))[genai] == "fast"
    assert said("gptq", (2, 128, True))[vllm] == said("gptq", (4, 64, False))[genai] == "no"


def test_zero_points_of_fused_linears_must_fill_words() -> None:
    unit = ("a.q_proj", "a.k_proj")
    wanted = dict.fromkeys(unit, Grid(3, 16, symmetric=False))
    for rows, speed in ((32, "slow"), (48, "no")):
        found = verdicts(wanted, dict.fromkeys(unit, (rows, 64)), [unit], "compressed-tensors")
        assert found[0].speed == speed, found[0].why


def test_the_verdict_is_in_the_file_and_in_the_summary(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    params = RtnParams(bits=4, group_size=16)
    summary = quantize(tmp_path / "source", tmp_path / "out", None, "rtn", params)
    rows = json.loads((tmp_path / "out" / "quantization.json").read_text())["readers"]
    assert summary["readers"] == {r["reader"]: f"{r['speed']}: {r['why']}" for r in rows}
    decoder = Decoder(tmp_path / "source")
    assert [
        v._asdict() for v in lint(decoder, grids(decoder, params, BitPlan()), params.format)
    ] == rows
