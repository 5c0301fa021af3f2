"""Distillation: a pruned model learns to predict what its parent does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from compressor.blocks import Blocks
from compressor.decoder import skeleton
from compressor.errors import HealingError
from compressor.heal import DistillParams, LastBlocksParams, TrainingParams
from compressor.heal.distillation import distribution_bytes, distribution_loss, hidden_loss
from compressor.heal.healer import Batch, Healer, Healing
from compressor.heal.last_blocks import thawed
from compressor.heal.lora import adapter
from compressor.heal.train import train
from compressor.inputs import outputs_of
from compressor.lineage import recognise, sketch
from compressor.targets import Teacher, TeacherRecord, check_student, text_digest

_TINY = 1e-12


def heal(healing: Healing) -> dict[str, Any]:
    """Minimise KL(parent || student) over the parent's outputs in `healing.teacher`.

    What trains are adapters, as `lora` has them, or blocks, as `last_blocks` has them, and it is
    written as there. Raises `CheckpointError` for a model that is not the parent's child,
    `HealingError` for outputs over another text and for blocks to match that the student has not,
    and what `train` raises (Minitron, arXiv:2408.11796 section 2).
    """
    return train(healing, student)


def student(healing: Healing) -> Healer:
    """The model to train, with `Distillation` for a loss and the filters beside it."""
    params = healing.params
    assert isinstance(params, DistillParams)
    assert healing.teacher is not None
    teacher = Teacher(healing.teacher)
    check_student(teacher.record, healing.source)
    if teacher.record.text != text_digest(healing.tokens):
        raise HealingError(
            f"{healing.teacher}: the parent's outputs over another text; make them over this one"
        )
    places = _places(healing.source, teacher.record, params.kept)
    healer = _trained(healing, params)
    layers = Blocks(healer.model).layers
    matched = {original: layers[place] for original, place in places.items()}
    filters = nn.ModuleDict()
    if params.filters == "linear":
        filters.update({str(block): _identity(teacher.record.width) for block in matched})
    loss = Distillation(teacher, params, matched, filters)
    return dataclasses.replace(
        healer,
        loss=loss,
        loss_bytes=loss.bytes(params.micro_batch_size),
        beside=filters.to(healing.device),
    )


def _trained(healing: Healing, params: DistillParams) -> Healer:
    """What trains, and how it is written."""
    if params.train == "lora":
        return adapter(healing)
    depth = len(Blocks(skeleton(healing.source)))
    blocks = depth if params.train == "all" else params.blocks
    own = params.model_dump(include={*TrainingParams.model_fields})
    return thawed(dataclasses.replace(healing, params=LastBlocksParams(**own, blocks=blocks)))


class Distillation:
    """The loss of a micro batch: `distribution_loss`, and `hidden_loss` where blocks are matched.

    The weight of the second is alpha = L_logits / L_hidden, without gradient, unless it is given
    (arXiv:2407.14679 section 3).
    """

    def __init__(
        self,
        teacher: Teacher,
        params: DistillParams,
        matched: dict[int, nn.Module],
        filters: nn.ModuleDict,
    ) -> None:
        """Match the student's blocks `matched`, by the parent's index, through `filters`."""
        self._teacher = teacher
        self._params = params
        self._matched = matched
        self._filters = {int(block): each for block, each in filters.items()}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar in float32."""
        tokens, params = batch["input_ids"], self._params
        targets = self._teacher.targets(batch["index"].tolist(), tokens.device)
        states: dict[int, Tensor] = {}
        with outputs_of(self._matched, states.__setitem__):
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = distribution_loss(
            logits, targets, tokens, tau=params.tau, ce_weight=params.ce_weight
        )
        if not targets.hidden:
            return loss
        gap = hidden_loss(states, targets, self._filters)
        alpha = params.hidden_weight or loss.detach() / gap.detach().clamp(min=_TINY)
        return loss + alpha * gap

    def bytes(self, windows: int) -> int:
        """Memory at its peak for a micro batch: targets, logits, gradients and temporaries.

        The targets as they are in their files and as a batch, then `distribution_bytes`, and of
        each matched block five streams (T, D) in float32: the student's and its parent's, the
        filtered one, and two gradients.
        """
        record = self._teacher.record
        hidden = 5 * 4 * record.width * len(record.hidden) * record.length
        logits = distribution_bytes(windows * record.length, record.vocab_size)
        return windows * (2 * record.window_bytes + hidden) + logits


def _places(source: Path, record: TeacherRecord, kept: tuple[int, ...] | None) -> dict[int, int]:
    """Where in the student each of the parent's blocks to match is."""
    if not record.hidden:
        return {}
    width = AutoConfig.from_pretrained(source).hidden_size
    if width != record.width:
        raise HealingError(
            f"{source}: {width} channels, its parent {record.width}; match no heal.hidden states"
        )
    depth = len(Blocks(skeleton(source)))
    known = list(kept) if kept is not None else recognise(sketch(source), record.blocks)
    if len(known) != depth:
        raise HealingError(f"heal.kept lists {len(known)} blocks, but {source} has {depth}")
    missing = sorted({*record.hidden} - {*known})
    if missing:
        raise HealingError(
            f"heal.hidden: blocks {missing} of the parent are not in the student, which has {known}"
        )
    return {original: known.index(original) for original in record.hidden}


def _identity(width: int) -> nn.Linear:
    """A filter that changes nothing yet."""
    linear = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        nn.init.eye_(linear.weight)
    return linear
