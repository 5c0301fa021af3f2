"""What can leave a block without a trace: key-value groups with their queries, FFN channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from compressor.decoder import Decoder
from compressor.errors import NotApplicable, SelectionError

_PARTS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "k", "qkv_proj": "qkk",
    "gate_proj": "c", "up_proj": "c", "gate_up_proj": "cc",
}  # fmt: skip
"""What stands one below the other in the rows of a linear: queries, keys or values, channels."""

_FEEDING = {
    "o_proj": ({"q_proj", "k_proj", "v_proj"}, {"qkv_proj"}),
    "down_proj": ({"gate_proj", "up_proj"}, {"gate_up_proj"}),
}
"""Per output matrix, the sets of linears that may feed it and that lose rows with its columns."""

_SHARED = {"q_norm.weight", "k_norm.weight"}
"""Parameters beside the linears that all heads share, when they are as long as one head."""


@dataclass(frozen=True)
class Branch:
    """Attention or feed-forward of one block as equal units, each of which can go.

    Attributes:
        path: full name of the module.
        output: its last linear; a unit is `size` consecutive columns of it.
        feeding: the linears that lose rows with it.
        count: key-value groups or channels.
        rows: rows per unit of queries (q), of keys and of values (k), or of channels (c).
    """

    path: str
    output: str
    feeding: tuple[str, ...]
    count: int
    rows: dict[str, int]

    @property
    def size(self) -> int:
        """Columns of the output matrix per unit."""
        return self.rows["q"] if "q" in self.rows else self.rows["c"]

    def columns(self, units: Tensor) -> Tensor:
        """Columns of the output matrix that belong to `units`."""
        return spread(units, self.size)

    def rows_of(self, linear: str, units: Tensor) -> Tensor:
        """Rows of a feeding linear that belong to `units`."""
        pieces, start = [], 0
        for part in _PARTS[linear]:
            pieces.append(start + spread(units, self.rows[part]))
            start += self.count * self.rows[part]
        return torch.cat(pieces)


@dataclass(frozen=True)
class Sizes:
    """Widths that every block of a model shares, as its config states them."""

    heads: int
    groups: int
    head_dim: int
    channels: int

    def config(self, parsed: Any) -> dict[str, int]:
        """Keys of config.json, under the family's names; the head width is always written out."""
        named = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "intermediate_size": self.channels,
        }
        return {parsed.attribute_map.get(name, name): value for name, value in named.items()}


def spread(units: Tensor, size: int) -> Tensor:
    """Indices of `size` consecutive members of each unit: [2], 3 -> [6, 7, 8]."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def sizes_of(decoder: Decoder) -> Sizes:
    """The widths of a model; raises `NotApplicable` when its config does not state one for all."""
    config: Any = decoder.model.config
    attention = next(iter(decoder.blocks.attention(0).values()), None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    found = (heads, groups, getattr(attention, "head_dim", None))
    channels = getattr(config, "intermediate_size", None)
    if not all(isinstance(value, int) for value in (*found, channels)):
        raise NotApplicable(
            f"{config.model_type}: heads, key-value heads, head width and FFN width are "
            f"{(*found, channels)}; all blocks must share one number each"
        )
    return Sizes(*found, channels)  # type: ignore[arg-type]


def branches(decoder: Decoder, index: int, sizes: Sizes) -> tuple[Branch, Branch]:
    """Attention and feed-forward of block `index`.

    Raises `NotApplicable` when a linear is not one that is known to lose rows or columns head by
    head and channel by channel, or a parameter is not shared by all heads.
    """
    rows = {"q": sizes.heads // sizes.groups * sizes.head_dim, "k": sizes.head_dim}
    attention, ffn = decoder.blocks.attention(index), decoder.blocks.ffn(index)
    for modules in (attention, ffn):
        if len(modules) != 1:
            raise NotApplicable(
                f"{decoder.blocks.prefix}.{index}: expected one module for attention and one for "
                f"the feed-forward, found {', '.join(modules) or 'none'}"
            )
    return (
        _branch(*attention.popitem(), "o_proj", sizes.groups, rows),
        _branch(*ffn.popitem(), "down_proj", sizes.channels, {"c": 1}),
    )


def _branch(path: str, module: nn.Module, output: str, count: int, rows: dict[str, int]) -> Branch:
    linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
    feeding = linears.keys() - {output}
    if output not in linears or feeding not in _FEEDING[output]:
        known = " or ".join(", ".join(sorted(names)) for names in _FEEDING[output])
        raise NotApplicable(
            f"{path} has the linears {', '.join(linears) or 'none'}; only {known} with {output} "
            "are known to go head by head or channel by channel"
        )
    branch = Branch(path, output, tuple(sorted(feeding)), count, rows)
    everything = torch.arange(count)
    expected = {f"{n}.weight": len(branch.rows_of(n, everything)) for n in feeding}
    expected |= {f"{n}.bias": len(branch.rows_of(n, everything)) for n in feeding}
    own = {f"{output}.weight", f"{output}.bias"}
    for name, parameter in module.named_parameters():
        shared = name in _SHARED and parameter.shape == (rows.get("k"),)
        if name not in own and not shared and parameter.shape[:1] != (expected.get(name),):
            raise NotApplicable(
                f"{path}.{name} has shape {tuple(parameter.shape)}, which does not split into "
                f"{count} equal units of their own"
            )
    if linears[output].in_features != count * branch.size:
        raise NotApplicable(
            f"{path}.{output} has {linears[output].in_features} inputs, expected {count} x "
            f"{branch.size}"
        )
    return branch


def narrowed(
    decoder: Decoder, sizes: Sizes, *, ratio: float, attention_ratio: float, multiple: int
) -> Sizes:
    """The widths after removing `ratio` of the weights of every block's linears.

    Of the key-value groups round((1 - attention_ratio) n) stay, or the nearest number that the
    config class accepts (Llama wants heads to divide the hidden size). Channels make up for the
    difference, rounded to a multiple. Raises `SelectionError` when no channel would stay or nothing
    would go.
    """
    weights = [
        sum(weight.numel() for name, weight in module.named_parameters() if weight.ndim == 2)
        for part in (decoder.blocks.attention(0), decoder.blocks.ffn(0))
        for module in part.values()
    ]
    wanted = (1 - attention_ratio) * sizes.groups
    counts = sorted(range(1, sizes.groups + 1), key=lambda n: (abs(n - wanted), -n))
    per_group = sizes.heads // sizes.groups
    options = (replace(sizes, groups=n, heads=n * per_group) for n in counts)
    chosen = next(option for option in options if _accepted(decoder, option))
    gone = weights[0] * (1 - chosen.groups / sizes.groups)
    share = 1 - max(0.0, ratio * sum(weights) - gone) / weights[1]
    channels = round(share * sizes.channels / multiple) * multiple
    if channels <= 0:
        raise SelectionError(
            f"ratio {ratio} leaves {share * sizes.channels:.0f} of {sizes.channels} FFN channels, "
            f"less than half of multiple {multiple}; ask for less"
        )
    new = replace(chosen, channels=min(channels, sizes.channels))
    if new == sizes:
        raise SelectionError(
            f"ratio {ratio} removes nothing: the least step is one of {sizes.groups} key-value "
            f"groups or {multiple} of {sizes.channels} channels; ask for more, or a lower multiple"
        )
    return new


def _accepted(decoder: Decoder, sizes: Sizes) -> bool:
    config: Any = decoder.model.config
    try:
        type(config).from_dict(config.to_dict() | sizes.config(config))
    except (StrictDataclassError, ValueError):
        return False
    return True
