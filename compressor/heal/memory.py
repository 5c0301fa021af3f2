"""How much memory a training will take, from short forwards of the model itself."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import HealingError
from compressor.heal import TrainingParams
from compressor.heal.healer import Healer, Healing
from compressor.memory import from_proc

log = logging.getLogger(__name__)
_PROBES = (16, 32, 64)
_ADAM = 2  # moments per weight
_SCATTERED = 2
"""Of the memory that one step frees, the C allocator finds only a part fit for the next: measured
peaks are 1.0 to 1.7 times what a step keeps."""
_MAPPED = 32 * 2**20
"""What is larger, the C library maps by itself (M_MMAP_THRESHOLD) and gives back at once."""
_LATER = 128 * 2**20
"""Libraries that the first step loads, and buffers of their kernels."""


def forecast(healing: Healing, healer: Healer) -> dict[str, int]:
    """Bytes that training will take by kind, and their `total`, before its first step.

    total = resident + n (1 + 2) 4 + activations: what the process (or the device) holds now, a
    gradient and two Adam moments in float32 of each of the n weights that train together, and
    what autograd keeps of a micro batch. The last is counted exactly on windows of 16, 32 and
    64 tokens and continued to their full length, c + b T + a T^2, so attention that keeps its
    maps is seen. The loss takes what its method says, and next-token loss three times the size
    of the logits: their log-softmax, its gradient and theirs. On the CPU all of this counts
    twice, and what checkpointing lets go of once. Warns when there is less memory.
    """
    params, length = healing.params, healing.tokens.shape[1]
    vocabulary: int = healer.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    kept, let_go = (params.micro_batch_size * size for size in _of_a_window(healer.model, healing))
    logits = params.micro_batch_size * 4 * length * vocabulary
    activations = kept + (healer.loss_bytes if healer.loss else 3 * logits)
    if healing.device == "cpu":
        activations = _SCATTERED * activations + let_go + _LATER
    trained = _trained_together(healer)
    parts = {
        "resident": _resident(healing.device),
        "gradients": 4 * trained,
        "optimizer": 4 * trained * _ADAM,
        "activations": activations,
    }
    total = max(_so_far(healing.device), sum(parts.values()))
    free = _free(healing.device)
    if free and total - parts["resident"] > free:
        log.warning(
            "heal: about %.1f GiB more are needed and %.1f GiB are free; %s",
            (total - parts["resident"]) / 2**30, free / 2**30, remedies(params),
        )  # fmt: skip
    return {**parts, "total": total}


def remedies(params: TrainingParams) -> str:
    """What to change when memory does not suffice."""
    smaller = f"lower heal.micro_batch_size (now {params.micro_batch_size}), "
    recompute = "" if params.checkpointing else "set heal.checkpointing: true, "
    return (smaller if params.micro_batch_size > 1 else "") + recompute + "or heal with qlora"


def explain(
    error: RuntimeError | MemoryError, params: TrainingParams, step: int
) -> HealingError | None:
    """What to raise when `error` says that memory ran out; None when it says another thing."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
        return HealingError(f"out of memory at step {step + 1}; {remedies(params)}")
    return None


def _trained_together(healer: Healer) -> int:
    modules = [healer.model, *([healer.beside] if healer.beside else [])]
    weights = sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)
    return weights if healer.together is None else healer.together


def _of_a_window(model: Any, healing: Healing) -> tuple[int, int]:
    """Bytes kept for the backward pass of one window of full length, up to its logits.

    Then those that checkpointing lets go of on the way forward, in pieces below `_MAPPED`: the C
    allocator hardly finds them again for the next block, as little keeps them apart.
    """
    length = healing.tokens.shape[1]
    kept = _continued(model, healing, length)
    if not healing.params.checkpointing:
        return kept, 0
    model.gradient_checkpointing_disable()
    whole = _continued(model, healing, length)
    small = _continued(model, healing, length, _MAPPED // healing.params.micro_batch_size)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return kept + whole // int(model.config.num_hidden_layers), small


def _continued(model: nn.Module, healing: Healing, length: int, most: float = math.inf) -> int:
    """Bytes of the storages, each of at most `most` at full length, that autograd keeps."""
    probes = [min(probe, length) for probe in _PROBES]
    sizes = [
        _saved(model, healing.tokens[:1, :probe].to(healing.device), most * probe / length)
        for probe in probes
    ]
    if length <= _PROBES[-1]:
        return sizes[-1]
    a, b, c = torch.linalg.solve(
        torch.tensor([[t * t, t, 1] for t in probes], dtype=torch.float64),
        torch.tensor(sizes, dtype=torch.float64),
    ).tolist()
    return int(c + b * length + a * length * length)


def _saved(model: nn.Module, tokens: Tensor, most: float = math.inf) -> int:
    """Bytes of the distinct storages that autograd keeps for the logits, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(input_ids=tokens, use_cache=False).logits
    del logits
    return sum(size for size in kept.values() if size <= most)


def _resident(device: str) -> int:
    if device != "cpu":
        return torch.cuda.memory_allocated()
    return from_proc("/proc/self/status", "VmRSS")


def _so_far(device: str) -> int:
    """The peak until now, that of loading."""
    return 0 if device != "cpu" else from_proc("/proc/self/status", "VmHWM")


def _free(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    return from_proc("/proc/meminfo", "MemAvailable")
