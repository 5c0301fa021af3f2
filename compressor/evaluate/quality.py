"""Quality by the walk: perplexity, and agreement with the model it all started from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
from compressor.walk import Stream, walk

STATES = "final_states.safetensors"


@dataclass(frozen=True)
class Reference:
    """The original model and the folder of its own evaluation on the same windows."""

    checkpoint: Path
    evaluation: Path


def evaluate(
    folder: Path,
    tokens: Tensor,
    out: Path,
    *,
    reference: Reference | None = None,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Quality of a checkpoint on windows (N, T): next-token loss over N (T - 1) tokens.

    perplexity = exp(mean of -log p(token | its window before it)), float32 log-softmax and
    float64 sums. Against a reference: KL(reference || model) in nats and top-1 agreement per
    token. Logits are never stored: without a reference the final residual stream goes to
    `final_states.safetensors` in `out`, and later evaluations apply the original's head to it.
    """
    decoder = Decoder(folder, device)
    stream = Stream(decoder, tokens, batch_size)
    for _ in walk(stream, "evaluate"):
        pass
    teacher = _Teacher(reference, device) if reference else None
    losses: list[float] = []
    divergence = agreement = 0.0
    for index in range(len(tokens)):
        row = slice(index, index + 1)
        scores = log_softmax(decoder.logits(stream.x[row])[0, :-1], dim=-1)
        targets = tokens[index, 1:].to(scores.device)
        losses.append(-scores.gather(1, targets[:, None]).double().mean().item())
        if teacher:
            known = teacher.log_probabilities(row)
            kl = kl_div(scores, known, reduction="none", log_target=True)
            divergence += kl.sum(-1).double().mean().item()
            agreement += (scores.argmax(-1) == known.argmax(-1)).double().mean().item()
    if not teacher:
        save_file({"x": stream.x.contiguous()}, out / STATES)
    nll = math.fsum(losses) / len(losses)
    return {
        "perplexity": math.exp(nll),
        "nll": nll,
        "window_nll": losses,
        "kl": divergence / len(tokens) if teacher else None,
        "top1_agreement": agreement / len(tokens) if teacher else None,
        "blocks": len(decoder.blocks),
        "parameters": parameters(folder),
        "bytes": Checkpoint(folder).weight_bytes,
        "protocol": {
            "windows": len(tokens),
            "length": tokens.shape[1],
            "stride": tokens.shape[1],
            "predicted_tokens": len(tokens) * (tokens.shape[1] - 1),
        },
    }


class _Teacher:
    """The original's output distribution, from its stored final states and its head alone."""

    def __init__(self, reference: Reference, device: str) -> None:
        self._head = Decoder(reference.checkpoint, device)
        self._states = load_file(reference.evaluation / STATES)["x"]

    def log_probabilities(self, row: slice) -> Tensor:
        return log_softmax(self._head.logits(self._states[row])[0, :-1], dim=-1)


def parameters(folder: Path) -> int:
    """Weights of a checkpoint from its headers; a tied matrix counts once, packed ones unpacked."""
    checkpoint = Checkpoint(folder)
    count = 0
    for name in checkpoint.names:
        if name.endswith(".weight_shape"):
            count += math.prod(checkpoint.tensor(name).tolist())
        elif not name.endswith((".weight_packed", ".weight_scale", ".weight_zero_point")):
            count += math.prod(checkpoint.shape(name))
    return count
