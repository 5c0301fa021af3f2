"""Distillation: the parent's outputs on disk, the losses, and what training makes of them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax
from transformers import AutoModelForCausalLM

from compressor import teacher
from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint
from compressor.errors import (
    ArtifactError,
    CheckpointError,
    CompressError,
    HealingError,
    SelectionError,
)
from compressor.heal import DistillParams, distillation
from compressor.heal.distill import recognise, student
from compressor.heal.distillation import (
    chunked,
    distribution_loss,
    divergence,
    hidden_loss,
    outputs_of,
)
from compressor.prune.blocks import prune
from compressor.prune.driver import prune as remove
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.records import Selection
from compressor.targets import Targets, Teacher, buckets, fingerprints, normalised
from tests.healing import WINDOWS, digest, interrupted, run, task
from tests.tiny import save_tiny, save_tokenizer, tokens

PARAMS = DistillParams(
    rank=4, steps=8, warmup_steps=2, batch_size=2, save_every=3, learning_rate=1e-2,
    teacher_dtype="float32", validation=0,
)  # fmt: skip


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(p_logits: Tensor, q_logits: Tensor, tau: float = 1.0) -> Tensor:
    """KL of one pair of distributions, by the sum that defines it, in float64."""
    p, q = (softmax(z.double() / tau, -1) for z in (p_logits, q_logits))
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q, strict=True):
        total = total + a * (a.log() - b.log())
    return total


# The divergence


def test_the_vector() -> None:
    """T4: KL of (2, 1, 0) to (1, 1, 0.5), and not of (1, 1, 0.5) to (2, 1, 0)."""
    full, cut = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.5])
    assert divergence(cut, full).item() == pytest.approx(0.170640, abs=1e-6)
    assert divergence(full, cut).item() == pytest.approx(0.182282, abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_divergence_is_the_sum(tau: float) -> None:
    q, p = noise(5, 40), noise(5, 40, seed=1)
    expected = torch.stack([tau**2 * naive(a, b, tau) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(divergence(q, p, tau).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_its_gradient_is_that_of_the_sum(tau: float) -> None:
    q, p = noise(3, 20).double().requires_grad_(), noise(3, 20, seed=1).double()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    summed = torch.stack([tau**2 * naive(a, b, tau) for a, b in zip(p, q, strict=True)])
    (expected,) = torch.autograd.grad(weights @ summed, q)
    (found,) = torch.autograd.grad(weights @ divergence(q, p, tau), q)
    torch.testing.assert_close(found, expected)


def test_a_high_temperature_compares_logits() -> None:
    """tau^2 KL -> half the variance of the difference of the logits over the V tokens."""
    q, p = noise(30), noise(30, seed=1)
    limit = (p - q).double().var(correction=0) / 2
    assert divergence(q.double(), p.double(), 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_nothing_to_learn_is_exactly_nothing(tau: float) -> None:
    z = noise(7, 50).requires_grad_()
    shifted = (z - z.amax(-1, keepdim=True)).detach()
    loss = divergence(z, shifted, tau)
    assert torch.equal(loss, torch.zeros(7))
    assert not torch.autograd.grad(loss.sum(), z)[0].any()


# Top k and the rest


def test_buckets_are_probabilities() -> None:
    z = noise(4, 30)
    chosen = z.topk(5).indices
    kept = softmax(buckets(z, chosen), -1)
    p = softmax(z, -1)
    torch.testing.assert_close(kept[:, :5], p.gather(-1, chosen))
    torch.testing.assert_close(kept[:, 5], 1 - p.gather(-1, chosen).sum(-1))


def test_fewer_buckets_tell_less() -> None:
    """The data-processing inequality, from one bucket, which tells nothing, to all tokens."""
    q, p = noise(4, 30).double(), noise(4, 30, seed=1).double()
    exact = divergence(q, p)
    told = []
    for k in range(1, 31):
        chosen = p.topk(k).indices
        told.append(divergence(buckets(q, chosen), buckets(p, chosen)))
    for less, more in zip(told, [*told[1:], exact], strict=True):
        assert (less <= more + 1e-12).all()
    assert (told[0] < exact - 1e-3).all()
    torch.testing.assert_close(told[-1], exact)


def test_the_gradient_goes_through_the_rest() -> None:
    q, p = noise(3, 12).double().requires_grad_(), noise(3, 12, seed=1).double()
    chosen = p.topk(4).indices

    def by_hand(z: Tensor) -> Tensor:
        a, b = (softmax(x, -1) for x in (p, z))
        a_k, b_k = a.gather(-1, chosen), b.gather(-1, chosen)
        a_r, b_r = 1 - a_k.sum(-1), 1 - b_k.sum(-1)
        return ((a_k * (a_k / b_k).log()).sum(-1) + a_r * (a_r / b_r).log()).sum()

    (expected,) = torch.autograd.grad(by_hand(q), q)
    loss = divergence(buckets(q, chosen), buckets(p, chosen)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected)


# The loss of a micro batch


def example(k: int | None = None) -> tuple[Tensor, Targets, Tensor]:
    logits = noise(2, 9, 30).requires_grad_()
    said = noise(2, 9, 30, seed=1)
    chosen = None if k is None else said.topk(k).indices
    return logits, Targets(buckets(said, chosen), chosen, {}), tokens(2, 9).remainder(30)


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_chunks_change_nothing(
    k: int | None, ce_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets, text = example(k)
    apart = divergence(buckets(logits, targets.indices), targets.logits).mean()
    entropy = cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    whole = (1 - ce_weight) * apart + ce_weight * entropy
    (expected,) = torch.autograd.grad(3 * whole, logits)
    for rows in (1, 5, 100):
        monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 30 * rows)
        loss = distribution_loss(logits, targets, text, tau=1.0, ce_weight=ce_weight)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(torch.autograd.grad(3 * loss, logits)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(
            distribution_loss(logits, targets, text, tau=1.0, ce_weight=ce_weight), whole
        )


def test_chunks_are_as_small_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 30 * 2)
    seen: list[int] = []

    def part(z: Tensor, rows: slice) -> Tensor:
        assert z.dtype == torch.float32
        seen.append(len(z))
        return z.square().sum()

    logits = noise(5, 30).bfloat16().requires_grad_()
    loss = chunked(logits, part)
    assert seen == [2, 2, 1]
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


def test_hidden_states_are_compared_behind_a_norm() -> None:
    x, y = noise(2, 3, 8), noise(2, 3, 8, seed=1)

    def mean_square(a: Tensor, b: Tensor) -> Tensor:
        a, b = (z / z.square().mean(-1, keepdim=True).sqrt() for z in (a, b))
        return (a - b).square().mean()

    targets = Targets(x, None, {1: normalised(y), 3: normalised(x)})
    expected = (mean_square(x, y) + mean_square(5 * x, x)) / 2
    torch.testing.assert_close(hidden_loss({1: x, 3: 5 * x}, targets, {}), expected)
    turn = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        turn.weight.copy_(-torch.eye(8))
    targets = Targets(x, None, {1: -normalised(x)})
    assert hidden_loss({1: x}, targets, {1: turn}) == 0


# The parent's outputs on disk


def cached(folder: Path, **own: Any) -> tuple[dict[str, Any], Path]:
    """What folder/parent says of the windows, in folder/teacher."""
    out = folder / "teacher"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    asked: dict[str, Any] = {"teacher_dtype": "float32", "top_k": None, "hidden": ()} | own
    report = teacher.cache(
        folder / "parent", out, folder / "teacher-work", WINDOWS, batch_size=1, **asked
    )
    return report, out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_the_outputs_are_the_models_own(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", family)
    _, out = cached(tmp_path, hidden=(0, 2))
    with torch.no_grad():
        expected = model(WINDOWS, output_hidden_states=True)
    found = Teacher(out).targets([4, 0, 5])
    z = expected.logits[[4, 0, 5]]
    torch.testing.assert_close(found.logits, z - z.amax(-1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert sorted(found.hidden) == [0, 2]
    for block, x in found.hidden.items():
        own = normalised(expected.hidden_states[block + 1][[4, 0, 5]])
        torch.testing.assert_close(x, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-6), ("bfloat16", 1e-4)])
def test_what_rounding_costs(dtype: str, limit: float, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", "llama")
    report, out = cached(tmp_path, teacher_dtype=dtype)
    assert report["bytes"] == 6 * 16 * 96 * 2
    with torch.no_grad():
        logits = model(WINDOWS).logits.double()
    stored = Teacher(out).targets(list(range(6))).logits.double()
    assert 0 < divergence(stored, logits).mean() < limit


def test_the_likeliest_and_the_rest(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", "llama")
    report, out = cached(tmp_path, top_k=5, hidden=(1,))
    assert report["bytes"] == 6 * 16 * (4 * 6 + 4 * 5 + 4 * 32)
    with torch.no_grad():
        p = softmax(model(WINDOWS).logits, -1)
    found = Teacher(out).targets(list(range(6)))
    assert found.indices is not None
    assert torch.equal(found.indices, p.topk(5).indices)
    kept = softmax(found.logits, -1)
    torch.testing.assert_close(kept[..., :5], p.topk(5).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[..., 5], 1 - p.topk(5).values.sum(-1), rtol=1e-4, atol=1e-5)


def test_the_forecast_is_what_the_files_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    monkeypatch.setattr(teacher, "SHARD_BYTES", 2 * 16 * 100 * 4)
    report, out = cached(tmp_path, hidden=(3,))
    files = sorted(out.glob("*.safetensors"))
    assert [f.stem for f in files] == [f"windows-{i:06d}-{i + 1:06d}" for i in range(6)]
    headers = 6 * 300
    assert 0 <= sum(f.stat().st_size for f in files) - report["bytes"] < headers


def test_a_full_disk_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: small)
    monkeypatch.setattr(teacher, "walk", None)
    with pytest.raises(ArtifactError, match=r"take 0\.00 GiB, but only 0\.00 GiB are free; set"):
        cached(tmp_path)


def test_outputs_that_overflow_are_not_stored(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "parent", "llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    model.save_pretrained(tmp_path / "parent")
    with pytest.raises(CompressError, match=r"parent: its logits overflow in torch\.float32"):
        cached(tmp_path)
    assert not list((tmp_path / "teacher").iterdir())


def test_killed_outputs_go_on_behind_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    monkeypatch.setattr(teacher, "SHARD_BYTES", 1)
    monkeypatch.setattr(teacher, "WALK_TOKENS", 32)
    _, out = cached(tmp_path)
    whole = {f.name: f.read_bytes() for f in out.iterdir()}
    shutil.rmtree(tmp_path / "teacher-work")
    write, written = teacher._write, []

    def killed(tensors: dict[str, Tensor], path: Path) -> None:
        if len(written) == 3:
            path.with_suffix(".part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        write(tensors, path)

    monkeypatch.setattr(teacher, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path)
    monkeypatch.setattr(teacher, "_write", lambda t, p: (written.append(p.name), write(t, p)))
    _, out = cached(tmp_path)
    assert len(written) == len(set(written)) == 6
    assert {f.name: f.read_bytes() for f in out.iterdir()} == whole


def test_what_the_parent_has_not_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "parent", "llama")
    with pytest.raises(SelectionError, match=r"hidden \[4\]: .* has the blocks 0 to 3"):
        cached(tmp_path, hidden=(1, 4))
    with pytest.raises(SelectionError, match=r"top_k 96: .* has 96 tokens"):
        cached(tmp_path, top_k=96)
    with pytest.raises(ValueError, match="top_k keeps the mass of the rest for tau 1 only"):
        DistillParams(top_k=5, tau=2.0)
    with pytest.raises(ValueError, match="reset_documents: the parent has read"):
        DistillParams(reset_documents=True)


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ({"vocab_size": 97}, "its vocabulary has 97 tokens, its parent's 96; give the parent"),
        ({"num_hidden_layers": 5}, "it has 5 blocks, its parent only 4; give the parent"),
    ],
)
def test_a_stranger_is_refused_before_the_walk(
    child: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    save_tiny(tmp_path / "source", "llama", **child)
    monkeypatch.setattr(teacher, "walk", None)
    with pytest.raises(CheckpointError, match=message):
        cached(tmp_path, student=tmp_path / "source")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for name in ("parent", "source"):
        save_tiny(tmp_path / name, "llama")
        save_tokenizer(tmp_path / name)
    cached(tmp_path, student=tmp_path / "source")
    path = tmp_path / "source/tokenizer.json"
    path.write_text(path.read_text().replace('"w3": 3', '"x3": 3'))
    with pytest.raises(CheckpointError, match="its tokenizer is not its parent's"):
        cached(tmp_path, student=tmp_path / "source")


# Training


def pruned(folder: Path, family: str = "llama", drop: tuple[int, ...] = (1, 2)) -> Any:
    """A parent and a student without some of its blocks."""
    model = save_tiny(folder / "parent", family)
    prune(folder / "parent", Selection(num_blocks=4, drop_blocks=list(drop)), folder / "source")
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_student_learns_what_its_parent_says(tmp_path: Path) -> None:
    parent = pruned(tmp_path)
    cached(tmp_path)
    params = PARAMS.model_copy(update={"steps": 30, "targets": "all", "save_every": 100})
    report, out = run(tmp_path, params)

    def apart(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            return divergence(model(WINDOWS).logits, parent(WINDOWS).logits).mean().item()

    before, after = apart(tmp_path / "source"), apart(out)
    assert after < 0.7 * before
    assert report["last_loss"] < report["first_loss"]


@pytest.mark.parametrize(
    ("train", "hidden", "filters"),
    [("lora", (), "identity"), ("lora", (1, 3), "linear"), ("all", (1,), "identity")],
)
def test_nothing_pruned_is_nothing_changed(
    train: str, hidden: tuple[int, ...], filters: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    save_tiny(tmp_path / "source", "llama")
    cached(tmp_path, hidden=hidden)
    update = {"train": train, "hidden": hidden, "filters": filters, "hidden_weight": 1.0}
    report, out = run(tmp_path, PARAMS.model_copy(update=update))
    assert report["first_loss"] == report["last_loss"] == 0
    assert same(weights(out), weights(tmp_path / "source"))


def test_the_first_loss_is_the_divergence(tmp_path: Path) -> None:
    """The trainer's row of the parent's outputs is that of the window, in any order."""
    parent = pruned(tmp_path)
    cached(tmp_path)
    params = PARAMS.model_copy(update={"batch_size": 6, "steps": 1, "warmup_steps": 0})
    report, _ = run(tmp_path, params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        expected = divergence(model(WINDOWS).logits, parent(WINDOWS).logits).mean().item()
    assert report["first_loss"] == pytest.approx(expected, rel=1e-4)


def test_hidden_states_weigh_as_much_as_the_logits(tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path, hidden=(0, 3))
    batch = {"input_ids": WINDOWS[:2], "index": torch.tensor([0, 1])}
    losses = {}
    for weight in (None, 0.5, 1.5):
        params = PARAMS.model_copy(update={"hidden": (0, 3), "hidden_weight": weight})
        made = student(task(tmp_path, params))
        assert made.loss
        losses[weight] = made.loss(made.model.eval(), batch).item()
    gap = losses[1.5] - losses[0.5]
    assert gap > 0
    logits = losses[0.5] - 0.5 * gap
    assert losses[None] == pytest.approx(2 * logits, rel=1e-5)
    assert not any(block._forward_hooks for block in made.model.modules())


def test_filters_train_and_are_dropped(tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path, hidden=(0,))
    params = PARAMS.model_copy(update={"hidden": (0,), "filters": "linear"})
    report, out = run(tmp_path, params)
    plain, other = run(tmp_path, PARAMS.model_copy(update={"hidden": (0,)}), "plain")
    assert report["trainable"] == plain["trainable"] + 32 * 32
    assert weights(out).keys() == weights(tmp_path / "source").keys()
    assert not same(weights(out), weights(other))
    assert sorted(p.name for p in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_distillation_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(tmp_path)
    cached(tmp_path, hidden=(0, 3))
    params = PARAMS.model_copy(update={"hidden": (0, 3), "filters": "linear"})
    _, whole = run(tmp_path, params)
    interrupted(tmp_path, monkeypatch, 7, params)
    _, again = run(tmp_path, params, "cut")
    assert digest(again) == digest(whole)
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("train", "untouched"),
    [("all", {"embed_tokens"}), ("last_blocks", {"embed_tokens", "layers.0"})],
)
def test_weights_train_without_adapters(train: str, untouched: set[str], tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path)
    params = PARAMS.model_copy(update={"train": train, "blocks": 1, "learning_rate": 1e-3})
    report, out = run(tmp_path, params)
    before, after = weights(tmp_path / "source"), weights(out)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {n for n in before if n.removeprefix("model.").startswith(tuple(untouched))}
    assert report["last_loss"] < report["first_loss"]


def test_outputs_over_another_text_are_refused(tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path)
    made = task(tmp_path, PARAMS)
    with pytest.raises(HealingError, match="outputs over another text"):
        student(dataclasses.replace(made, tokens=WINDOWS.flip(0)))


# Which block is which


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "olmo2"])
def test_blocks_are_recognised_by_their_norms(family: str, tmp_path: Path) -> None:
    pruned(tmp_path, family, drop=(0, 2))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "source").half()
    half.save_pretrained(tmp_path / "half")
    parent = fingerprints(tmp_path / "parent")
    assert recognise(fingerprints(tmp_path / "source"), parent) == [1, 3]
    with pytest.raises(HealingError, match="block 0 of the student has the norms of none"):
        recognise(fingerprints(tmp_path / "half"), parent)


def test_blocks_that_look_alike_must_be_told() -> None:
    a, b, c = ({"norm": name} for name in "abc")
    with pytest.raises(HealingError, match=r"block 0 .* of 2 of the parent's .* heal\.kept"):
        recognise([a], [a, a, b])
    with pytest.raises(HealingError, match=r"are the parent's \[1, 0\], not in its order"):
        recognise([b, a], [a, b, c])
    with pytest.raises(HealingError, match="block 0"):
        recognise([{}], [a])
    assert recognise([a, c], [a, b, c | {"other": "d"}]) == [0, 2]


def test_blocks_are_matched_by_their_original_index(tmp_path: Path) -> None:
    pruned(tmp_path, drop=(1,))
    cached(tmp_path, hidden=(2,))
    made = student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,)})))
    loss: Any = made.loss
    layers = made.model.get_decoder().layers  # type: ignore[operator]
    assert loss._matched == {2: layers[1]}
    told = student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,), "kept": (0, 1, 2)})))
    other: Any = told.loss
    assert other._matched[2] is told.model.get_decoder().layers[2]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kept", "message"),
    [((0, 2), "lists 2 blocks, but .* has 3"), ((0, 1, 3), r"blocks \[2\] of the parent are not")],
)
def test_impossible_pairs_are_refused(kept: tuple[int, ...], message: str, tmp_path: Path) -> None:
    pruned(tmp_path, drop=(1,))
    cached(tmp_path, hidden=(2,))
    with pytest.raises(HealingError, match=message):
        student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,), "kept": kept})))


def test_states_of_another_width_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "parent", "llama")
    save_tiny(tmp_path / "source", "llama", hidden_size=64)
    cached(tmp_path, hidden=(2,))
    with pytest.raises(HealingError, match="64 channels, its parent 32"):
        student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,), "kept": (0, 1, 2, 3)})))


def test_outputs_are_seen_while_asked_for_only() -> None:
    block = nn.Linear(3, 3)
    with outputs_of({5: block}) as seen:
        y = block(torch.ones(1, 3))
        assert seen[5] is y
    block(torch.zeros(1, 3))
    assert seen[5] is y
    assert not math.isnan(y.sum().item())


def test_a_student_without_some_sublayers(tmp_path: Path) -> None:
    """Its model type is ours; what is left of a block is known again."""
    save_tiny(tmp_path / "parent", "llama")
    gone = Selection(num_blocks=4, drop_blocks=[2], drop_attention=[1], drop_ffn=[3])
    remove(tmp_path / "parent", gone, tmp_path / "source", flavour="auto")
    cached(tmp_path, hidden=(1, 3), student=tmp_path / "source")
    made = student(task(tmp_path, PARAMS.model_copy(update={"hidden": (1, 3)})))
    layers = Blocks(made.model).layers
    loss: Any = made.loss
    assert loss._matched == {1: layers[1], 3: layers[2]}
    assert loss(made.model, {"input_ids": WINDOWS[:2], "index": torch.tensor([0, 1])}) > 0


def test_a_quantized_parent_teaches_what_it_computes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "whole", "llama")
    (tmp_path / "parent").mkdir()
    quantize(tmp_path / "whole", tmp_path / "parent", None, "rtn", RtnParams(group_size=16))
    _, out = cached(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent")
    with torch.no_grad():
        z = model(WINDOWS).logits
    expected = z - z.amax(-1, keepdim=True)
    found = Teacher(out).targets(list(range(6))).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
