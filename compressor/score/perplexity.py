"""Leave-one-out perplexity: what the loss gains when one block is bypassed."""

from __future__ import annotations

from torch import Tensor

from compressor.decoder import Decoder
from compressor.score.leave_one_out import Bypass, LeaveOneOut


class Perplexity(LeaveOneOut):
    """log(PPL_without_i / PPL) = mean of log p(next token) - log p_without_i(next token), nats.

    The order of the blocks is that of Shortened LLaMA's perplexities (arXiv:2402.02834 section
    3.2); a negative value is a block whose removal helps on this text.
    """

    name = "perplexity"

    def __init__(
        self,
        decoder: Decoder,
        tokens: Tensor,
        bypass: Bypass,
        *,
        max_windows: int,
        positions: str,
    ) -> None:
        """Prepare for the first `max_windows` of tokens (N, T)."""
        super().__init__(bypass, tokens, max_windows, positions)
        self.wanted[:, -1] = False  # what follows a window's last token is not known

    def compare(self, full: Tensor, skip: Tensor, following: Tensor) -> float:
        """Sum over tokens of the loss without the block less the loss with it."""
        losses = full.gather(1, following[:, None]) - skip.gather(1, following[:, None])
        return float(losses.double().sum())
