"""Put a compressed-tensors file through vLLM's own matching and parameter code, on the CPU.

Needs no installed vLLM and no GPU: `pip download --no-deps vllm==0.33.0`, unzip the wheel, and
python tests/vllm_loader.py WHEEL_FOLDER CHECKPOINT. Its modules outside the loader are stubs.
Fused linears are loaded shard by shard as its models do, unpacked with its batch-invariant
path's arithmetic, and compared with what `DenseReader` reads. Llama-shaped models only.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

QUANT = "vllm.model_executor.layers.quantization"
KEPT = (
    "vllm.scalar_type",
    "vllm.model_executor.parameter",
    "vllm.model_executor.utils",
    f"{QUANT}.compressed_tensors.utils",
    f"{QUANT}.compressed_tensors.schemes.compressed_tensors_wNa16",
    f"{QUANT}.utils.config_utils",
    f"{QUANT}.utils.gptq_utils",
)
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """vLLM's loader from the wheel, its packages as bare namespaces, stubs for all else."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] != "vllm" or name in KEPT:
            return None
        if any(kept.startswith(f"{name}.") for kept in KEPT):
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(self.wheel / name.replace(".", "/"))]
            return spec
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_loader(wheel: Path) -> tuple[Any, Any]:
    """Its target matching and its WNA16 scheme."""
    sys.modules["regex"] = re
    sys.path.insert(0, str(wheel))
    sys.meta_path.insert(0, _Finder(wheel))
    distributed: Any = importlib.import_module("vllm.distributed")
    distributed.get_tensor_model_parallel_rank = lambda: 0
    distributed.get_tensor_model_parallel_world_size = lambda: 1
    schemes: Any = importlib.import_module(f"{QUANT}.compressed_tensors.schemes")
    schemes.CompressedTensorsScheme = object
    marlin: Any = importlib.import_module(f"{QUANT}.utils.marlin_utils")
    marlin.marlin_repeat_scales_on_all_ranks = lambda group, parallel: group == -1 and parallel
    utils = importlib.import_module(f"{QUANT}.compressed_tensors.utils")
    return utils, importlib.import_module(f"{schemes.__name__}.compressed_tensors_wNa16")


def load(scheme: Any, shards: list[dict[str, Tensor]], rows: list[int], columns: int) -> Tensor:
    """Load the shards of a linear into the scheme's parameters and unpack it, float32."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    layer = torch.nn.Module()
    scheme.create_weights(layer, sum(rows), columns, rows, columns, torch.float32, None)
    for index, shard in enumerate(shards):
        for name, tensor in shard.items():
            where = {"shard_offset": sum(rows[:index]), "shard_size": rows[index]}
            parameter = getattr(layer, name)
            if len(shards) == 1:
                parameter.load_column_parallel_weight(tensor)
            else:
                parameter.load_merged_column_weight(tensor, shard_id=index, **where)
    assert set(shards[0]) == set(dict(layer.named_parameters()))
    shape = torch.Size((sum(rows), columns))
    levels = unpack_from_int32(layer.weight_packed.data, scheme.num_bits, shape).float()
    levels = levels.unflatten(1, (layer.weight_scale.shape[1], -1))
    if not scheme.symmetric:
        packed, groups = layer.weight_zero_point.data, layer.weight_scale.shape
        zero = unpack_from_int32(packed, scheme.num_bits, groups, packed_dim=0)
        levels = levels - zero.float().unsqueeze(-1)
    return (levels * layer.weight_scale.data.unsqueeze(-1)).flatten(1)


def main(wheel: str, folder: str) -> int:
    """Compare every linear of the file; returns 1 at the first difference."""
    utils, schemes = import_loader(Path(wheel))
    from compressor.dense import DenseReader

    reader, seen = DenseReader(folder), 0
    config = reader.config["quantization_config"]
    targets = {
        t: group["weights"] for group in config["config_groups"].values() for t in group["targets"]
    }
    packed = [n.removesuffix(".weight_packed") for n in reader.checkpoint.names if "_packed" in n]
    fusible = {shard: fused for fused, shards in FUSED.items() for shard in shards}
    ends = {name: name.rpartition(".")[2] for name in packed}
    loads = {n: [n] for n in packed if ends[n] not in fusible}
    for name in packed:
        if fused := fusible.get(ends[name]):
            parent = name.rpartition(".")[0]
            loads[f"{parent}.{fused}"] = [f"{parent}.{shard}" for shard in FUSED[fused]]
    for name, parts in loads.items():
        assert not utils.should_ignore_layer(name, config["ignore"], FUSED)
        target = utils.find_matched_target(name, torch.nn.Linear(1, 1), targets, FUSED)
        width = targets[target]
        scheme = schemes.CompressedTensorsWNA16(
            width["strategy"], width["num_bits"], width.get("group_size"), width["symmetric"]
        )
        names = reader.layout(f"{parts[0]}.weight").names
        shards = [{n: reader.checkpoint.tensor(f"{p}.{n}") for n in names} for p in parts]
        wanted = [reader.read(f"{part}.weight") for part in parts]
        rows = [len(weight) for weight in wanted]
        found = load(scheme, shards, rows, wanted[0].shape[1])
        if not torch.equal(found, torch.cat(wanted)):
            sys.stdout.write(f"{name} differs\n")
            return 1
        seen += len(parts)
    sys.stdout.write(f"{seen} linears in {len(loads)} loads: equal\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
