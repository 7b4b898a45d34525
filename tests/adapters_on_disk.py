"""Adapters made for tests, written as PEFT writes them: by the safetensors library, not by the code under test."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module → (B, A), unscaled


def random_factors(
    shapes: Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gaussian factors for every module of `shapes` (module → (out, in))."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module, (out_features, in_features) in shapes.items():
        r = rank if isinstance(rank, int) else rank[module]
        b = torch.randn(out_features, r, generator=generator, dtype=torch.float64)
        a = torch.randn(r, in_features, generator=generator, dtype=torch.float64)
        made[module] = (b.to(dtype), (a / in_features**0.5).to(dtype))
    return made


def write_adapter(folder: Path, factors: Factors, *, base: str = "acme/tiny", **config: Any) -> Path:
    """Write a PEFT folder; keyword arguments go into adapter_config.json."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    rank = next(iter(factors.values()))[1].shape[0]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        **config,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
