"""Healing: learns, merges exactly, resumes to the bit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint
from compressor.errors import HealingError
from compressor.heal import LoraParams, QloraParams, train
from compressor.heal.lora import adapter, target_names
from compressor.heal.merge import merge
from compressor.heal.presets import PRESETS
from compressor.heal.trainer import HealingTrainer
from tests.healing import PARAMS, WINDOWS, digest, interrupted, run, task
from tests.tiny import FAMILIES, save_tiny, tiny


def test_it_learns_what_it_is_shown(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source", "llama")
    params = PARAMS.model_copy(update={"steps": 60, "targets": "all", "save_every": 100})
    report, out = run(tmp_path, params)
    healed = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        before, after = (float(m(WINDOWS, labels=WINDOWS).loss) for m in (model, healed))
    assert after < 0.8 * before
    assert report["tokens"] == 60 * 2 * 16
    assert report["passes"] == 20
    assert report["last_loss"] < report["first_loss"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_merged_is_base_plus_adapter(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", family)
    _, out = run(tmp_path, PARAMS.model_copy(update={"targets": "all", "alpha": 7.0}))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert_merged(base, out)


def assert_merged(base: Any, out: Path) -> None:
    """The merged checkpoint computes what the adapter on the dense base does."""
    with torch.no_grad():
        plain = base(WINDOWS).logits
        adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()(WINDOWS).logits
        merged = AutoModelForCausalLM.from_pretrained(out).eval()(WINDOWS).logits
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_zero_adapter_changes_no_bit(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama").half().save_pretrained(tmp_path / "source")
    _, out = run(tmp_path)
    path = out / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    zeros = {n: torch.zeros_like(w) if "lora_B" in n else w for n, w in weights.items()}
    assert any(weights[n].any() for n in weights if "lora_B" in n)
    save_file(zeros, path)
    merge(tmp_path / "source", out / "adapter", tmp_path / "merged")
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(tmp_path / "merged")
    assert sorted(before.names) == sorted(after.names)
    assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in before.names)


def test_only_the_targets_change(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    _, out = run(tmp_path)
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(out)
    assert sorted(before.names) == sorted(after.names)
    changed = {n for n in before.names if not torch.equal(before.tensor(n), after.tensor(n))}
    assert changed == {n for n in before.names if ".mlp." in n}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_targets_are_found_in_every_family(family: str) -> None:
    blocks = Blocks(tiny(family))
    ffn, everything = target_names(blocks, "ffn"), target_names(blocks, "all")
    assert len(ffn) == 4 * {"phi3": 2, "gpt2": 2, "opt": 2, "gpt_neox": 2}.get(family, 3)
    assert set(ffn) < set(everything)
    assert not any("attn" in name or "attention" in name for name in ffn)


def test_qlora_trains_on_four_bits_and_merges_into_dense_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", hidden_size=64, intermediate_size=64)
    params = QloraParams(**PARAMS.model_dump())
    model = adapter(task(tmp_path, params)).model
    inner = [m for n, m in model.named_modules() if n.endswith("up_proj.base_layer")]
    assert len(inner) == 4
    assert all(isinstance(m, Linear4bit) and m.weight.quant_type == "nf4" for m in inner)
    assert all(m.weight.quant_state.nested for m in inner)
    _, out = run(tmp_path, params)
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(out)
    name = "model.layers.1.mlp.up_proj.weight"
    difference = (before.tensor(name) - after.tensor(name)).norm() / before.tensor(name).norm()
    assert 0 < difference < 0.05  # the adapter alone; four bits would be off by more
    assert "quantization_config" not in after.config


def test_qlora_has_the_same_gradient_behind_an_evaluation(tmp_path: Path) -> None:
    """bitsandbytes turns weights into a layout for inference that it cannot train through."""
    save_tiny(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    params = QloraParams(rank=4, targets="all", dropout=0)
    model: Any = adapter(task(tmp_path, params)).model.train()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(WINDOWS, labels=WINDOWS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradient()
    with torch.no_grad():
        model.eval()(WINDOWS)
    model.train()
    assert before.norm() > 0
    torch.testing.assert_close(gradient(), before)


def test_qlora_on_transposed_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "gpt2", n_embd=64)
    _, out = run(tmp_path, QloraParams(**PARAMS.model_dump() | {"targets": "all"}))
    assert_merged(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), out)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    save_tiny(tmp_path / "shallower", "llama", num_hidden_layers=3)
    _, out = run(tmp_path)
    with pytest.raises(HealingError, match=r"no tensor model\.layers\.3\.mlp\.\w+\.weight for"):
        merge(tmp_path / "shallower", out / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("damage", ["none", "no state", "half a state", "no optimizer yet"])
def test_resumes_to_the_same_bits(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "source", "llama")
    _, whole = run(tmp_path)
    work = interrupted(tmp_path, monkeypatch, 7)
    assert sorted(p.name for p in work.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    newest = work / "checkpoint-6"
    state = newest / "trainer_state.json"
    if damage != "none":
        text = state.read_text()
        state.unlink()
        if damage == "half a state":
            state.write_text(text[: len(text) // 2])
        if damage == "no optimizer yet":
            (newest / "optimizer.pt").unlink()
    steps: list[int] = []
    log = HealingTrainer.log

    def watched(self: Any, logs: Any, start_time: Any = None) -> None:
        if "loss" in logs:
            steps.append(self.state.global_step)
        log(self, logs, start_time)

    monkeypatch.setattr(HealingTrainer, "log", watched)
    _, again = run(tmp_path, name="cut")
    assert steps[0] == (7 if damage == "none" else 4)
    assert digest(again) == digest(whole)
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_resumes_inside_a_later_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six windows by four: steps of four and two windows, in turn."""
    uneven = PARAMS.model_copy(update={"batch_size": 4, "micro_batch_size": 2})
    save_tiny(tmp_path / "source", "llama")
    report, whole = run(tmp_path, uneven)
    assert report["tokens"] == 4 * (4 + 2) * 16
    assert report["passes"] == 4
    interrupted(tmp_path, monkeypatch, 5, uneven)
    resumed, again = run(tmp_path, uneven, "cut")
    assert resumed == report
    assert digest(again) == digest(whole)


def test_checkpoint_may_be_cut_off_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "source", "llama")
    for _ in range(2):
        work = interrupted(tmp_path, monkeypatch, 7)
        (work / "checkpoint-6/trainer_state.json").unlink()
    assert train._whole_checkpoint(work) == str(work / "checkpoint-3")
    assert [p.name for p in work.iterdir()] == ["checkpoint-3"]


def test_metrics_are_one_row_per_step_without_clock(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    _, out = run(tmp_path)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row.keys() == {"grad_norm", "learning_rate", "loss", "step"} for row in rows)


def test_lost_loss_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "source", "llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(HealingError, match=r"the loss is nan at step 1; lower heal\.learning_rate"):
        run(tmp_path)


def test_lost_gradient_is_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "source", "llama")
    clip = Accelerator.clip_grad_norm_
    calls = itertools.count(1)

    def spoil(self: Any, parameters: Any, *rest: Any) -> Any:
        parameters = list(parameters)
        if next(calls) == PARAMS.steps:
            next(p for p in parameters if p.grad is not None).grad.fill_(torch.nan)
        return clip(self, parameters, *rest)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", spoil)
    with pytest.raises(HealingError, match=r"the grad_norm is nan at step 8; lower heal\."):
        run(tmp_path)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_uneven_batches_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    with pytest.raises(HealingError, match="batch_size 3 is not a multiple of micro_batch_size 2"):
        run(tmp_path, PARAMS.model_copy(update={"batch_size": 3, "micro_batch_size": 2}))


def test_many_passes_over_few_windows_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path / "source", "llama")
    run(tmp_path, PARAMS.model_copy(update={"steps": 40}))
    assert "40 steps of 2 windows go 13 times over 6 windows" in caplog.text


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_parameters_and_what_is_given_wins(name: str) -> None:
    preset = LoraParams.model_validate({"preset": name})
    assert preset.model_dump() == LoraParams.model_validate(PRESETS[name]).model_dump()
    assert "preset" not in preset.model_dump()
    assert QloraParams.model_validate({"preset": name, "rank": 7}).rank == 7
    assert preset.alpha in (None, 16)


def test_published_settings() -> None:
    """arXiv:2403.17887 appendix A.1, the table of peak rates and ranks."""
    table = {"llama-2-7b": (3e-4, 2), "llama-2-70b": (3e-5, 8), "mistral-7b": (3e-6, 4)}
    found = {n: (PRESETS[n]["learning_rate"], PRESETS[n]["rank"]) for n in table}
    assert found == table
    with pytest.raises(ValidationError, match=r"no preset 'llama-2-7' \(did you mean 'llama-2-7b'"):
        LoraParams.model_validate({"preset": "llama-2-7"})
