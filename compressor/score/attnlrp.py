"""AttnLRP's rules as changes of the gradient, so that relevance is value times gradient.

Nothing here knows a family. Modules are told apart by type when relevance reaches them, and
products (gate times up, queries times keys, attention times values) by watching torch's own
functions, in which a factor carries relevance exactly when it requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from compressor.blocks import LINEAR
from compressor.errors import NotApplicable

ACTIVATIONS = (
    *("SiLU", "SiLUActivation", "GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh"),
    *("NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation"),
    *("ReLU", "ReLUSquaredActivation", "Mish", "MishActivation", "Tanh"),
)
"""Types of elementwise activations with f(0) = 0, which the identity rule needs."""

_PRODUCTS = {"mul": (0, 1), "matmul": (0, 1), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Functions whose two factors, by place, share the relevance."""

_ATTENTION = ("matmul", "bmm", "baddbmm")
_UNRULED = {
    **dict.fromkeys(("sigmoid", "tanh", "exp", "rsqrt", "silu", "gelu", "relu", "softplus"), 1),
    **dict.fromkeys(("mul_", "div", "einsum"), 2),
}
"""Functions no rule covers once so many of their arguments carry relevance."""


@contextmanager
def attnlrp(root: nn.Module, path: str = "") -> Iterator[Products]:
    """Make gradients inside `root` follow AttnLRP (arXiv:2402.05602) for a `with` block.

    Linears, sums, rotations and the softmax keep their gradient (the epsilon rule and the Taylor
    rule, times the value); activations and norms pass relevance on unchanged; products halve it
    between their factors, so queries and keys get a quarter each and values a half. Outputs are
    unchanged. What the block computes meanwhile raises `NotApplicable` where no rule fits.
    """
    leaves = [
        (f"{path}.{name}".strip("."), module)
        for name, module in root.named_modules()
        if not isinstance(module, LINEAR) and not any(module.children())
    ]
    for name, module in leaves:
        module.forward = partial(_leaf, name, module, module.forward)
    try:
        with Products(path) as products:
            yield products
    finally:
        for _, module in leaves:
            del module.forward


def _leaf(
    name: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A module without children, by the rule of its type."""
    given = (*args, *kwargs.values())
    if isinstance(module, nn.Dropout | nn.Identity) or not any(map(_carries, given)):
        return forward(*args, **kwargs)
    kind = type(module).__name__
    if type(module) is nn.LayerNorm:
        return layer_norm(module, given[0])
    if len(given) == 1 and (kind in ACTIVATIONS or kind.endswith("RMSNorm")):
        return identity(forward, given[0])
    raise NotApplicable(
        f"{name} is a {kind}, for which there is no relevance rule; there are rules for "
        f"LayerNorm, RMSNorm and the activations {', '.join(ACTIVATIONS)}"
    )


def identity(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """f(z) with the gradient f(z) / z, so that R_in = R_out in every element (section 3.3.1).

    Exact for RMSNorm too, whose output is z times something that the rule holds constant.
    z = 0 has no relevance to pass on, so its gradient is 0.
    """
    bare = z.detach()
    return z * torch.where(bare == 0, 0, function(bare).detach() / bare)


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm with its standard deviation held constant (section 3.3.2)."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.detach().square().mean(-1, keepdim=True) + module.eps).sqrt()
    y = centred / deviation
    y = y if module.weight is None else y * module.weight.detach()
    return y if module.bias is None else y + module.bias.detach()


class Products(TorchFunctionMode):
    """The uniform rule: each of two factors gets half of their product's relevance.

    Attributes:
        attention: how many products of attention were seen.
    """

    def __init__(self, path: str) -> None:
        """Watch the computation of the module called `path`."""
        super().__init__()
        self.attention = 0
        self._path = path

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Halve gradients of products; refuse what has no rule."""
        given, name = list(args), getattr(func, "__name__", "")
        if func is scaled_dot_product_attention and _carries(args[0]):
            self.attention += 1
            given[:3] = [_scale(x, f) for x, f in zip(args, (0.25, 0.25, 0.5), strict=False)]
        elif name in _PRODUCTS:
            places = _PRODUCTS[name]
            if all(_carries(args[place]) for place in places):
                self.attention += name in _ATTENTION
                for place in places:
                    given[place] = _scale(args[place], 0.5)
        elif name in _UNRULED and sum(map(_carries, args)) >= _UNRULED[name]:
            raise NotApplicable(
                f"{self._path or 'the output'} computes {name} outside a module, "
                "for which there is no relevance rule"
            )
        return func(*given, **(kwargs or {}))


class _Scale(torch.autograd.Function):
    """The same value, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _scale(x: Tensor, factor: float) -> Tensor:
    scaled: Tensor = _Scale.apply(x, factor)
    return scaled


def _carries(x: Any) -> bool:
    """Whether relevance flows through x."""
    return isinstance(x, Tensor) and x.requires_grad
