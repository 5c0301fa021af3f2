"""Structural removal equals deleting modules, in every family."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint, CheckpointWriter
from compressor.errors import CheckpointError, SelectionError, UnsupportedArchitecture
from compressor.prune import blocks as prune_module
from compressor.prune.blocks import prune
from compressor.records import Selection
from tests.tiny import FAMILIES, save_tiny, save_tokenizer, tokens

ALL = sorted(FAMILIES)


def cut(tmp_path: Path, family: str, drop: list[int], **overrides: Any) -> tuple[Any, Path]:
    """(original model, folder without `drop`)."""
    model = save_tiny(tmp_path / "source", family, **overrides)
    prune(tmp_path / "source", Selection(num_blocks=4, drop_blocks=drop), tmp_path / "out")
    return model, tmp_path / "out"


def deleted(model: Any, drop: list[int]) -> Any:
    """An independent construction: the modules taken out of the live model."""
    model = copy.deepcopy(model)
    blocks = Blocks(model)
    kept = [block for i, block in enumerate(blocks.layers) if i not in drop]
    parent = model.get_submodule(blocks.prefix.rpartition(".")[0])
    setattr(parent, blocks.prefix.rpartition(".")[2], nn.ModuleList(kept))
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        kinds = [k for i, k in enumerate(model.config.layer_types) if i not in drop]
        model.config.layer_types = kinds
    return model


@pytest.mark.parametrize("family", ALL)
def test_removing_nothing_changes_no_bit(family: str, tmp_path: Path) -> None:
    model, out = cut(tmp_path, family, [])
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("drop", [[1, 2], [0], [0, 3], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("family", ALL)
def test_equals_deleting_modules(family: str, drop: list[int], tmp_path: Path) -> None:
    model, out = cut(tmp_path, family, drop)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again.eval()
    with torch.no_grad():
        expected = deleted(model, drop)(tokens(), use_cache=False).logits
        assert torch.equal(again(tokens(), use_cache=False).logits, expected)
        assert not torch.equal(expected, model(tokens()).logits)
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = tokens(2, 10)
    mask = torch.ones_like(prompt)
    cached = again.generate(prompt, attention_mask=mask, use_cache=True, **plain)
    assert torch.equal(
        cached, again.generate(prompt, attention_mask=mask, use_cache=False, **plain)
    )


def test_per_layer_lists_are_cut(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    _, out = cut(tmp_path, "gemma3_text", [0, 2], layer_types=kinds)
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"]


def test_derived_lists_are_written_out(tmp_path: Path) -> None:
    """Qwen derives layer_types from max_window_layers; a shallower model would derive others."""
    save_tiny(tmp_path / "source", "qwen3", use_sliding_window=True, max_window_layers=2)
    path = tmp_path / "source/config.json"
    raw = json.loads(path.read_text())
    kinds = raw.pop("layer_types")
    path.write_text(json.dumps(raw))
    prune(tmp_path / "source", Selection(num_blocks=4, drop_blocks=[0, 1]), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == kinds[2:]


def test_a_list_that_is_long_by_accident_is_kept(tmp_path: Path) -> None:
    _, out = cut(tmp_path, "llama", [1], eos_token_id=[2, 3, 4, 5])
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 3, 4, 5]


def test_the_depth_keeps_the_name_the_family_gives_it(tmp_path: Path) -> None:
    _, out = cut(tmp_path, "gpt2", [1])
    config = json.loads((out / "config.json").read_text())
    assert config["n_layer"] == 3
    assert "num_hidden_layers" not in config


def test_a_list_that_transformers_derives_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its layer_types, a cut Qwen would get sliding attention where it had none."""
    written = prune_module.pruned_config

    def forgetful(*args: Any) -> dict[str, Any]:
        return {k: v for k, v in written(*args).items() if k != "layer_types"}

    monkeypatch.setattr(prune_module, "pruned_config", forgetful)
    with pytest.raises(UnsupportedArchitecture, match=r"config\.layer_types cannot be cut"):
        cut(tmp_path, "qwen3", [0], use_sliding_window=True, max_window_layers=2)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_names_without_the_first_part_are_renumbered(family: str, tmp_path: Path) -> None:
    """GPT-2 and OPT were published without the name of the model before their tensors."""
    model = save_tiny(tmp_path / "source", family)
    source = Checkpoint(tmp_path / "source")
    with CheckpointWriter(tmp_path / "bare") as writer:
        for name in source.names:
            writer.add(name.partition(".")[2], source.tensor(name))
        writer.finish(source.config, source.side_files)
    prune(tmp_path / "bare", Selection(num_blocks=4, drop_blocks=[0, 2]), tmp_path / "out")
    assert len(Checkpoint(tmp_path / "out").names) < len(source.names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = deleted(model, [0, 2])(tokens(), use_cache=False).logits
        assert torch.equal(again(tokens(), use_cache=False).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ties_stay_and_nothing_is_doubled(family: str, tmp_path: Path) -> None:
    model, out = cut(tmp_path, family, [1], tie_word_embeddings=True)
    assert not any("lm_head" in name for name in Checkpoint(out).names)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_shards_in_one_file_out(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for name in ("one", "many"):
        prune(tmp_path / name, Selection(num_blocks=4, drop_blocks=[2]), tmp_path / f"{name}-out")
    one, many = Checkpoint(tmp_path / "one-out"), Checkpoint(tmp_path / "many-out")
    assert sorted(one.names) == sorted(many.names)
    assert all(torch.equal(one.tensor(n), many.tensor(n)) for n in one.names)


def test_side_files_are_carried_bytewise(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny(source, "llama")
    save_tokenizer(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("of the parent")
    prune(source, Selection(num_blocks=4, drop_blocks=[2]), tmp_path / "out")
    carried = ["chat_template.jinja", "generation_config.json", "tokenizer.json"]
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out/README.md").exists()


def test_half_precision_is_carried(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    prune(tmp_path / "half", Selection(num_blocks=4, drop_blocks=[2]), tmp_path / "out")
    assert Checkpoint(tmp_path / "out").dtype == torch.bfloat16


def test_wrong_depth_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    with pytest.raises(SelectionError, match=r"for a model of 6 blocks, but .* has 4"):
        prune(tmp_path / "source", Selection(num_blocks=6, drop_blocks=[5]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_depth_dependent_arithmetic_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="scale_attn_by_inverse_layer_idx"):
        cut(tmp_path, "gpt2", [1], scale_attn_by_inverse_layer_idx=True)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("diffllama", r"block 2 cannot become block 1: its self_attn\.lambda_init would turn"),
        ("mixtral", "fused experts"),
        ("mamba", "a state-space convolution"),
        ("t5", "encoder-decoder models are not supported"),
    ],
)
def test_unsupported_arithmetic_is_refused(family: str, said: str, tmp_path: Path) -> None:
    """DiffLlama weighs a block by its index, by no switch of its config."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 96}
    if family == "t5":
        sizes = {"d_model": 32, "d_ff": 48, "num_layers": 4, "num_heads": 4, "vocab_size": 96}
    elif family != "mamba":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    maker = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    maker.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedArchitecture, match=said) as refusal:
        prune(tmp_path / "source", Selection(num_blocks=4, drop_blocks=[1]), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_quantized_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="prune the dense checkpoint"):
        prune(tmp_path / "source", Selection(num_blocks=4, drop_blocks=[1]), tmp_path / "out")
