"""The one view of a model: its blocks and what is in them.

A *block* is a decoder layer. It is found, not declared: the decoder's only
ModuleList with as many members as the config has layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from compressor.errors import UnsupportedArchitecture
from compressor.families import FAMILIES, TUPLE_OUTPUT, Names, family_of

LINEAR = (nn.Linear, Conv1D)


class Blocks:
    """The blocks of a causal language model and the sublayers inside each.

    Attributes:
        layers: the blocks, in order.
        prefix: their dotted path, such as `model.layers`.
        skipped: of each block that lacks a branch, which: `["attention"]` or `["mlp"]`.
        reused: of each block that runs another's branch, whose: `{"attention": 3}`.

    Raises `UnsupportedArchitecture` for encoder-decoders, fused experts,
    state-space blocks and any block whose linears are not each in exactly one
    of attention and feed-forward.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the blocks of `model` and check that every path resolves."""
        config: Any = model.config
        refuse_encoder_decoder(config)
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        lists = [
            (name, child)
            for name, child in decoder.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
        ]
        if len(lists) != 1:
            children = ", ".join(name for name, _ in decoder.named_children())
            raise UnsupportedArchitecture(
                f"{config.model_type}: expected one ModuleList of {config.num_hidden_layers} "
                f"blocks in {type(decoder).__name__}, found {len(lists)} among: {children}"
            )
        self.layers: nn.ModuleList = lists[0][1]
        family = family_of(config)
        self.names = FAMILIES.get(family, Names())
        self.returns_tuple: bool = family in TUPLE_OUTPUT
        self.skipped: dict[int, list[str]] = getattr(config, "skipped", {})
        self.reused: dict[int, dict[str, int]] = getattr(config, "reused", {})
        self.prefix = next(n for n, m in model.named_modules() if m is self.layers)
        for index in range(len(self.layers)):
            self._check(index, family)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    @contextmanager
    def stand_in(
        self, forward: Callable[..., Tensor], indices: Iterable[int] | None = None
    ) -> Iterator[None]:
        """Replace the forward of some blocks, by default all, for the length of a `with` block."""
        replaced = list(self) if indices is None else [self.layers[index] for index in indices]
        given = (lambda *a, **k: (forward(*a, **k),)) if self.returns_tuple else forward
        try:
            for block in replaced:
                block.forward = given
            yield
        finally:
            for block in replaced:
                block.__dict__.pop("forward", None)

    def attention(self, index: int) -> dict[str, nn.Module]:
        """Attention modules of a block by full name; usually one, none where it was removed."""
        return self._children(index, self.names.attention)

    def ffn(self, index: int) -> dict[str, nn.Module]:
        """Feed-forward modules of a block by full name; OPT has two, and none where removed."""
        return self._children(index, self.names.ffn)

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Every matrix of a block by full name, in the order of definition."""
        return _linears({f"{self.prefix}.{index}": self.layers[index]})

    def ffn_linears(self, index: int) -> dict[str, nn.Module]:
        """The matrices of a block's feed-forward by full name."""
        return _linears(self.ffn(index))

    @property
    def absent(self) -> dict[str, list[int]]:
        """Per kind of sublayer, the blocks that have none of their own, where there are such."""
        kinds = {"attention": self.attention, "ffn": self.ffn}
        found = {kind: [i for i in range(len(self)) if not of(i)] for kind, of in kinds.items()}
        return {kind: indices for kind, indices in found.items() if indices}

    def _children(self, index: int, names: tuple[str, ...]) -> dict[str, nn.Module]:
        block = self.layers[index]
        return {
            f"{self.prefix}.{index}.{name}": child
            for name, child in block.named_children()
            if name in names
        }

    def _check(self, index: int, family: str) -> None:
        block, where = self.layers[index], f"{family}: {self.prefix}.{index}"
        for name, parameter in block.named_parameters():
            if parameter.ndim > 2:
                kind = "fused experts" if "expert" in name else "a state-space convolution"
                raise UnsupportedArchitecture(
                    f"{where}.{name} has shape {tuple(parameter.shape)}: {kind}; only dense "
                    "attention + feed-forward blocks are supported"
                )
        inside = _linears(self.attention(index)) | _linears(self.ffn(index))
        missing = self.linears(index).keys() - inside.keys()
        there = {"attention": self.attention(index), "mlp": self.ffn(index)}
        gone = {kind for kind, modules in there.items() if not modules}
        absent = {*self.skipped.get(index, ()), *self.reused.get(index, ())}
        if missing or gone != absent:
            children = ", ".join(name for name, _ in block.named_children())
            raise UnsupportedArchitecture(
                f"{where} has the children {children}; attention is looked for under "
                f"{'/'.join(self.names.attention)} and the feed-forward under "
                f"{'/'.join(self.names.ffn)}; if this is such a block, add a row for {family!r} "
                "to compressor/families.py"
            )


def refuse_encoder_decoder(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedArchitecture` for models that are not decoder-only."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(
            f"{config.model_type}: encoder-decoder models are not supported; "
            "give a decoder-only causal language model"
        )


def hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Hidden states (B, T, D) from a block's output, tensor or tuple."""
    return output[0] if isinstance(output, tuple) else output


def weight_of(linear: nn.Module) -> Tensor:
    """Weight as (out, in), whichever way the module stores it."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return oriented(linear, weight)


def oriented(linear: nn.Module, weight: Tensor) -> Tensor:
    """View (out, in) of a weight in the layout of `linear`, or of one (out, in) in that layout."""
    return weight.T if isinstance(linear, Conv1D) else weight


def _linears(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        f"{path}.{name}" if name else path: module
        for path, root in modules.items()
        for name, module in root.named_modules()
        if isinstance(module, LINEAR)
    }
