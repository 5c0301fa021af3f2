"""LISA: full-rank updates of a few random blocks at a time."""

from __future__ import annotations

import random
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compressor.blocks import Blocks
from compressor.errors import HealingError
from compressor.heal import LisaParams
from compressor.heal.healer import Healer, Healing
from compressor.heal.train import train
from compressor.heal.write import whole


def heal(healing: Healing) -> dict[str, Any]:
    """Train all that is outside the blocks, and `blocks` random blocks for `every` steps each.

    Which blocks train at step t is a draw without replacement seeded by (seed, t // every), so
    a resumed run makes the same. A block's Adam moments are dropped when it freezes: they
    describe weights and gradients of many steps ago, and without them the optimizer holds the
    state of the trained blocks alone (arXiv:2403.17919 algorithm 1 does not say).
    Raises `HealingError` like `train`, and when the model has fewer blocks.
    """
    return train(healing, sampled)


def sampled(healing: Healing) -> Healer:
    """The whole model in float32, of which the schedule freezes what does not train."""
    params = healing.params
    assert isinstance(params, LisaParams)
    model, write = whole(healing)
    blocks = Blocks(model)
    if params.blocks > len(blocks):
        raise HealingError(
            f"heal.blocks {params.blocks}: {healing.source} has {len(blocks)} blocks; ask for fewer"
        )
    outside = _weights(model) - _weights(blocks.layers)
    return Healer(
        model,
        write,
        callbacks=(Schedule(blocks, params, healing.seed),),
        together=outside + params.blocks * _weights(blocks.layers[0]),
    )


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def active(seed: int, period: int, num_blocks: int, count: int) -> set[int]:
    """The blocks that train in a period: `count` of `num_blocks`, without replacement."""
    return set(random.Random(f"{seed}:{period}").sample(range(num_blocks), count))


class Schedule(TrainerCallback):
    """Freezes all blocks but those of the step's period."""

    def __init__(self, blocks: Blocks, params: LisaParams, seed: int) -> None:
        """Nothing is frozen until the first step begins."""
        self._blocks, self._params, self._seed = blocks, params, seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Thaw the step's blocks; of the others forget gradients and moments."""
        period = state.global_step // self._params.every
        chosen = active(self._seed, period, len(self._blocks), self._params.blocks)
        for index, block in enumerate(self._blocks):
            _freeze(block, index not in chosen, rest["optimizer"])


def _freeze(block: nn.Module, frozen: bool, optimizer: Any) -> None:
    for parameter in block.parameters():
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None
            optimizer.state.pop(parameter, None)
