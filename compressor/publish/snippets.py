"""How to load what was published, as code that the tests run from the card."""

from __future__ import annotations

import json

from compressor.publish.bundle import Bundle

PROMPT = "The history of the city begins in"
_TOKENS = 32


def snippets(bundle: Bundle, name: str, revision: str) -> dict[str, tuple[str, str]]:
    """{runtime: (language, code)} for every runtime that is known to load this model."""
    at = "" if revision == "main" else f', revision="{revision}"'
    found: dict[str, tuple[str, str]] = {}
    folder = f'snapshot_download("{name}"{at}, allow_patterns="onnx/*") + "/onnx"'
    if loads(bundle, "transformers"):
        found["transformers"] = ("python", _transformers(bundle, name, at))
    dtype = bundle.manifest.params["folders"]["onnx_dtype"]
    if dtype != "bfloat16":  # numpy, which holds the cache in this code, has none
        found["onnxruntime"] = ("python", _onnxruntime(folder, dtype))
    found["onnxruntime-genai"] = ("python", _genai(folder))
    if loads(bundle, "vLLM") and "auto_map" not in bundle.config:
        branch = "" if revision == "main" else f" --revision {revision}"
        found["vLLM"] = ("sh", f"vllm serve {name}{branch}")
    return found


def readers(bundle: Bundle) -> list[dict[str, str]]:
    """Who loads the integers and how fast, as found when they were made; empty if there are none.

    Each row has `reader`, `speed` (fast, slow, dense: expanded to floats, or no) and `why`.
    """
    path = bundle.local("quantization.json")
    rows: list[dict[str, str]] = json.loads(path.read_text())["readers"] if path else []
    return rows


def loads(bundle: Bundle, runtime: str) -> bool:
    """Whether a runtime, in its newest version, loads the checkpoint on any device.

    That is the version that the card's `pip install` brings, and the first of its rows. Dense
    weights load anywhere.
    """
    rows = [row for row in readers(bundle) if row["reader"].startswith(runtime)]
    versions = [row["reader"].partition(" on ")[0] for row in rows]
    newest = [row for row, each in zip(rows, versions, strict=True) if each == versions[0]]
    readable = any(row["speed"] != "no" for row in newest) or not readers(bundle)
    return readable and bundle.local("config.json") is not None


def _transformers(bundle: Bundle, name: str, at: str) -> str:
    code = ", trust_remote_code=True" if "auto_map" in bundle.config else ""
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{at}{code})
model = AutoModelForCausalLM.from_pretrained("{name}"{at}{code})
inputs = tokenizer("{PROMPT}", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={_TOKENS}, do_sample=False)
print(tokenizer.decode(output[0]))"""


def _onnxruntime(folder: str, dtype: str) -> str:
    return f"""\
import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
caches = session.get_inputs()[2:]
past = {{c.name: np.zeros((1, c.shape[1], 0, c.shape[3]), np.{dtype}) for c in caches}}
ids = tokenizer("{PROMPT}", return_tensors="np")["input_ids"].astype(np.int64)
output, piece = ids, ids
for _ in range({_TOKENS}):
    feeds = {{"input_ids": piece, "attention_mask": np.ones_like(output), **past}}
    logits, *present = session.run(None, feeds)
    past = {{c.name: value for c, value in zip(caches, present)}}
    piece = logits[:, -1:].argmax(-1)
    output = np.concatenate([output, piece], axis=1)
print(tokenizer.decode(output[0]))"""


def _genai(folder: str) -> str:
    return f"""\
import onnxruntime_genai as og
from huggingface_hub import snapshot_download

model = og.Model({folder})
tokenizer = og.Tokenizer(model)
ids = tokenizer.encode("{PROMPT}")
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + {_TOKENS}, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
output = generator.get_sequence(0)
print(tokenizer.decode(output))"""
