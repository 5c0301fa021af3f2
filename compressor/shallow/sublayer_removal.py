"""Taking branches out of a model's blocks, or letting them run with another block's weights.

This file is copied into checkpoint folders: it needs torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Branches = Mapping[str, Mapping[str, Any]]
"""{"attention" or "mlp": {"zero": child of a block, "identity": [children]}}."""


def remove_sublayers(
    blocks: nn.ModuleList, skipped: Mapping[int, Sequence[str]], branches: Branches
) -> None:
    """Take the skipped branches out of the blocks, in place.

    The branch's last module returns zeros, its others what they are given: the block adds
    nothing. The remaining attentions are numbered 0..K-1, which is their place in the KV cache.
    """
    count = 0
    for index, block in enumerate(blocks):
        gone = skipped.get(index, ())
        for kind in gone:
            _replace(block, branches[kind]["zero"], _ENDS[kind])
            for name in branches[kind]["identity"]:
                _replace(block, name, _identity)
        if "attention" not in gone:
            for module in block.modules():
                if "layer_idx" in vars(module):
                    vars(module)["layer_idx"] = count
            count += 1


def share_sublayers(
    blocks: nn.ModuleList, reused: Mapping[int, Mapping[str, int]], branches: Branches
) -> None:
    """Let branches run with the weights of other blocks' ones, in place: {block: {kind: giver}}.

    The norms of a branch come with it. What is not a weight (place in the KV cache, window)
    stays the block's own.
    """
    for index, givers in reused.items():
        for kind, giver in givers.items():
            for name in (branches[kind]["zero"], *branches[kind]["identity"]):
                own, given = getattr(blocks[index], name), getattr(blocks[giver], name)
                _replace(blocks[index], name, Borrower(own, given))


class Borrower:
    """A module that computes with the parameters and submodules of another one.

    It is no module itself, so that the model holds, stores and trains them once. The dicts that
    hold them are the giver's own: what replaces a weight or a linear there counts here too.
    """

    def __init__(self, module: nn.Module, giver: nn.Module) -> None:
        """Hand `module` the parts of `giver`."""
        for parts in ("_parameters", "_buffers", "_modules"):
            vars(module)[parts] = vars(giver)[parts]
        self._module, self._giver = module, giver

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the giver's mode."""
        self._module.training = self._giver.training
        return self._module(*args, **kwargs)


def _replace(block: nn.Module, name: str, function: Any) -> None:
    delattr(block, name)
    setattr(block, name, function)


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _no_ffn(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def _no_attention(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


_ENDS = {"attention": _no_attention, "mlp": _no_ffn}
