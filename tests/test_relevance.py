"""AttnLRP: the rules one by one, relevance propagated by hand, conservation, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from compressor import decoder as decoder_module
from compressor.backward import Tape, backward
from compressor.blocks import Blocks
from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.score import BlockInfluenceParams, RelevanceParams
from compressor.score.attnlrp import attnlrp
from compressor.score.collect import score
from compressor.walk import Stream, walk
from tests.tiny import FAMILIES, save_tiny, tokens

WINDOWS = tokens(3, 7)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class Gated(nn.Module):
    """3 silu(g) u."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return 3 * self.act_fn(gate) * up


def test_t10_activation_product_and_linear() -> None:
    z, gated = leaf(1, 0), Gated()
    with attnlrp(gated):
        out = gated.act_fn(z)
        torch.testing.assert_close(out, leaf(0.731059, 0), atol=1e-6, rtol=0)
        out.sum().backward()
        torch.testing.assert_close(z.grad, leaf(0.731059, 0), atol=1e-6, rtol=0)
        gate, up = leaf(1), leaf(2)
        y = gated(gate, up)
        assert y.item() == pytest.approx(4.386351, abs=1e-6)
        y.backward()
    for factor in (gate, up):  # and the activation hands on what it got
        assert (factor * factor.grad).item() == pytest.approx(2.193176, abs=1e-6)

    x, weight = leaf(1, 2), torch.tensor([[1.0, -1], [2, 1]], dtype=torch.float64)
    z = weight @ x
    torch.testing.assert_close(z, leaf(-1, 4))
    z.sum().backward()
    torch.testing.assert_close(x * x.grad, leaf(3, 0))


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_hold_their_scale_constant(kind: str) -> None:
    x, g = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm: Any = getattr(nn, kind)(8, dtype=torch.float64)
    norm.weight.data = torch.arange(1.0, 9.0, dtype=torch.float64)
    x.requires_grad_()
    with attnlrp(nn.Sequential(norm)):
        y = norm(x)
        y.backward(g)
    torch.testing.assert_close(y, norm(x))
    weighted, centred = g * norm.weight, x - x.mean(-1, keepdim=True)
    if kind == "LayerNorm":
        expected = (weighted - weighted.mean(-1, keepdim=True)) / centred.std(
            -1, keepdim=True, correction=0
        )
    else:
        expected = weighted / x.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(x * x.grad, y * g)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


def test_attention_gives_a_quarter_to_queries_and_keys_and_half_to_values() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 5, 4, generator=generator).requires_grad_() for _ in range(3)]
    plain = torch.autograd.grad(scaled_dot_product_attention(*given).square().sum(), given)
    with attnlrp(nn.Module()) as products:
        fused = torch.autograd.grad(scaled_dot_product_attention(*given).square().sum(), given)
        query, key, value = given
        weights = (query @ key.mT / 2).softmax(-1)
        eager = torch.autograd.grad((weights @ value).square().sum(), given)
    assert products.attention == 3
    for ruled, also, gradient, part in zip(fused, eager, plain, (0.25, 0.25, 0.5), strict=True):
        torch.testing.assert_close(ruled, gradient * part)
        torch.testing.assert_close(also, gradient * part, rtol=1e-4, atol=1e-5)


class ByHand:
    """LRP of a Llama in float64 as the paper writes it: relevance R handed down, no gradients."""

    def __init__(self, model: Any) -> None:
        self.model = model.double().requires_grad_(False)
        self.found: dict[str, float] = {}
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self._keep(name), with_kwargs=True)

    def _keep(self, name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            out = out[0] if isinstance(out, tuple) else out
            if given and isinstance(out, Tensor):
                self.seen[name] = given[0][0], out[0]

        return hook

    def linear(self, name: str, relevance: Tensor) -> Tensor:
        self.found[name] = self.found.get(name, 0) + float(relevance.abs().sum())
        x, z = self.seen[name]
        return x * ((relevance / z) @ self.model.get_submodule(name).weight)

    def rotation(self, x: Tensor, z: Tensor, relevance: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """R_i = sum_j x_i M_ji R_j / z_j for z = x cos + rotate_half(x) sin."""
        back = relevance / z
        half = x.shape[-1] // 2
        turned = torch.cat(((back * sin)[..., half:], -(back * sin)[..., :half]), -1)
        return x * (back * cos + turned)

    def attention(self, name: str, relevance: Tensor) -> Tensor:
        """Through o, A V, softmax, Q K and the rotations to the input of q, k and v."""
        out = self.linear(f"{name}.o_proj", relevance)
        length, heads, groups = len(out), 4, 2
        q, k, v = (self.seen[f"{name}.{p}_proj"][1].view(length, -1, 8) for p in "qkv")
        positions = torch.arange(length)[None]
        cos, sin = (t[0, :, None] for t in self.model.model.rotary_emb(q, positions))
        qr, kr = (x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin for x in (q, k))
        r_q, r_k, r_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for head in range(heads):
            group = head // (heads // groups)
            for i in range(length):
                a = (qr[i, head] @ kr[: i + 1, group].T) / math.sqrt(8)
                s = a.softmax(-1)
                o, r_o = s @ v[: i + 1, group], out.view(length, heads, 8)[i, head]
                flow = s[:, None] * v[: i + 1, group] * (r_o / o) / 2
                r_v[: i + 1, group] += flow
                r_s = flow.sum(-1)
                r_a = a * (r_s - s * r_s.sum())
                share = qr[i, head] * kr[: i + 1, group] / math.sqrt(8) * (r_a / a)[:, None] / 2
                r_q[i, head] += share.sum(0)
                r_k[: i + 1, group] += share
        r_q = self.rotation(q, qr, r_q, cos, sin).flatten(1)
        r_k = self.rotation(k, kr, r_k, cos, sin).flatten(1)
        parts = {"q_proj": r_q, "k_proj": r_k, "v_proj": r_v.flatten(1)}
        given = [self.linear(f"{name}.{part}", r) for part, r in parts.items()]
        return torch.stack(given).sum(0)

    def ffn(self, name: str, relevance: Tensor) -> Tensor:
        product = self.linear(f"{name}.down_proj", relevance)
        gate, up = (self.linear(f"{name}.{p}_proj", product / 2) for p in ("gate", "up"))
        return gate + up

    def run(self, window: Tensor) -> None:
        """Add up what reaches every linear's output from the prediction after a window."""
        with torch.no_grad():
            logits = self.model(window[None], use_cache=False).logits[0]
        relevance = torch.zeros_like(logits)
        relevance[-1, logits[-1].argmax()] = logits[-1].max()
        r = self.linear("lm_head", relevance)
        for i in reversed(range(len(self.model.model.layers))):
            for part, norm, through in (
                ("mlp", "post_attention_layernorm", self.ffn),
                ("self_attn", "input_layernorm", self.attention),
            ):
                x = self.seen[f"model.layers.{i}.{norm}"][0]
                y = self.seen[f"model.layers.{i}.{part}"][1]
                branch = through(f"model.layers.{i}.{part}", r * y / (x + y))
                r = r * x / (x + y) + branch


def test_relevance_is_that_propagated_by_hand(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    found = score(tmp_path, WINDOWS, {"relevance": RelevanceParams(max_windows=2)}, batch_size=3)
    hand = ByHand(model)
    for window in WINDOWS[:2]:
        hand.run(window)
    hand.found.pop("lm_head")
    whole = sum(hand.found.values())
    expected = {name: value / whole for name, value in hand.found.items()}
    assert found.linear["relevance"] == pytest.approx(expected, rel=1e-3)
    o, down = (
        [hand.found[f"model.layers.{i}.{part}_proj"] for i in range(4)]
        for part in ("self_attn.o", "mlp.down")
    )
    both = sum(o) + sum(down)
    for i in range(4):
        assert found.attention["relevance"][i] == pytest.approx(o[i] / both, rel=1e-3)
        assert found.ffn["relevance"][i] == pytest.approx(down[i] / both, rel=1e-3)
        assert found.block["relevance"][i] == pytest.approx((o[i] + down[i]) / both, rel=1e-3)


NO_RULE = {"gemma2"}  # soft caps


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_RULE))
def test_every_family_has_it(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, family)
    asked = {"relevance": RelevanceParams(positions="all")}
    found = score(tmp_path, WINDOWS, asked, batch_size=2)
    again = score(tmp_path, WINDOWS, asked, batch_size=3)
    linears = [name for i in range(4) for name in Blocks(model).linears(i)]
    assert list(found.linear["relevance"]) == linears
    assert sum(found.linear["relevance"].values()) == pytest.approx(1)
    assert sum(found.block["relevance"]) == pytest.approx(1)
    assert min(found.linear["relevance"].values()) > 0
    last = [list(Blocks(model).ffn_linears(i))[-1] for i in range(4)]  # makes the branch's output
    ffn, made = found.ffn["relevance"], [found.linear["relevance"][name] for name in last]
    shares = [value / sum(made) for value in made]
    assert [value / sum(ffn) for value in ffn] == pytest.approx(shares, rel=1e-4)
    assert found.block["relevance"] == pytest.approx(again.block["relevance"], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo2", "gemma3_text"])
def test_relevance_is_conserved_where_attention_adds_nothing(family: str, tmp_path: Path) -> None:
    """The softmax keeps some; without it, and without biases, every depth holds the seed."""
    model = save_tiny(tmp_path, family)
    with torch.no_grad():
        for block in Blocks(model):
            block.self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    decoder = Decoder(tmp_path)
    tape = Tape(decoder, WINDOWS, 3)
    for step in walk(Stream(decoder, WINDOWS, 3)):
        for rows, x_in, x_out in step.advance():
            tape.record(step, rows, x_in, x_out)
    with attnlrp(decoder.model):
        gradient = tape.seed(lambda _, logits: logits[-1].max())
    with torch.no_grad():
        seeds = model(WINDOWS).logits[:, -1].max(-1).values
    for step in backward(tape, gradient, "test", weights=False):
        with attnlrp(step.block):
            for _ in step.retreat():
                pass
        relevance = (tape.states[step.index] * gradient).sum((1, 2))
        torch.testing.assert_close(relevance, seeds, rtol=1e-3, atol=1e-3)


def test_eager_attention_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    asked = {"relevance": RelevanceParams()}
    fused = score(tmp_path, WINDOWS, asked)
    built = decoder_module.skeleton

    def eager(*args: Any) -> nn.Module:
        model: Any = built(*args)
        model.set_attn_implementation("eager")
        return model

    monkeypatch.setattr(decoder_module, "skeleton", eager)
    assert score(tmp_path, WINDOWS, asked).linear["relevance"] == pytest.approx(
        fused.linear["relevance"], rel=1e-4
    )


def test_rules_leave_outputs_and_modules_as_they_were(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "gpt2")
    with torch.no_grad():
        expected = model(WINDOWS).logits
    with attnlrp(model):
        torch.testing.assert_close(model(WINDOWS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_unknown_activation_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", hidden_act="sigmoid")
    asked = {"relevance": RelevanceParams(), "block_influence": BlockInfluenceParams()}
    found = score(tmp_path, WINDOWS, asked)
    assert list(found.block) == ["block_influence"]
    assert "layers.0.mlp.act_fn is a Sigmoid" in found.unavailable["relevance"]


def test_arithmetic_without_a_rule_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma3_text", final_logit_softcapping=30.0)
    with pytest.raises(NotApplicable, match="the output computes tanh outside a module"):
        score(tmp_path, WINDOWS, {"relevance": RelevanceParams()})


def test_attention_that_cannot_be_seen_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    monkeypatch.setattr("compressor.score.attnlrp.scaled_dot_product_attention", None)
    with pytest.raises(NotApplicable, match=r"layers\.0: its attention is not computed"):
        score(tmp_path, WINDOWS, {"relevance": RelevanceParams()})
