"""LoRA and QLoRA: low-rank adapters beside frozen linears, merged when trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from compressor.blocks import Blocks
from compressor.checkpoint import read_json, write_json
from compressor.decoder import skeleton
from compressor.heal import LoraParams, QloraParams
from compressor.heal.healer import Healer, Healing, Weights
from compressor.heal.merge import merge
from compressor.heal.train import train

ADAPTER = "adapter"
_INFERENCE_LAYOUT = "support_avx512bf16_for_cpu"
"""With it, bitsandbytes' 4-bit linears stay, after the first forward in eval mode on a CPU, in a
layout whose kernel hands no gradient down: training after an evaluation would go astray."""


def heal(healing: Healing) -> dict[str, Any]:
    """Train W + (alpha / rank) B A with W frozen, and merge the sum into `source`.

    W (O, I) is dense for LoRA (arXiv:2106.09685 section 4) and in 4-bit NF4 with double
    quantization for QLoRA (arXiv:2305.14314 section 3); it is the dense one that B A is
    merged into. Raises `HealingError` like `train`.
    """
    return train(healing, adapter)


def adapter(healing: Healing) -> Healer:
    """The model with fresh adapters."""
    params = healing.params
    assert isinstance(params, LoraParams)
    quantization = None
    if isinstance(params, QloraParams):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=healing.dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        healing.source,
        dtype=healing.dtype,
        quantization_config=quantization,
        device_map={"": healing.device},
    )
    for module in model.modules():
        if hasattr(module, _INFERENCE_LAYOUT):
            setattr(module, _INFERENCE_LAYOUT, False)
    adapted = adapt(model, params)

    def write(weights: Weights, folder: Path) -> None:
        save_adapter(adapted, weights, healing.source, folder / ADAPTER)
        merge(healing.source, folder / ADAPTER, folder)

    return Healer(adapted, write)


def adapt(model: nn.Module, params: LoraParams) -> PeftModel:
    """Put fresh adapters beside the linears of `model`; B is zero, so nothing changes yet."""
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.rank if params.alpha is None else params.alpha,
        lora_dropout=params.dropout,
        target_modules=target_names(Blocks(model), params.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(adapted, PeftModel)
    return adapted


def target_names(blocks: Blocks, targets: str) -> list[str]:
    """Full names of the linears that get an adapter."""
    of = blocks.ffn_linears if targets == "ffn" else blocks.linears
    return [name for index in range(len(blocks)) for name in of(index)]


def save_adapter(model: PeftModel, weights: Weights, source: Path, folder: Path) -> None:
    """Save trained adapters as those of `source`, with equal bytes for equal weights.

    peft writes a set and a local path; and bitsandbytes turned GPT-2's transposed weights
    upright, which those of `source` are not.
    """
    model.save_pretrained(str(folder), state_dict=weights)
    (folder / "README.md").unlink()
    config = read_json(folder / "adapter_config.json")
    linears = Blocks(skeleton(source)).linears(0).values()
    config |= {
        "target_modules": sorted(config["target_modules"]),
        "base_model_name_or_path": None,
        "fan_in_fan_out": any(isinstance(linear, Conv1D) for linear in linears),
    }
    write_json(folder / "adapter_config.json", config)
