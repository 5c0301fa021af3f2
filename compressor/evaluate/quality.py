"""Quality by the walk: perplexity, and agreement with the model it all started from."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder, skeleton
from compressor.errors import CheckpointError, NotApplicable
from compressor.evaluate.windows import describe
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
    token, and how the added loss spreads over windows. Logits are never stored: without a
    reference the final residual stream goes to `final_states.safetensors` in `out`, and later
    evaluations apply the original's head to it.
    Raises `CheckpointError` when the loss is NaN or too large for a perplexity and `NotApplicable`
    for a reference of another vocabulary.
    """
    decoder = Decoder(folder, device)
    stream = Stream(decoder, tokens, batch_size)
    for _ in walk(stream, "evaluate"):
        pass
    teacher = _Teacher(reference, decoder) if reference else None
    losses: list[float] = []
    divergence = agreement = 0.0
    added: list[float] = []
    for index in range(len(tokens)):
        row = slice(index, index + 1)
        scores = log_softmax(decoder.logits(stream.x[row])[0, :-1], dim=-1)
        losses.append(_loss(scores, tokens[index]))
        if teacher:
            known = teacher.log_probabilities(row)
            added.append(losses[-1] - _loss(known, tokens[index]))
            kl = kl_div(scores, known, reduction="none", log_target=True)
            divergence += kl.sum(-1).double().mean().item()
            agreement += (scores.argmax(-1) == known.argmax(-1)).double().mean().item()
    if not teacher:
        save_file({"x": stream.x.contiguous()}, out / STATES)
    nll = _finite(math.fsum(losses) / len(losses), decoder)
    return {
        "perplexity": math.exp(nll),
        "nll": nll,
        "window_nll": losses,
        "kl": divergence / len(tokens) if teacher else None,
        "top1_agreement": agreement / len(tokens) if teacher else None,
        "added_loss": describe(added, teacher.norms()) if teacher else None,
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


def _loss(scores: Tensor, window: Tensor) -> float:
    """Mean -log p of a window (T,) but its first token; scores (T - 1, V) are log p."""
    targets = window[1:, None].to(scores.device)
    return -scores.gather(1, targets).double().mean().item()


def _finite(nll: float, decoder: Decoder) -> float:
    if not nll < math.log(sys.float_info.max):  # NaN is not less than anything
        raise CheckpointError(
            f"{decoder.reader.checkpoint.folder}: its loss on the evaluation text is {nll:.4g} "
            f"nats per token, computed in {decoder.dtype}; the weights are damaged, or too large "
            "for that dtype: try --set device=cpu, which computes in float32"
        )
    return nll


class _Teacher:
    """The original's output distribution, from its stored final states and its head alone."""

    def __init__(self, reference: Reference, student: Decoder) -> None:
        self._head = Decoder(reference.checkpoint, str(student.device))
        configs: list[Any] = [each.model.config for each in (student, self._head)]
        sizes = [config.vocab_size for config in configs]
        if sizes[0] != sizes[1]:
            raise NotApplicable(
                f"{student.reader.checkpoint.folder} knows {sizes[0]} tokens, its reference "
                f"{sizes[1]}: compare models of one vocabulary"
            )
        self._states = load_file(reference.evaluation / STATES)["x"]

    def log_probabilities(self, row: slice) -> Tensor:
        return log_softmax(self._head.logits(self._states[row])[0, :-1], dim=-1)

    def norms(self) -> list[float]:
        """Mean over a window's tokens of the length of its final state."""
        return [float(x.double().norm(dim=-1).mean()) for x in self._states]


def parameters(folder: Path) -> int:
    """Weights of a checkpoint's model, from shapes alone: a tied matrix once, packed ones unpacked.

    Stored names would not do: old checkpoints also hold masks and second copies of tied weights.
    """
    model: Any = skeleton(folder)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())
