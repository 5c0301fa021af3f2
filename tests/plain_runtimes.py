"""Load an export with plain transformers and plain onnxruntime and compare them.

Imports nothing of this project. Prints one JSON object; exits with 1 when the greedy
tokens differ. Usage: python tests/plain_runtimes.py SAFETENSORS_FOLDER ONNX_FOLDER [TOKENS]
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(safetensors: str, onnx: str, count: int) -> int:
    """Greedy tokens of both after one prompt, and the largest difference of their logits."""
    model = AutoModelForCausalLM.from_pretrained(safetensors, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(onnx)
    session = onnxruntime.InferenceSession(f"{onnx}/model.onnx")
    names = [i.name for i in session.get_inputs()[2:]]
    shapes = [(1, i.shape[1], 0, i.shape[3]) for i in session.get_inputs()[2:]]
    words = "The history of the city begins in" if tokenizer.vocab_size > 1000 else "w3 w4 w5"
    prompt = tokenizer(words, return_tensors="np")["input_ids"].astype(np.int64)

    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        ids = torch.from_numpy(prompt)
        mask = torch.ones_like(ids)
        torch_tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False
        )[0, ids.shape[1] :].tolist()
        every = torch.cat([ids[0], torch.tensor(torch_tokens)])[None]
        expected = model(every).logits.numpy()

    cache = {name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    onnx_tokens: list[int] = []
    piece, total = prompt, prompt.shape[1]
    for _ in range(count):
        feeds = {"input_ids": piece, "attention_mask": np.ones((1, total), np.int64), **cache}
        logits, *present = session.run(None, feeds)
        onnx_tokens.append(int(logits[0, -1].argmax()))
        cache = dict(zip(names, present, strict=True))
        piece, total = np.array([[onnx_tokens[-1]]]), total + 1
    empty = {name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    feeds = {"input_ids": every.numpy(), "attention_mask": np.ones(every.shape, np.int64), **empty}
    difference = float(np.abs(session.run(["logits"], feeds)[0] - expected).max())

    ours = [m for m in sys.modules if m.split(".")[0] in ("compressor", "pipelines")]
    report = {
        "same_tokens": torch_tokens == onnx_tokens,
        "tokens": count,
        "largest_logit_difference": difference,
        "text": tokenizer.decode(torch_tokens),
        "our_modules_imported": ours,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 0 if torch_tokens == onnx_tokens and not ours else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 32))
