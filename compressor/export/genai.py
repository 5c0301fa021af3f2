"""The folder as onnxruntime-genai reads it: `genai_config.json` beside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.checkpoint import read_json, write_json
from compressor.export.traits import head_dim
from compressor.runtimes.session import MODEL

GENAI = "genai_config.json"
_SEARCH = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_config(
    folder: Path, config: Any, caches: int, *, in_place: bool, cuda: bool = False
) -> None:
    """Write `genai_config.json` for a graph with `caches` pairs of key and value inputs.

    `num_hidden_layers` is what the runtime counts caches by, so it is `caches` and not the
    number of blocks. Token ids and sampling come from `generation_config.json`, then from
    the checkpoint's `config`; without a pad token padding is the first eos. `in_place`: the
    graph can write what is new into the buffer of the past; `cuda`: it runs there alone.
    """
    providers: list[dict[str, Any]] = [{"cuda": {}}] if cuda else []
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ids = {name: generation.get(name, getattr(config, name, None)) for name in _IDS}
    if ids["pad_token_id"] is None:
        eos = ids["eos_token_id"]
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    length = config.max_position_embeddings
    decoder = {
        "filename": MODEL,
        "head_size": head_dim(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None)
        or config.num_attention_heads,
        "num_hidden_layers": caches,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "context_length": length,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
        **{name: value for name, value in ids.items() if value is not None},
    }
    search = {name: generation.get(name, default) for name, default in _SEARCH.items()}
    search |= {"max_length": length, "num_beams": 1, "past_present_share_buffer": in_place}
    write_json(folder / GENAI, {"model": model, "search": search})
