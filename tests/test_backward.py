"""The reverse loop equals plain autograd, family by family; Taylor equals its transcription."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor import walk as walk_module
from compressor.backward import Tape, backward
from compressor.blocks import Blocks
from compressor.decoder import Decoder
from compressor.score import TaylorParams
from compressor.score.collect import score
from compressor.score.taylor import saliency
from compressor.walk import Stream, walk
from tests.tiny import FAMILIES, save_tiny, tokens

WINDOWS = tokens(5, 12)


def recorded(folder: Path, windows: Tensor, max_windows: int, batch_size: int = 2) -> Tape:
    decoder = Decoder(folder)
    tape = Tape(decoder, windows, max_windows)
    for step in walk(Stream(decoder, windows, batch_size)):
        for rows, x_in, x_out in step.advance():
            tape.record(step, rows, x_in, x_out)
    return tape


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_way_back_equals_autograd(family: str, tmp_path: Path) -> None:
    """Gradients at every block's input and at every weight, three of five windows, spilled."""
    model = save_tiny(tmp_path, family)
    blocks = Blocks(model)
    inputs: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        x.retain_grad()
        inputs.append(x)

    for block in blocks:
        block.register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(WINDOWS[:3], use_cache=False).logits
    weighting = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weighting).sum().backward()

    tape = recorded(tmp_path, WINDOWS, 3)
    gradient = tape.seed(lambda window, found: (found * weighting[window]).sum())
    order = []
    for step in backward(tape, gradient, "test", weights=True):
        order.append(step.index)
        assert sum(not next(b.parameters()).is_meta for b in tape.decoder.blocks) == 1
        for _ in step.retreat():
            pass
        torch.testing.assert_close(gradient, inputs[step.index].grad, rtol=1e-4, atol=1e-4)
        expected = dict(blocks.layers[step.index].named_parameters())
        for name, weight in step.block.named_parameters():
            torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-4, atol=1e-3)
    assert order == [3, 2, 1, 0]
    assert torch.is_grad_enabled()


def test_without_weights_only_the_stream_has_a_gradient(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    tape = recorded(tmp_path, WINDOWS, 5)
    gradient = tape.seed(lambda _, logits: logits.sum())
    for step in backward(tape, gradient, "test", weights=False):
        for _ in step.retreat():
            pass
        assert all(weight.grad is None for weight in step.block.parameters())


def test_the_tape_spills_and_a_step_not_asked_retreats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    results = []
    for limit in (2**30, 16):
        monkeypatch.setattr(walk_module, "SPILL_BYTES", limit)
        tape = recorded(tmp_path, WINDOWS, 5)
        gradient = tape.seed(lambda _, logits: logits.square().sum())
        assert len(list(backward(tape, gradient, "test", weights=False))) == 4
        results.append(gradient.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_taylor_is_the_papers(family: str, tmp_path: Path) -> None:
    """Backward window by window in float64, signed products summed, then the absolute value."""
    model = save_tiny(tmp_path, family)
    params = TaylorParams(max_windows=3)
    found = score(tmp_path, WINDOWS, {"taylor": params}, batch_size=2)
    model.double()
    blocks = Blocks(model)
    linears = {n: m.weight for i in range(4) for n, m in blocks.linears(i).items()}
    products = {name: torch.zeros_like(weight) for name, weight in linears.items()}
    for window in WINDOWS[:3]:
        model.zero_grad()
        logits = model(window[None], use_cache=False).logits[0]
        for t in range(len(window) - 1):
            (-logits[t].log_softmax(-1)[window[t + 1]] / (3 * 11)).backward(retain_graph=True)
        for name, weight in linears.items():
            products[name] += weight.detach() * weight.grad
    expected = {name: float(p.abs().sum()) for name, p in products.items()}
    assert found.linear["taylor"] == pytest.approx(expected, rel=1e-4)
    for i in range(4):
        attention = sum(
            v for n, v in expected.items() if any(n.startswith(a) for a in blocks.attention(i))
        )
        ffn = sum(expected[n] for n in blocks.ffn_linears(i))
        assert found.attention["taylor"][i] == pytest.approx(attention, rel=1e-4)
        assert found.ffn["taylor"][i] == pytest.approx(ffn, rel=1e-4)
        assert found.block["taylor"][i] == pytest.approx(attention + ffn, rel=1e-4)


def test_t12_taylor() -> None:
    weight, gradient = torch.tensor([[1.0, -2], [3, 0.5]]), torch.tensor([[0.1, 0.2], [-0.1, 0.4]])
    assert saliency(weight, gradient) == pytest.approx(1.0, abs=1e-6)


def test_taylor_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    asked = {"taylor": TaylorParams()}
    one, three = (score(tmp_path, WINDOWS, asked, batch_size=b) for b in (1, 3))
    assert one.block["taylor"] == pytest.approx(three.block["taylor"], rel=1e-4)
