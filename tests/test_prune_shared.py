"""Sublayers that run with another block's weights: stored once, computed as they were tried."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder, skeleton
from compressor.errors import CompressError, NotApplicable, SelectionError
from compressor.prune.driver import prune
from compressor.prune.sublayers import _check_exchange
from compressor.records import Selection
from compressor.trial import Trial
from compressor.walk import Stream, walk
from tests.test_prune_sublayers import PLAIN, alone, load, logits, sizes
from tests.test_trial import LLAMA, NAMES, built
from tests.tiny import FAMILIES, save_tiny, save_tokenizer, tiny, tokens

SHARED: dict[str, dict[str, Any]] = {
    "attention": {"reuse_attention": {1: 2}},
    "ffn": {"reuse_ffn": {0: 1, 3: 1}},
    "both": {"drop_attention": [3], "reuse_attention": {1: 2}, "reuse_ffn": {0: 1, 3: 1}},
    "each other's": {"reuse_attention": {1: 2}, "reuse_ffn": {2: 1}},
    "behind a block": {"drop_blocks": [0], "reuse_attention": {3: 1}, "reuse_ffn": {3: 1}},
}


def selection(**parts: Any) -> Selection:
    return Selection(num_blocks=4, **parts)


def shared(tmp_path: Path, family: str, parts: dict[str, Any], **overrides: Any) -> Path:
    """The folder of a tiny model that shares; its source is beside it."""
    save_tiny(tmp_path / "source", family, **overrides)
    prune(tmp_path / "source", selection(**parts), tmp_path / "out", flavour="auto")
    return tmp_path / "out"


@pytest.mark.parametrize("parts", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_copied_weights_and_what_was_tried(
    family: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    out = shared(tmp_path, family, parts)
    written = logits(load(out))
    expected = logits(built(tiny(family), family, selection(**parts)))
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-5)
    loss = cross_entropy(written[:, :-1].flatten(0, 1).double(), tokens()[:, 1:].flatten())
    trial = Trial(Decoder(tmp_path / "source"), tokens())
    assert trial.loss(selection(**parts)) == pytest.approx(loss.item(), rel=1e-5)
    assert not torch.allclose(written, logits(tiny(family)), atol=1e-2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_equals_uncached(family: str, tmp_path: Path) -> None:
    """A borrowed attention has its own place in the KV cache."""
    model = load(shared(tmp_path, family, SHARED["both"]))
    prompt = tokens(2, 10)
    given = {"attention_mask": torch.ones_like(prompt), **PLAIN}
    uncached = model.generate(prompt, use_cache=False, **given)
    assert torch.equal(model.generate(prompt, use_cache=True, **given), uncached)
    layers = model(prompt).past_key_values.layers
    assert [len(layer.keys) for layer in layers] == [2, 2, 2]
    assert not torch.equal(layers[1].keys, layers[2].keys)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shared_weights_are_stored_once(family: str, tmp_path: Path) -> None:
    """The file is smaller by exactly the tensors of the taking branches, norms included."""
    out = shared(tmp_path, family, SHARED["attention"])
    names = NAMES.get(family, LLAMA)[0]
    before, after = sizes(tmp_path / "source"), sizes(out)
    parts = tuple(f".1.{name}." for name in names)
    gone = {name: size for name, size in before.items() if any(p in name for p in parts)}
    assert len(gone) >= len(names)
    assert sum(before.values()) - sum(after.values()) == sum(gone.values()) > 0
    source, written = Checkpoint(tmp_path / "source"), Checkpoint(out)
    for name in before.keys() - gone.keys():
        again = name if name in after else "lm_head.weight"  # GPT-NeoX has its own name
        assert torch.equal(source.tensor(name), written.tensor(again))


@pytest.mark.parametrize("parts", [SHARED["both"], SHARED["each other's"]], ids=["both", "mutual"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3_text"])
def test_the_walk_reads_it(family: str, parts: dict[str, Any], tmp_path: Path) -> None:
    out = shared(tmp_path, family, parts)
    decoder = Decoder(out)
    stream = Stream(decoder, tokens())
    for _ in walk(stream):
        pass
    walked = torch.cat([part for _, part in stream.logits()])
    torch.testing.assert_close(walked, logits(load(out)))
    assert all(p.is_meta for p in decoder.blocks.layers.parameters())


def test_copies_train_and_pickle_as_the_model_does(tmp_path: Path) -> None:
    """What is borrowed follows the giver: copied, put in training mode, replaced."""
    model = load(shared(tmp_path, "llama", {"reuse_ffn": {1: 2}}, attention_dropout=0.5))
    names = [name for name, _ in model.named_parameters()]
    assert not [n for n in names if "layers.1.mlp" in n or "layers.1.post_att" in n]
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.model.layers[2].mlp.down_proj.weight.zero_()
    expected = logits(built(tiny("llama"), "llama", selection(reuse_ffn={1: 2})))
    torch.testing.assert_close(logits(model), expected)
    silent = selection(drop_ffn=[1, 2])
    torch.testing.assert_close(logits(again), logits(built(tiny("llama"), "llama", silent)))
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_dict() == model.config.to_dict()
    assert config.to_dict()["reused"] == {"1": {"mlp": 2}}


def test_a_borrowed_attention_trains_when_the_model_does(tmp_path: Path) -> None:
    model = load(shared(tmp_path, "llama", {"reuse_attention": {1: 2}}))
    model.train()
    model(tokens(1, 4))
    assert model.model.layers[1].self_attn._module.training
    model.eval()
    model(tokens(1, 4))
    assert not model.model.layers[1].self_attn._module.training


def test_loads_from_the_folder_alone(tmp_path: Path) -> None:
    """In a process that never sees us: logits, padding, cache, and saved once more."""
    expected = {}
    for family in ("llama", "gemma3_text", "gpt2"):
        save_tiny(tmp_path / family, family)
        save_tokenizer(tmp_path / family)
        out = tmp_path / f"out-{family}"
        prune(tmp_path / family, selection(**SHARED["both"]), out, flavour="auto")
        expected[out.name] = logits(built(tiny(family), family, selection(**SHARED["both"])))
    torch.save(tokens(), tmp_path / "ids.pt")
    alone(tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for name, value in expected.items():
        for way in ("", " again", " padded"):
            torch.testing.assert_close(found[name + way], value, rtol=0, atol=1e-4)
        assert torch.equal(found[name + " cached"], found[name + " uncached"])
        assert sizes(tmp_path / name) == sizes(tmp_path / "again" / name)


def test_what_cannot_hold_or_read_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    from compressor.export import ExportParams
    from compressor.export.onnx import export
    from compressor.quantize import METHODS
    from compressor.quantize.driver import quantize

    save_tiny(tmp_path / "wide", "llama", intermediate_size=256)
    chosen = selection(reuse_ffn={1: 2})
    with pytest.raises(NotApplicable, match=r"nemotron-nas: .* another layer's weights"):
        prune(tmp_path / "wide", chosen, tmp_path / "nas", flavour="nemotron-nas")
    prune(tmp_path / "wide", chosen, tmp_path / "out", flavour="auto")
    with pytest.raises(NotApplicable, match="not cut again"):
        prune(tmp_path / "out", selection(drop_blocks=[0]), tmp_path / "again", flavour="auto")
    with pytest.raises(CompressError, match="not quantized yet, prune without re-use"):
        quantize(tmp_path / "out", tmp_path / "q", None, "rtn", METHODS["rtn"].params())
    (tmp_path / "exported").mkdir()
    with pytest.raises(CompressError, match="the graph does not hold yet"):
        export(tmp_path / "out", tmp_path / "exported", ExportParams(formats=("onnx",)))
    assert not list((tmp_path / "exported").iterdir())
    export(tmp_path / "out", tmp_path / "exported", ExportParams(formats=("safetensors",)))
    torch.testing.assert_close(
        logits(load(tmp_path / "exported/safetensors")), logits(load(tmp_path / "out"))
    )


def test_what_is_gone_cannot_be_shared(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    prune(tmp_path / "source", selection(drop_ffn=[2]), tmp_path / "cut", flavour="auto")
    for reuse in ({1: 2}, {2: 1}):
        with pytest.raises(SelectionError, match="block 2 has no mlp left to share"):
            prune(tmp_path / "cut", selection(reuse_ffn=reuse), tmp_path / "out", flavour="auto")
    prune(tmp_path / "cut", selection(reuse_ffn={0: 1}), tmp_path / "out", flavour="auto")
    config = skeleton(tmp_path / "out").config
    assert (config.skipped, config.reused) == ({2: ["mlp"]}, {0: {"mlp": 1}})
    chosen = selection(drop_ffn=[2], reuse_ffn={0: 1})
    expected = logits(built(tiny("llama"), "llama", chosen))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), expected)


def test_branches_of_other_parts_are_not_exchanged() -> None:
    """Another width, or a module inside that counts blocks and would count wrongly."""

    def layers(width: int, counting: bool) -> nn.ModuleList:
        blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block, size in zip(blocks, (8, width), strict=True):
            block.mlp = nn.Sequential(nn.Linear(8, size))
            if counting:
                block.mlp[0].layer_idx = 0
        return blocks

    branches = {"mlp": {"zero": "mlp", "identity": []}}
    _check_exchange(layers(8, False), {0: {"mlp": 1}}, branches)
    for width, counting in ((16, False), (8, True)):
        with pytest.raises(NotApplicable, match="block 0 cannot run with the mlp of block 1"):
            _check_exchange(layers(width, counting), {0: {"mlp": 1}}, branches)
