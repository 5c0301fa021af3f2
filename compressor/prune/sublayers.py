"""Removing or sharing attention and feed-forward sublayers: the canonical checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compressor import progress
from compressor.blocks import Blocks
from compressor.checkpoint import CheckpointWriter, write_json
from compressor.decoder import skeleton
from compressor.dense import DenseReader
from compressor.errors import CheckpointError, NotApplicable, SelectionError
from compressor.families import native_config
from compressor.prune.blocks import check, opened, pruned_config
from compressor.records import Selection
from compressor.shallow.configuration_shallow import GUARD, ShallowConfig
from compressor.shallow.sublayer_removal import remove_sublayers, share_sublayers
from compressor.sublayers import Sublayer, find_sublayers

Skipped = dict[int, list[str]]
"""Of each block that lacks a branch, which: `["attention"]` or `["mlp"]`."""

Reused = dict[int, dict[str, int]]
"""Of each block that runs a branch of another one, whose: `{"attention": 3}`."""


@dataclass(frozen=True)
class Cut:
    """What is left of a model.

    Attributes:
        native: the native config.json, cut to the kept blocks.
        skipped: by new index, what the kept blocks lack.
        reused: by new index, whose branches the kept blocks run.
        branches: per branch the children of a block that go with it.
        blocks: dotted path of the blocks.
        depth: how many are left.
    """

    native: dict[str, Any]
    skipped: Skipped
    reused: Reused
    branches: dict[str, dict[str, Any]]
    blocks: str
    depth: int


def prune(source: Path, selection: Selection, out: Path, *, native: bool) -> None:
    """Write the canonical checkpoint of what the selection leaves; the rest is carried bitwise.

    Weights of a removed branch and the norms that serve it alone are gone, a block that lost
    both branches is gone whole, and attentions are numbered densely in the KV cache. A branch
    that runs with another block's weights is stored there only. With `native`, a result in which
    every block is whole is written as a native checkpoint.
    Raises `SelectionError` for a sublayer that is not there or when no attention is left and
    `NotApplicable` for blocks whose branches cannot be told apart, or not exchanged.
    """

    def config(cut: Cut) -> dict[str, Any]:
        return cut.native if native and not (cut.skipped or cut.reused) else canonical_config(cut)

    write(source, selection, out, config)


def write(
    source: Path, selection: Selection, out: Path, config_of: Callable[[Cut], dict[str, Any]]
) -> None:
    """Write what the selection leaves of `source` in the format whose config `config_of` makes.

    The new model names the tensors that are read, one at a time.
    """
    checkpoint, before, blocks = opened(source, selection)
    if checkpoint.shares:
        raise NotApplicable(
            f"{source}: some sublayers run with another block's weights, and such a checkpoint is "
            "not cut again; cut the one it was made from"
        )
    kept, skipped = survivors(selection, blocks.skipped)
    reused = _reused(selection, skipped)
    cut = Cut(
        pruned_config(source, native_config(checkpoint.config), kept),
        {new: skipped[old] for new, old in enumerate(kept) if old in skipped},
        {
            new: {kind: kept.index(giver) for kind, giver in reused[old].items()}
            for new, old in enumerate(kept)
            if old in reused
        },
        _branches(before, source),
        blocks.prefix,
        len(kept),
    )
    config = config_of(cut)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    after = skeleton(out)
    fresh = {i: kinds for i, kinds in skipped.items() if i in kept and i not in blocks.skipped}
    remove_sublayers(blocks.layers, fresh, cut.branches)
    _check_exchange(blocks.layers, reused, cut.branches)
    share_sublayers(blocks.layers, reused, cut.branches)
    check(before.config, blocks.layers, after, kept)
    reader = DenseReader(source)
    names = _stored_names(reader, after, Blocks(after).prefix, kept)
    with CheckpointWriter(out) as writer:
        for name, stored in progress.track(names.items(), "prune", len(names)):
            writer.add(name, checkpoint.tensor(stored))
        writer.finish(config, checkpoint.side_files)


def survivors(selection: Selection, skipped: Skipped) -> tuple[list[int], Skipped]:
    """The blocks that stay and, by old index, all that they lack: before and from now on."""
    lacking = {i: list(kinds) for i, kinds in skipped.items()}
    asked = (("attention", selection.drop_attention), ("mlp", selection.drop_ffn))
    for kind, drop in asked:
        for index in drop:
            if kind in lacking.setdefault(index, []):
                raise SelectionError(f"block {index} has no {kind} left to remove")
            lacking[index].append(kind)
    gone = {*selection.drop_blocks, *(i for i, kinds in lacking.items() if len(kinds) == 2)}
    kept = [i for i in range(selection.num_blocks) if i not in gone]
    if not any("attention" not in lacking.get(i, ()) for i in kept):
        raise SelectionError("no attention would be left, and so no KV cache; keep at least one")
    return kept, {i: lacking[i] for i in kept if i in lacking}


def blocks_left(folder: Path, cuts: Iterable[Selection]) -> list[int]:
    """Indices in `folder` of the blocks that are left after cuts one after the other."""
    blocks = Blocks(skeleton(folder))
    left, skipped = list(range(len(blocks))), blocks.skipped
    for selection in cuts:
        kept, lacking = survivors(selection, skipped)
        left = [left[old] for old in kept]
        skipped = {new: lacking[old] for new, old in enumerate(kept) if old in lacking}
    return left


def _reused(selection: Selection, skipped: Skipped) -> Reused:
    """By old index, whose branches the blocks run."""
    found: Reused = {}
    for kind, reuse in (("attention", selection.reuse_attention), ("mlp", selection.reuse_ffn)):
        for taker, giver in sorted(reuse.items()):
            for index in (taker, giver):
                if kind in skipped.get(index, ()):
                    raise SelectionError(f"block {index} has no {kind} left to share")
            found.setdefault(taker, {})[kind] = giver
    return found


def _check_exchange(layers: nn.ModuleList, reused: Reused, branches: dict[str, Any]) -> None:
    """Refuse branches that hold other weights than their givers, or count blocks inside."""
    for taker, givers in reused.items():
        for kind, giver in givers.items():
            for name in (branches[kind]["zero"], *branches[kind]["identity"]):
                own, given = (getattr(layers[index], name) for index in (taker, giver))
                shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (own, given)]
                counted = any("layer_idx" in vars(m) for m in own.modules() if m is not own)
                if shapes[0] != shapes[1] or counted:
                    raise NotApplicable(
                        f"block {taker} cannot run with the {kind} of block {giver}: their {name} "
                        "are not made of the same parts, or count blocks inside; drop it instead"
                    )


def canonical_config(cut: Cut) -> dict[str, Any]:
    """The config.json of a canonical checkpoint; no class but ours can load it by mistake."""
    native = dict(cut.native)
    reused = {str(i): givers for i, givers in cut.reused.items()}
    return {
        "model_type": ShallowConfig.model_type,
        "architectures": ["ShallowForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_shallow.ShallowConfig",
            "AutoModelForCausalLM": "modeling_shallow.ShallowForCausalLM",
        },
        "vocab_size": GUARD,
        "num_hidden_layers": cut.depth,
        "blocks": cut.blocks,
        "branches": cut.branches,
        "per_layer_config": {str(i): {"skip": kinds} for i, kinds in cut.skipped.items()},
        **({"reused": reused} if reused else {}),
        "base_model_type": native.pop("model_type"),
        "base_config": native,
    }


def _branches(model: nn.Module, source: Path) -> dict[str, dict[str, Any]]:
    """Per branch, the children of a block that go with it; they must be the same in all."""
    known: dict[str, dict[str, Any]] = getattr(model.config, "branches", {})
    if known:
        return known
    found = [
        {"attention": _children(each.attention), "mlp": _children(each.ffn)}
        for each in find_sublayers(model)
    ]
    for index, branches in enumerate(found):
        if branches != found[0]:
            raise NotApplicable(
                f"{source}: block {index} is built of other modules than block 0 ({branches} for "
                f"{found[0]}); only whole blocks can be removed from this model"
            )
    return found[0]


def _children(branch: Sublayer | None) -> dict[str, Any]:
    assert branch is not None  # of a native model
    *before, zero = (name.rpartition(".")[2] for name in branch.modules)
    norms = [name.rpartition(".")[2] for name in branch.norms]
    return {"zero": zero, "identity": [*norms, *before]}


def _stored_names(
    reader: DenseReader, after: nn.Module, prefix: str, kept: list[int]
) -> dict[str, str]:
    """For each tensor of the new model, the name under which the source stores it."""
    tied: Any = after.all_tied_weights_keys
    names: dict[str, str] = {}
    for name in after.state_dict():
        old = name
        if name.startswith(f"{prefix}."):
            index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            old = f"{prefix}.{kept[int(index)]}.{rest}"
        stored = reader.locate(old)
        if stored:
            names[name] = stored
        elif name not in tied:
            raise CheckpointError(f"{reader.checkpoint.folder}: no weight for {old!r}")
    return names
