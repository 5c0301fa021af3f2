"""A checkpoint opened for streaming: everything but the blocks in memory.

The model is built with its blocks on the meta device, and one block at a time
gets its weights. What comes before and after the blocks (embedding, positions,
masks, final norm, head, soft caps) is run by the model's own forward with the
blocks replaced by stand-ins, so no family needs code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from compressor.blocks import Blocks, hidden, refuse_encoder_decoder
from compressor.dense import DenseReader
from compressor.errors import CheckpointError, UnsupportedArchitecture
from compressor.shallow import register

register()

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
        self.model = skeleton(folder, self.dtype).requires_grad_(False)
        self.blocks = Blocks(self.model)
        self._shapes = {name: each.shape for name, each in self.model.state_dict().items()}
        self._calls: dict[tuple[str, int, int], list[Call]] = {}
        self._has_shell = False
        self._load_shell()
        for name, buffer in self.model.named_buffers():
            module = self.model.get_submodule(name.rpartition(".")[0])
            module._buffers[name.rpartition(".")[2]] = buffer.to(self.device)

    def _load_shell(self) -> None:
        if not self._has_shell:
            self._put_shell(self._read)

    def drop_shell(self) -> None:
        """Free the weights of all but the blocks; what needs them next reads them again."""
        if self._has_shell:
            self._put_shell(
                lambda name: torch.empty(self._shapes[name], dtype=self.dtype, device="meta")
            )

    def _put_shell(self, weight: Callable[[str], Tensor]) -> None:
        inside = self.blocks.prefix + "."
        tied: Any = self.model.all_tied_weights_keys
        shell = [n for n in self._shapes if not n.startswith(inside) and n not in tied]
        self.model.load_state_dict({n: weight(n) for n in shell}, strict=False, assign=True)
        self.model.tie_weights()  # type: ignore[operator]
        self._has_shell = not self._has_shell

    def _read(self, name: str) -> Tensor:
        weight = self.reader.read(name).to(self.device, self.dtype)
        if weight.shape != self._shapes[name]:
            raise CheckpointError(
                f"{self.reader.checkpoint.folder}: {name} has shape {tuple(weight.shape)}, "
                f"but config.json says {tuple(self._shapes[name])}"
            )
        if not all_finite(weight):
            raise CheckpointError(
                f"{self.reader.checkpoint.folder}: {name} holds NaN or infinity; "
                "the checkpoint is damaged, fetch it again"
            )
        return weight

    def weight(self, index: int, name: str) -> Tensor:
        """A weight of block `index` by its name inside the block, read from disk."""
        return self._read(f"{self.blocks.prefix}.{index}.{name}")

    @contextmanager
    def resident(
        self, index: int, weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Give block `index` its weights, or those given, for the length of a `with` block.

        Blocks whose branches it runs have the weights of these meanwhile.
        """
        if weights is None:
            with self.reader.checkpoint.opened():
                weights = {n: self.weight(index, n) for n in self.blocks.layers[index].state_dict()}
        with ExitStack() as lent:
            for kind, giver in self.blocks.reused.get(index, {}).items():
                names = self._branch_weights(giver, kind)
                lent.enter_context(self._filled(giver, {n: self.weight(giver, n) for n in names}))
            yield lent.enter_context(self._filled(index, weights))

    @contextmanager
    def _filled(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        block = self.blocks.layers[index]
        before = dict(block.state_dict())
        block.load_state_dict(weights, strict=False, assign=True)
        try:
            yield block.eval()
        finally:
            block.load_state_dict(before, assign=True)

    def _branch_weights(self, index: int, kind: str) -> list[str]:
        config: Any = self.model.config
        children = {config.branches[kind]["zero"], *config.branches[kind]["identity"]}
        names = self.blocks.layers[index].state_dict()
        return [name for name in names if name.partition(".")[0] in children]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Residual stream entering block 0, (B, T, D), from tokens (B, T).

        Also remembers, per shape, the masks and positions the model hands its blocks.
        """
        self._load_shell()
        calls: list[Call] = []
        stream: list[Tensor] = []

        def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            stream.append(x)
            calls.append((args, kwargs))
            return x

        with self.blocks.stand_in(record):
            decoder: Any = self.model.get_decoder()  # type: ignore[operator]
            decoder(input_ids=tokens.to(self.device), use_cache=False)
        self._calls[self._kind(stream[0])] = calls
        return stream[0]

    def run(self, index: int, x: Tensor, block: nn.Module | None = None) -> Tensor:
        """Residual stream after block `index`, (B, T, D) from (B, T, D).

        The block is the resident one, or another `block` that stands in its place.
        """
        args, kwargs = self._calls[self._kind(x)][index]
        block = self.blocks.layers[index] if block is None else block
        return hidden(type(block).forward(block, x.to(self.device), *args, **kwargs))

    def _kind(self, x: Tensor) -> tuple[str, int, int]:
        """What the masks depend on: how attention is computed, batch size and length."""
        config: Any = self.model.config
        return config._attn_implementation, x.shape[0], x.shape[1]

    @contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Attention by explicit maps, for the length of a `with` block.

        Its masks differ from those of fused kernels, so shapes must be embedded under it too.
        """
        model: Any = self.model
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(usual)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) in float32 from the residual stream after the last block."""
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """As `logits`, keeping the gradient with respect to x."""
        return self._behind(self.model, x).logits.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def normed(self, x: Tensor) -> Tensor:
        """What the head reads, (B, T, D) in float32: the stream behind the final norm."""
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        return self._behind(decoder, x).last_hidden_state.float()  # type: ignore[no-any-return]

    def _behind(self, model: Any, x: Tensor) -> Any:
        """The output of `model` when its last block returns `x`."""
        self._load_shell()
        first = True

        def inject(own: Tensor, *_: Any, **__: Any) -> Tensor:
            nonlocal first
            own, first = (x.to(own), False) if first else (own, False)
            return own

        placeholder = torch.zeros(x.shape[:2], dtype=torch.long, device=self.device)
        with self.blocks.stand_in(inject):
            return model(input_ids=placeholder, use_cache=False)


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite; reads x once and makes no mask of its size."""
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())


def skeleton(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the model of a checkpoint with every parameter on the meta device.

    Raises `UnsupportedArchitecture` when transformers has no causal model for the config.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        refuse_encoder_decoder(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False), no_init_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedArchitecture(f"{folder}: no causal language model ({reason})") from error
    return model.eval()
