"""The two residual branches of every block, found by watching one run without weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.blocks import Blocks, hidden
from compressor.errors import NotApplicable, UnsupportedArchitecture
from compressor.families import POSITIONS_FROM_MASK, family_of


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a block, x + post(module(pre(x))); names are full module names.

    Attributes:
        modules: its attention or feed-forward modules, in the order they run (OPT has fc1, fc2).
        norms: the norms that serve this branch alone; they go when it goes.
        first: the module whose input is the residual stream this branch reads.
        last: the module whose output this branch adds.

    Inputs and outputs are (B, T, D), but OPT's feed-forward is handed (B T, D).
    """

    modules: tuple[str, ...]
    norms: tuple[str, ...]
    first: str
    last: str


@dataclass(frozen=True)
class Sublayers:
    """Both branches of a block, None where one was removed.

    Attributes:
        parallel: both read the block's input (GPT-NeoX); else the feed-forward reads the sum
            of that and the attention.
    """

    attention: Sublayer | None
    ffn: Sublayer | None
    parallel: bool

    def at(self, prefix: str, index: int, other: int) -> Sublayers:
        """The same branches of block `other`, made like block `index`."""
        here, there = f"{prefix}.{index}.", f"{prefix}.{other}."

        def moved(branch: Sublayer | None) -> Sublayer | None:
            return branch and Sublayer(
                tuple(name.replace(here, there, 1) for name in branch.modules),
                tuple(name.replace(here, there, 1) for name in branch.norms),
                branch.first.replace(here, there, 1),
                branch.last.replace(here, there, 1),
            )

        return Sublayers(moved(self.attention), moved(self.ffn), self.parallel)


def find_sublayers(model: nn.Module) -> list[Sublayers]:
    """The branches of every block of `model`, which is moved to the meta device for good.

    A norm belongs to a branch when its output is what the branch's module reads (pre) or its
    input is what the module returns (post); one that serves both branches belongs to neither.
    Raises `NotApplicable` for blocks that normalise the residual stream itself (post-norm) or
    add it inside a branch (BLOOM), whose branches cannot be told apart from the stream.
    """
    model.to("meta")
    blocks = Blocks(model)
    first: dict[object, int] = {}
    alike = [first.setdefault(_make(blocks, index), index) for index in range(len(blocks))]
    calls = {index: _Calls(blocks, index) for index in first.values()}
    others = [index for index in range(len(blocks)) if index not in calls]
    try:
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        config: Any = model.config
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        ready = torch.zeros((1, 1, 2, 2), device="meta")  # nobody looks at a ready mask's values
        mask = None if family_of(config) in POSITIONS_FROM_MASK else ready
        with torch.no_grad(), blocks.stand_in(lambda x, *_, **__: x, others):
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for each in calls.values():
            each.stop()
    found = {index: each.branches() for index, each in calls.items()}
    return [found[known].at(blocks.prefix, known, index) for index, known in enumerate(alike)]


def _make(blocks: Blocks, index: int) -> object:
    """Equal for blocks whose branches are alike, so that one run of one of them tells of all."""
    modules = ((name, type(each)) for name, each in blocks.layers[index].named_modules())
    return index if index in blocks.reused else tuple(modules)


class _Calls:
    """What went into and came out of each module of one block, in the order they ran."""

    def __init__(self, blocks: Blocks, index: int) -> None:
        block, self._where = blocks.layers[index], f"{blocks.prefix}.{index}"
        self._attention, self._ffn = blocks.attention(index), blocks.ffn(index)
        modules = {f"{self._where}.{name}": child for name, child in block.named_children()}
        self._seen: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._output: Tensor | None = None
        self._handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in modules.items()
        ]
        self._handles.append(block.register_forward_hook(self._finish))

    def _hook(self, name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if not _same(given[0], hidden(out)):  # dropout, which does nothing here
                self._seen[name] = given, hidden(out)

        return see

    def _finish(self, _: nn.Module, __: Any, out: Any) -> None:
        self._output = hidden(out)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def branches(self) -> Sublayers:
        norms = self._seen.keys() - self._attention.keys() - self._ffn.keys()
        assert self._output is not None
        if any(_same(self._seen[name][1], self._output) for name in norms):
            raise NotApplicable(
                f"{self._where} normalises the residual stream itself (post-norm), so its "
                "attention and feed-forward cannot be told apart from the stream"
            )
        attention = self._branch(self._attention, norms) if self._attention else None
        ffn = self._branch(self._ffn, norms) if self._ffn else None
        if not attention or not ffn:
            return Sublayers(attention and attention[0], ffn and ffn[0], parallel=False)
        shared = {*attention[0].norms} & {*ffn[0].norms}
        parallel = _same(attention[1], ffn[1])
        return Sublayers(_without(attention[0], shared), _without(ffn[0], shared), parallel)

    def _branch(self, members: Iterable[str], norms: Iterable[str]) -> tuple[Sublayer, Tensor]:
        """The branch, and the residual stream it reads."""
        modules = tuple(name for name in self._seen if name in set(members))
        if not modules:
            raise UnsupportedArchitecture(f"{self._where}: {next(iter(members))} never runs")
        first, last = modules[0], modules[-1]
        (read, *others), made = self._seen[first][0], self._seen[last][1]
        pre = next((n for n in norms if _same(self._seen[n][1], read)), None)
        post = next((n for n in norms if _same(self._seen[n][0][0], made)), None)
        serving = tuple(name for name in (pre, post) if name)
        stream = self._seen[pre][0][0] if pre else read
        if any(_same(stream, other) for other in (*others, *self._seen[last][0][1:])):
            raise NotApplicable(
                f"{last} adds the residual stream inside itself, so what it contributes cannot be "
                "told apart from the stream"
            )
        return Sublayer(modules, serving, pre or first, post or last), stream


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of one."""
    return a is b or a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _without(branch: Sublayer, norms: set[str]) -> Sublayer:
    kept = tuple(name for name in branch.norms if name not in norms)
    return Sublayer(branch.modules, kept, branch.first, branch.last)
