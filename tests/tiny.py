"""Tiny seeded models of the supported families, made from configs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from compressor.decoder import Decoder

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "olmo2": {},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
}

OTHERS: dict[str, dict[str, object]] = {"cohere": {}, "granite": {"residual_multiplier": 0.5}}
"""One norm before both branches; branches that are scaled: what only some tests ask for."""


def tiny(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of `family` in float32; weights large enough that blocks differ."""
    config = AutoConfig.for_model(family, **(_COMMON | (FAMILIES | OTHERS)[family] | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + 0.1 * noise)
    return model


def save_tiny(folder: Path, family: str, **overrides: object) -> PreTrainedModel:
    """Save a tiny model into `folder` and return it."""
    model = tiny(family, **overrides)
    model.save_pretrained(folder)
    return model


def tokens(rows: int = 3, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token windows (rows, length)."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Block and name of every weight that any decoder reads from now on."""
    read: list[tuple[int, str]] = []
    weight = Decoder.weight

    def counted(self: Decoder, index: int, name: str) -> torch.Tensor:
        read.append((index, name))
        return weight(self, index, name)

    monkeypatch.setattr(Decoder, "weight", counted)
    return read


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of the tiny models' 96 tokens: `<pad> <s> </s> w3 .. w95`."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 96))]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def save_corpus(path: Path, documents: int = 60, seed: int = 0) -> None:
    """A .jsonl file of documents over the tiny vocabulary, each with a few favourite words."""
    order = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            favourites = order.sample(range(3, 96), 6)
            words = [f"w{order.choice(favourites)}" for _ in range(50)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def save_project(folder: Path, config: str = "", **overrides: object) -> None:
    """What a run begins with: a tiny llama with its tokenizer, a corpus, and a `tiny.yaml`."""
    save_tiny(folder / "model", "llama", **overrides)
    save_tokenizer(folder / "model")
    save_corpus(folder / "corpus.jsonl")
    (folder / "tiny.yaml").write_text(config)
