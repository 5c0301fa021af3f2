"""What bypassing every block costs, in forward passes of the whole model over the same windows.

Both sides run here, one after the other, several times in turn; the bound is (L+1)/2 forwards
and 15 %. Reading the weights is in our time and not in the bare forward's.

    python benchmarks/layer_contribution.py MODEL [--windows 4] [--length 128] [--repeats 3] [--cpu]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from transformers import AutoModelForCausalLM

from compressor.score import LayerContributionParams, PerplexityParams
from compressor.score.collect import score


def main() -> None:
    """Measure and write one JSON object; exit with 1 above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--positions", choices=("last", "alternate", "all"), default="alternate")
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds")
    asked = parser.parse_args()
    clock = process_time if asked.cpu else perf_counter
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    blocks, vocabulary = model.config.num_hidden_layers, model.config.vocab_size
    tokens = torch.randint(vocabulary, (asked.windows, asked.length))
    methods = {
        "layer_contribution": LayerContributionParams(
            max_windows=asked.windows, positions=asked.positions
        )
    }
    if asked.positions != "last":
        methods["perplexity"] = PerplexityParams(
            max_windows=asked.windows, positions=asked.positions
        )
    forwards, ours = [], []
    for _ in range(asked.repeats):
        start = clock()
        with torch.no_grad():
            model(tokens, use_cache=False)
        between = clock()
        score(asked.model, tokens, methods, batch_size=asked.windows)
        forwards.append(between - start)
        ours.append(clock() - between)
    bound = 1.15 * (blocks + 1) / 2
    spent = median(ours) / median(forwards)
    report = {
        "methods": sorted(methods),
        "positions": asked.positions,
        "tokens": tokens.numel(),
        "threads": torch.get_num_threads(),
        "forward_seconds": round(median(forwards), 3),
        "seconds": round(median(ours), 3),
        "forwards": round(spent, 2),
        "bound": round(bound, 2),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.exit(spent > bound)


if __name__ == "__main__":
    main()
