"""Full fine-tuning of a few blocks: the last ones, or those around the cut."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.blocks import Blocks
from compressor.errors import HealingError, NotApplicable
from compressor.heal import LastBlocksParams
from compressor.heal.healer import Healer, Healing
from compressor.heal.train import train
from compressor.heal.write import whole
from compressor.lineage import recognise, sketch


def heal(healing: Healing) -> dict[str, Any]:
    """Train the last `blocks` blocks, the final norm and the head; all else is frozen.

    With `around_cut` the blocks are the `blocks` before and after every place where some of
    `healing.parent` are gone. Tied embeddings train as the head alone: nothing flows back to what
    they embed, so no gradient is computed below the lowest block that trains. Raises
    `HealingError` like `train`, and `NotApplicable` when where the cut was is not known
    (Reassessing Layer Pruning in LLMs, arXiv:2411.15558 section 4).
    """
    return train(healing, thawed)


def thawed(healing: Healing) -> Healer:
    """The whole model in float32, frozen but for the asked parts."""
    params = healing.params
    assert isinstance(params, LastBlocksParams)
    model, write = whole(healing)
    thaw(model, chosen(healing, params, len(Blocks(model))), head=params.head)
    return Healer(model, write)


def chosen(healing: Healing, params: LastBlocksParams, num_blocks: int) -> list[int]:
    """The blocks that train."""
    if params.around_cut:
        return around(removed(healing.source, healing.parent), num_blocks, params.blocks)
    if params.blocks > num_blocks:
        raise HealingError(
            f"heal.blocks {params.blocks}: {healing.source} has {num_blocks} blocks; ask for fewer"
        )
    return list(range(num_blocks - params.blocks, num_blocks))


def around(gone: list[int], num_blocks: int, reach: int) -> list[int]:
    """The `reach` blocks on both sides of every cut, in the numbering of what is left.

    `gone` are the removed blocks in the numbering of the parent; that of what follows a cut is
    the number of blocks kept before it.
    """
    cuts = {index - len([g for g in gone if g < index]) for index in gone}
    near = {i for cut in cuts for i in range(cut - reach, cut + reach)}
    return sorted(i for i in near if 0 <= i < num_blocks)


def removed(source: Path, parent: Path | None) -> list[int]:
    """The blocks of `parent` that `source` lacks; raises `NotApplicable` when there are none."""
    if parent is None:
        raise NotApplicable(
            f"{source}: heal.around_cut looks for the cut beside the model before it, which is "
            "not given; put a prune stage before it, or give --parent"
        )
    known = sketch(parent)
    gone = {*range(len(known))} - {*recognise(sketch(source), known)}
    if not gone:
        raise NotApplicable(f"{source}: has every block of {parent}; leave heal.around_cut out")
    return sorted(gone)


def thaw(model: nn.Module, indices: Iterable[int], *, head: bool) -> None:
    """Freeze all but these blocks and, with `head`, the final norm and the head."""
    blocks = Blocks(model)
    model.requires_grad_(False)
    for index in indices:
        blocks.layers[index].requires_grad_(True)
    if not head:
        return
    for module in behind(model, blocks):
        module.requires_grad_(True)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(_stop)


def behind(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The final norm and the head."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    norms = [
        child
        for name, child in decoder.named_children()
        if child is not blocks.layers and "norm" in f"{name} {type(child).__name__}".lower()
        and "embed" not in name
    ]  # fmt: skip
    return [*norms, model.get_output_embeddings()]  # type: ignore[operator]


def _stop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach()
