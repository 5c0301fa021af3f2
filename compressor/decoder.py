"""A checkpoint opened for streaming: everything but the blocks in memory.

The model is built with its blocks on the meta device, and one block at a time
gets its weights. What comes before and after the blocks (embedding, positions,
masks, final norm, head, soft caps) is run by the model's own forward with the
blocks replaced by stand-ins, so no family needs code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.blocks import Blocks, hidden, refuse_encoder_decoder
from compressor.dense import DenseReader
from compressor.errors import CheckpointError, UnsupportedArchitecture

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Decoder:
    """A causal language model whose blocks are read from disk when they are needed.

    Attributes:
        model: the transformers model, blocks on the meta device.
        blocks: the view of its blocks.
        device, dtype: where and in what it computes; dtype is float32 on the CPU.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Build the skeleton of the checkpoint in `folder` and load all but its blocks."""
        self.reader = DenseReader(folder)
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else self.reader.checkpoint.dtype
        self.model = skeleton(folder, self.dtype)
        self.blocks = Blocks(self.model)
        self._calls: dict[torch.Size, list[Call]] = {}
        self._load_shell()

    def _load_shell(self) -> None:
        inside = self.blocks.prefix + "."
        tied: Any = self.model.all_tied_weights_keys
        shell = [n for n in self.model.state_dict() if not n.startswith(inside) and n not in tied]
        self.model.load_state_dict({n: self._read(n) for n in shell}, strict=False, assign=True)
        self.model.tie_weights()  # type: ignore[operator]
        for name, buffer in self.model.named_buffers():
            module = self.model.get_submodule(name.rpartition(".")[0])
            module._buffers[name.rpartition(".")[2]] = buffer.to(self.device)

    def _read(self, name: str) -> Tensor:
        weight = self.reader.read(name).to(self.device, self.dtype)
        expected = self.model.state_dict()[name].shape
        if weight.shape != expected:
            raise CheckpointError(
                f"{self.reader.checkpoint.folder}: {name} has shape {tuple(weight.shape)}, "
                f"but config.json says {tuple(expected)}"
            )
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{self.reader.checkpoint.folder}: {name} holds NaN or infinity; "
                "the checkpoint is damaged, fetch it again"
            )
        return weight

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Give block `index` its weights for the length of a `with` block."""
        block = self.blocks.layers[index]
        meta = dict(block.state_dict())
        path = f"{self.blocks.prefix}.{index}"
        block.load_state_dict({n: self._read(f"{path}.{n}") for n in meta}, assign=True)
        try:
            yield block.eval()
        finally:
            block.load_state_dict(meta, assign=True)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Residual stream entering block 0, (B, T, D), from tokens (B, T).

        Also remembers, per shape, the masks and positions the model hands its blocks.
        """
        calls: list[Call] = []
        stream: list[Tensor] = []

        def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            stream.append(x)
            calls.append((args, kwargs))
            return x

        with self._stand_in(record):
            decoder: Any = self.model.get_decoder()  # type: ignore[operator]
            decoder(input_ids=tokens.to(self.device), use_cache=False)
        self._calls[tokens.shape] = calls
        return stream[0]

    def run(self, index: int, x: Tensor, block: nn.Module | None = None) -> Tensor:
        """Residual stream after block `index`, (B, T, D) from (B, T, D).

        The block is the resident one, or another `block` that stands in its place.
        """
        args, kwargs = self._calls[x.shape[:2]][index]
        block = self.blocks.layers[index] if block is None else block
        return hidden(type(block).forward(block, x.to(self.device), *args, **kwargs))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) in float32 from the residual stream after the last block."""
        first = True

        def inject(own: Tensor, *_: Any, **__: Any) -> Tensor:
            nonlocal first
            own, first = (x.to(own), False) if first else (own, False)
            return own

        placeholder = torch.zeros(x.shape[:2], dtype=torch.long, device=self.device)
        with self._stand_in(inject):
            output: Any = self.model(input_ids=placeholder, use_cache=False)
        return output.logits.float()  # type: ignore[no-any-return]

    @contextmanager
    def _stand_in(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Replace every block's forward for the length of a `with` block."""
        stand_in = (lambda *a, **k: (forward(*a, **k),)) if self.blocks.returns_tuple else forward
        try:
            for block in self.blocks:
                block.forward = stand_in
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def skeleton(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the model of a checkpoint with every parameter on the meta device.

    Raises `UnsupportedArchitecture` when transformers has no causal model for the config.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        refuse_encoder_decoder(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedArchitecture(f"{folder}: no causal language model ({reason})") from error
    return model.eval()
