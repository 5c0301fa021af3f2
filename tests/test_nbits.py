"""The checkpoint's integers are in the graph, bit for bit, whatever their width and grouping."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import ExportError
from compressor.export import ExportParams, nbits
from compressor.export import onnx as onnx_export
from compressor.export.decoder_graph import build
from compressor.export.graph import MODEL
from compressor.export.nbits import CONTAINER, block_size, check_widths, pack, round_to_nearest
from compressor.layouts import Codes, Packed
from tests.tiny import save_tiny, save_tokenizer, tokens

Scheme = tuple[int, int, bool]
"""Bits, group size (0: per row), symmetric."""


def random_codes(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> Codes:
    bits, group, symmetric = scheme
    generator = torch.Generator().manual_seed(seed)
    half, groups = 1 << bits - 1, columns // (group or columns)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)

    scale = (0.5 + torch.rand(rows, groups, generator=generator)) / 8 / half
    return Codes(draw(rows, columns), scale, None if symmetric else draw(rows, groups))


def save_packed(folder: Path, schemes: dict[int, Scheme], **overrides: Any) -> dict[str, Codes]:
    """A tiny model whose blocks 0..3 hold random integers of the given schemes."""
    save_tiny(folder, "llama", **({"hidden_size": 64, "intermediate_size": 96} | overrides))
    state, written = load_file(folder / "model.safetensors"), {}
    groups: dict[str, Any] = {}
    for index, scheme in schemes.items():
        bits, group, symmetric = scheme
        path = f"model.layers.{index}."
        for name in [n for n in state if n.startswith(path) and n.endswith("_proj.weight")]:
            codes = random_codes(*state.pop(name).shape, scheme, seed=len(written))
            stem = name.removesuffix("weight")
            packed = Packed(bits, symmetric).write(codes)
            state |= {stem + part: tensor for part, tensor in packed.items()}
            written[name] = codes
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        groups[f"group_{index}"] = {
            "targets": [f"re:^model[.]layers[.]{index}[.].*_proj$"],
            "weights": weights,
            "format": "pack-quantized",
        }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return written


def unpacked(node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed integers (N, K), scales and zero points (N, blocks) of a node, read naively."""
    held = [value.const_value.numpy() for value in node.inputs[1:]]
    bits, k = node.attributes["bits"].value, node.attributes["K"].value
    half = 1 << bits - 1

    def values(rows: np.ndarray, count: int) -> np.ndarray:
        stream = np.unpackbits(rows, axis=-1, bitorder="little")[:, : count * bits]
        steps = stream.reshape(len(rows), count, bits).astype(np.int64)
        return (steps << np.arange(bits)).sum(-1) - half

    blocks = held[1].shape[1]
    integers = values(held[0].reshape(len(held[0]), -1), k)
    zeros = values(held[2], blocks) if len(held) > 2 else np.zeros_like(held[1], np.int64)
    return integers, held[1], zeros


def nodes(folder: Path) -> list[ir.Node]:
    return [n for n in ir.load(folder / MODEL).graph if n.op_type == "MatMulNBits"]


WIDTHS = list(itertools.product((2, 3, 4, 5, 6, 8), (True, False)))


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)
def test_integers_in_the_graph_are_the_checkpoints(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    written = save_packed(tmp_path / "model", {1: (bits, 32, symmetric)})
    (tmp_path / "onnx").mkdir()
    built = build(tmp_path / "model", tmp_path / "onnx")
    found = nodes(tmp_path / "onnx")
    assert len(found) == 5  # q+k+v, o, gate, up, down
    order = iter(written[f"model.layers.1.{part}.weight"] for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ))  # fmt: skip
    for node, count in zip(found, (3, 1, 1, 1, 1), strict=True):
        parts = list(itertools.islice(order, count))
        integers, scales, zeros = unpacked(node)
        assert node.attributes["bits"].value == CONTAINER[bits]
        np.testing.assert_array_equal(integers, torch.cat([p.integers for p in parts]))
        np.testing.assert_array_equal(scales, torch.cat([p.scale for p in parts]))
        if symmetric:
            assert len(node.inputs) == 3
        else:
            points = torch.cat([p.zero_point for p in parts if p.zero_point is not None])
            np.testing.assert_array_equal(zeros, points)
    weights = sum(codes.integers.numel() for codes in written.values())
    groups = sum(codes.scale.numel() for codes in written.values())
    own = (weights + groups * (not symmetric)) * bits / 8 + groups * 4
    assert built.nominal_bytes == round(own)
    assert built.container_bytes >= weights * CONTAINER[bits] / 8 + groups * 4


def product(codes: Codes, bits: int, x: np.ndarray) -> np.ndarray:
    """x W^T by the operator itself."""
    matrix = pack(codes, bits)
    held = {"b": matrix.b, "s": matrix.scales, "z": matrix.zero_points}
    inputs = {k: ir.tensor(v.numpy(), name=k) for k, v in held.items() if v is not None}
    values = [ir.val(k, t.dtype, list(t.shape), const_value=t) for k, t in inputs.items()]
    a = ir.val("a", ir.DataType.FLOAT, ["rows", matrix.k])
    sizes = {"K": matrix.k, "N": len(matrix.b), "bits": matrix.bits, "block_size": matrix.block}
    node = ir.node("MatMulNBits", [a, *values], sizes, domain="com.microsoft", num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([a], node.outputs, nodes=[node], initializers=values, opset_imports=opsets)
    raw = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": x})[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group"),
    [(96, 16), (96, 32), (96, 48), (96, 0), (100, 0), (20, 0), (576, 64), (512, 512)],
)
def test_the_operator_computes_the_dense_product(
    columns: int, group: int, symmetric: bool, bits: int
) -> None:
    codes = random_codes(24, columns, (bits, group, symmetric))
    x = np.random.default_rng(0).standard_normal((3, columns), np.float32)
    expected = x.astype(np.float64) @ codes.dequantize().double().numpy().T
    np.testing.assert_allclose(product(codes, bits, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("span", "k", "block"),
    [(16, 64, 16), (64, 576, 64), (128, 512, 128), (256, 512, 256), (512, 512, 128), (48, 96, 16),
     (576, 576, 64), (100, 100, 16), (192, 576, 64)],
)  # fmt: skip
def test_blocks_are_the_groups_or_divide_them(span: int, k: int, block: int) -> None:
    assert block_size(span, k) == block


def test_groups_without_a_block_are_refused_by_name(tmp_path: Path) -> None:
    save_packed(tmp_path / "model", {2: (4, 8, True)})
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ExportError, match=r"model\.layers\.2\.self_attn\.q_proj: groups of 8"):
        build(tmp_path / "model", tmp_path / "onnx")


def test_missing_scales_are_refused_before_any_work(tmp_path: Path) -> None:
    save_packed(tmp_path / "model", {3: (4, 32, True)})
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    state.pop("model.layers.3.mlp.up_proj.weight_scale")
    save_file(state, path)
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ExportError, match=r"layers\.3\.mlp\.up_proj is packed but has no"):
        build(tmp_path / "model", tmp_path / "onnx")


MIXED: dict[int, Scheme] = {0: (8, 32, True), 1: (4, 16, True), 2: (3, 32, True), 3: (2, 32, True)}
ASYMMETRIC: dict[int, Scheme] = {0: (8, 32, False), 1: (5, 16, False), 3: (2, 0, False)}


def test_an_old_onnxruntime_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_packed(tmp_path / "model", {0: (2, 32, True)})
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(ExportError, match=r"2-bit integers need onnxruntime 1\.24, here is 1\.23"):
        onnx_export.export(tmp_path / "model", tmp_path, ExportParams(formats=("onnx",)))
    assert not list(tmp_path.glob("onnx/*"))


@pytest.mark.parametrize("schemes", [MIXED, ASYMMETRIC])
@pytest.mark.parametrize("level", [0, 4])
def test_a_mixed_checkpoint_passes_the_gate(
    schemes: dict[int, Scheme], level: Any, tmp_path: Path
) -> None:
    save_packed(tmp_path / "model", schemes)
    save_tokenizer(tmp_path / "model")
    params = ExportParams(accuracy_level=level)
    metrics = onnx_export.export(tmp_path / "model", tmp_path, params, tokens(4, 40))
    parity = metrics["onnx"]["parity"]
    assert max(parity["accuracy_level_0"].values()) < 1e-4
    assert ("accuracy_level_4" in parity) == (level == 4)
    if level:
        assert parity["accuracy_level_4"]["prefill"] > 1e-4  # it really computes in 8 bits
    if schemes is MIXED:
        assert parity["safetensors"] < 1e-4
    else:
        assert "asymmetric" in parity["safetensors"]


def test_the_gate_names_a_corrupted_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_packed(tmp_path / "model", MIXED)
    good = onnx_export.build

    def damaged(source: Path, folder: Path, *args: Any) -> Any:
        built = good(source, folder, *args)
        scales = nodes(folder)[10].inputs[2].const_value  # block 2, q+k+v
        assert isinstance(scales, ir.ExternalTensor)
        values = scales.numpy().copy()
        values[:, 0] *= 1.5
        with Path(scales.path).open("r+b") as data:
            data.seek(scales.offset)
            data.write(values.tobytes())
        return built

    monkeypatch.setattr(onnx_export, "build", damaged)
    with pytest.raises(ExportError, match=r"first at model\.layers\.2\.self_attn "):
        onnx_export.export(tmp_path / "model", tmp_path, ExportParams())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_head_is_stored_once_and_passes_the_gate(
    bits: Any, tied: bool, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", "llama", hidden_size=64, tie_word_embeddings=tied)
    params = ExportParams(head_bits=bits)
    metrics = onnx_export.export(tmp_path / "model", tmp_path, params)
    assert max(metrics["onnx"]["parity"]["accuracy_level_0"].values()) < 1e-4
    assert len(nodes(tmp_path / "onnx")) == 1
    rows, columns = model.lm_head.weight.shape
    stored = metrics["onnx"]["container_bytes"]
    assert stored == rows * columns * bits // 8 + rows * columns // 32 * 4
    codes = round_to_nearest(model.lm_head.weight, bits)
    np.testing.assert_array_equal(unpacked(nodes(tmp_path / "onnx")[0])[0], codes.integers)


def test_rounding_row_by_row_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    whole = round_to_nearest(weight, 4)
    monkeypatch.setattr(nbits, "_ROWS", 5)
    parts = round_to_nearest(weight, 4)
    assert torch.equal(parts.integers, whole.integers) and torch.equal(parts.scale, whole.scale)


@pytest.mark.parametrize(
    ("containers", "level", "said"), [({8, 4}, 0, "8-bit"), ({2, 8}, 0, "2 and 8-bit"),
                                      ({4}, 0, ""), ({2, 8}, 4, ""), (set(), 0, "")]
)  # fmt: skip
def test_widths_that_are_unpacked_every_time_are_told(
    containers: set[int], level: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_widths(containers, level)
    assert [r.getMessage().partition(" integers")[0] for r in caplog.records] == [said] * bool(said)


def test_rounding_errs_by_half_a_step_or_one_at_the_end() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes = round_to_nearest(weight, 4)
    steps = ((codes.dequantize() - weight).view(8, 2, 32) / codes.scale.unsqueeze(-1)).abs()
    assert steps.max() <= 1
    assert (steps <= 0.5 + 1e-5).float().mean() > 0.95
