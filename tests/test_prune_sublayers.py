"""Sublayers removed structurally: equal to silencing them, loadable by anyone, cut again."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compressor.blocks import hidden
from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder, skeleton
from compressor.errors import NotApplicable, SelectionError, UnsupportedArchitecture
from compressor.prune.driver import prune
from compressor.records import Selection
from compressor.sublayers import find_sublayers
from compressor.walk import Stream, walk
from tests.tiny import FAMILIES, save_tiny, save_tokenizer, tiny, tokens

ALL = sorted(FAMILIES)
SELECTIONS = {
    "attention": {"drop_attention": [1, 2]},
    "ffn": {"drop_ffn": [0, 2]},
    "joint": {"drop_attention": [0, 2], "drop_ffn": [1]},
    "with a block": {"drop_blocks": [0], "drop_attention": [2], "drop_ffn": [3]},
}
PLAIN = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def selection(**drop: list[int]) -> Selection:
    return Selection(num_blocks=4, **drop)  # type: ignore[arg-type]


def cut(tmp_path: Path, family: str, drop: dict[str, list[int]], **overrides: Any) -> Path:
    """The folder of a tiny model without `drop`; its source is beside it."""
    save_tiny(tmp_path / "source", family, **overrides)
    prune(tmp_path / "source", selection(**drop), tmp_path / "out", flavour="auto")
    return tmp_path / "out"


def silenced(family: str, drop: dict[str, list[int]], **overrides: Any) -> Any:
    """An independent construction: the whole model, what the branches return made zero."""
    model = tiny(family, **overrides)

    def silence(_: Any, __: Any, out: Any) -> Any:
        zero = torch.zeros_like(hidden(out))
        return (zero, *out[1:]) if isinstance(out, tuple) else zero

    gone = drop.get("drop_blocks", [])
    for index, block in enumerate(find_sublayers(tiny(family, **overrides))):
        for kind in ("attention", "ffn"):
            branch = getattr(block, kind)
            if index in {*gone, *drop.get(f"drop_{kind}", [])}:
                model.get_submodule(branch.last).register_forward_hook(silence)
    return model


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens() if ids is None else ids, use_cache=False).logits
    return out


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("drop", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("family", ALL)
def test_equals_silencing_the_branches(
    family: str, drop: dict[str, list[int]], tmp_path: Path
) -> None:
    model = load(cut(tmp_path, family, drop))
    expected = logits(silenced(family, drop))
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, logits(tiny(family)), atol=1e-2)


@pytest.mark.parametrize("family", ALL)
def test_cached_equals_uncached(family: str, tmp_path: Path) -> None:
    """12 tokens behind a prompt of 10: sliding windows of 8 move, on their own cache layers."""
    model = load(cut(tmp_path, family, SELECTIONS["joint"]))
    prompt = tokens(2, 10)
    given = {"attention_mask": torch.ones_like(prompt), **PLAIN}
    uncached = model.generate(prompt, use_cache=False, **given)
    assert torch.equal(model.generate(prompt, use_cache=True, **given), uncached)
    static = model.generate(prompt, cache_implementation="static", **given)
    assert torch.equal(static, uncached)
    assert [len(layer.keys) for layer in model(prompt).past_key_values.layers] == [2, 2]


@pytest.mark.parametrize("family", ALL)
def test_the_native_class_cannot_load_it(family: str, tmp_path: Path) -> None:
    """It would find every tensor it looks for but those removed, and make these up."""
    out = cut(tmp_path, family, SELECTIONS["joint"])
    native = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    with pytest.raises(StrictDataclassError, match="trust_remote_code=True"):
        native.from_pretrained(out)


@pytest.mark.parametrize("drop", SELECTIONS.values(), ids=SELECTIONS)
def test_equals_a_llama_whose_forward_is_rewritten(
    drop: dict[str, list[int]], tmp_path: Path
) -> None:
    """The same without hooks and without our view of the model: modules deleted, forward ours."""
    model = tiny("llama")

    def forward(self: Any, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        if hasattr(self, "self_attn"):
            normed = self.input_layernorm(hidden_states)
            hidden_states = hidden_states + self.self_attn(hidden_states=normed, **rest)[0]
        if hasattr(self, "mlp"):
            normed = self.post_attention_layernorm(hidden_states)
            hidden_states = hidden_states + self.mlp(normed)
        return hidden_states

    for index, layer in enumerate(model.model.layers):
        whole = index in drop.get("drop_blocks", [])
        if whole or index in drop.get("drop_attention", []):
            del layer.self_attn, layer.input_layernorm
        if whole or index in drop.get("drop_ffn", []):
            del layer.mlp, layer.post_attention_layernorm
        layer.forward = forward.__get__(layer)
    again = load(cut(tmp_path, "llama", drop))
    assert torch.equal(logits(again), logits(model))


def sizes(folder: Path) -> dict[str, int]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name).nbytes for name in checkpoint.names}


@pytest.mark.parametrize(
    ("family", "drop"),
    [*((family, "joint") for family in ALL), ("llama", "attention"), ("llama", "ffn")],
)
def test_exactly_the_removed_tensors_are_gone(family: str, drop: str, tmp_path: Path) -> None:
    out = cut(tmp_path, family, SELECTIONS[drop])
    before, after = sizes(tmp_path / "source"), sizes(out)
    removed: set[str] = set()
    for index, block in enumerate(find_sublayers(tiny(family))):
        for kind in ("attention", "ffn"):
            if index in SELECTIONS[drop].get(f"drop_{kind}", []):
                branch = getattr(block, kind)
                modules = (*branch.modules, *branch.norms)
                removed |= {n for n in before if n.startswith(tuple(f"{m}." for m in modules))}
    assert removed
    renamed = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX, whose file has its own name
    kept = {renamed.get(name, name): size for name, size in before.items() if name not in removed}
    assert kept == after
    assert sum(before.values()) - sum(after.values()) == sum(before[name] for name in removed)


def test_every_kept_tensor_is_carried_bitwise(tmp_path: Path) -> None:
    out = cut(tmp_path, "llama", SELECTIONS["with a block"])
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(out)
    for name in after.names:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) + 1)  # block 0 is gone
        assert torch.equal(after.tensor(name), before.tensor(".".join(parts)))


def test_a_block_that_loses_both_sublayers_goes_whole(tmp_path: Path) -> None:
    """In two cuts, of which the second counts in the model that the first one left."""
    first = cut(tmp_path, "gemma3_text", {"drop_blocks": [0], "drop_attention": [2]})
    again = Selection(num_blocks=3, drop_attention=[0], drop_ffn=[1])
    prune(first, again, tmp_path / "again", flavour="auto")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}}
    assert config["base_config"]["layer_types"] == ["full_attention", "full_attention"]
    expected = silenced("gemma3_text", {"drop_blocks": [0, 2], "drop_attention": [1]})
    model = load(tmp_path / "again")
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
    last = Selection(num_blocks=2, drop_blocks=[0])
    prune(tmp_path / "again", last, tmp_path / "native", flavour="auto")
    native = load(tmp_path / "native")
    assert type(native).__module__.startswith("transformers.")
    expected = silenced("gemma3_text", {"drop_blocks": [0, 1, 2]})
    torch.testing.assert_close(logits(native), logits(expected), rtol=0, atol=1e-6)
    assert not list((tmp_path / "native").glob("*.py"))


def test_masks_go_by_block_and_the_cache_by_attention(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    out = cut(tmp_path, "gemma3_text", {"drop_attention": [0]}, layer_types=kinds)
    config = skeleton(out).config
    assert config.layer_types == kinds
    cached = config.get_text_config(decoder=True)
    assert cached.layer_types == kinds[1:]
    assert [layer.is_sliding for layer in DynamicCache(config=cached).layers] == [0, 0, 1]
    assert config.num_hidden_layers == len(config.layer_types) == 4
    again = pickle.loads(pickle.dumps(config))
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict() == copy.deepcopy(config).to_dict()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3_text"])
def test_the_walk_reads_it(family: str, tmp_path: Path) -> None:
    out = cut(tmp_path, family, SELECTIONS["joint"])
    stream = Stream(Decoder(out), tokens())
    for _ in walk(stream):
        pass
    walked = torch.cat([part for _, part in stream.logits()])
    torch.testing.assert_close(walked, logits(load(out)))
    branches = find_sublayers(skeleton(out))
    assert [b.attention is None for b in branches] == [True, False, True, False]
    assert [b.ffn is None for b in branches] == [False, True, False, False]


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ({"drop_attention": [0, 1, 2, 3]}, "no attention would be left"),
    ],
)
def test_impossible_selections_are_refused(drop: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises((SelectionError, NotApplicable), match=said):
        cut(tmp_path, "llama", drop)
    assert not (tmp_path / "out").exists()


def test_what_is_gone_cannot_be_removed_again(tmp_path: Path) -> None:
    out = cut(tmp_path, "llama", {"drop_attention": [1]})
    with pytest.raises(SelectionError, match="block 1 has no attention left to remove"):
        prune(out, selection(drop_attention=[1]), tmp_path / "again", flavour="auto")


def test_blocks_without_branches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match="post-norm"):
        cut(tmp_path, "opt", {"drop_ffn": [1]}, do_layer_norm_before=False)


def test_code_of_the_source_is_never_carried_or_run(tmp_path: Path) -> None:
    out = cut(tmp_path, "llama", SELECTIONS["joint"])
    ours = (out / "modeling_shallow.py").read_text()
    for name in ("modeling_shallow.py", "configuration_shallow.py", "setup.py"):
        (out / name).write_text("raise SystemExit('code of the folder ran')\n")
    load(out)
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    prune(out, selection(drop_ffn=[3]), tmp_path / "again", flavour="auto")
    assert (tmp_path / "again/modeling_shallow.py").read_text() == ours
    assert not (tmp_path / "again/setup.py").exists()


ALONE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith(("compressor", "pipelines")) for name in sys.modules)
root, found = Path(sys.argv[1]), {}
ids = torch.load(root / "ids.pt")
padded = torch.cat([torch.zeros(len(ids), 3, dtype=torch.long), ids], 1)
mask = (padded > 0).long()
plain = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
for folder in sorted(root.glob("out-*")):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        raise SystemExit(f"{folder} loads without its code")
    except ValueError:
        pass
    AutoTokenizer.from_pretrained(folder)
    trusted = dict(trust_remote_code=True, output_loading_info=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, **trusted)
    model.eval().save_pretrained(root / "again" / folder.name)
    again, more = AutoModelForCausalLM.from_pretrained(root / "again" / folder.name, **trusted)
    assert not any([*info.values(), *more.values()]), (info, more)
    with torch.no_grad():
        found[folder.name] = model(ids).logits
        found[folder.name + " again"] = again.eval()(ids).logits
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        found[folder.name + " padded"] = left.logits[:, 3:].contiguous()
    cached = model.generate(padded, attention_mask=mask, use_cache=True, **plain)
    found[folder.name + " cached"] = cached
    uncached = model.generate(padded, attention_mask=mask, use_cache=False, **plain)
    found[folder.name + " uncached"] = uncached
save_file(found, root / "found.safetensors")
"""


def test_loads_from_the_folder_alone(tmp_path: Path) -> None:
    """In a process that never sees us: logits, padding, cache, and saved once more."""
    expected = {}
    for family in ("llama", "gemma3_text", "gpt2"):
        save_tiny(tmp_path / family, family)
        save_tokenizer(tmp_path / family)
        for name in ("attention", "ffn", "joint"):
            out = tmp_path / f"out-{family}-{name}"
            prune(tmp_path / family, selection(**SELECTIONS[name]), out, flavour="auto")
            expected[out.name] = logits(silenced(family, SELECTIONS[name]))
    save_tiny(tmp_path / "wide", "llama", intermediate_size=256)
    save_tokenizer(tmp_path / "wide")
    drop = {"drop_attention": [1], "drop_ffn": [0, 2]}
    prune(tmp_path / "wide", selection(**drop), tmp_path / "out-nas", flavour="nemotron-nas")
    expected["out-nas"] = logits(silenced("llama", drop, intermediate_size=256))
    torch.save(tokens(), tmp_path / "ids.pt")
    alone(tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for name, value in expected.items():
        for way in ("", " again", " padded"):
            torch.testing.assert_close(found[name + way], value, rtol=0, atol=1e-4)
        assert torch.equal(found[name + " cached"], found[name + " uncached"])


def alone(folder: Path) -> None:
    """Run `ALONE` over the `out-*` folders of `folder`, away from this repository."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_settings_of_single_blocks_are_refused(tmp_path: Path) -> None:
    """Also a `llama` that says `skip`, which transformers builds with all its blocks."""
    save_tiny(tmp_path / "source", "llama")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text()) | {"per_layer_config": {"1": {"skip": ["mlp"]}}}
    path.write_text(json.dumps(config))
    for drop in ({"drop_blocks": [2]}, {"drop_ffn": [2]}):
        with pytest.raises(UnsupportedArchitecture, match="settings of their own"):
            prune(tmp_path / "source", selection(**drop), tmp_path / "out", flavour="auto")
