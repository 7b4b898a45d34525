"""The two files of a small adapter, as bytes, for repositories of the stand-in Hub."""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

BASE = "acme/tiny-llama"


def safetensors_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """A safetensors file of (dtype, shape, little-endian bytes) per name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def lora_files(
    *,
    base: str | None = BASE,
    rank: int = 4,
    alpha: float = 8,
    layers: int = 2,
    hidden: int = 8,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    value: float = 0.5,
    **config: Any,
) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors of a small LoRA whose numbers are all `value`."""
    facts = {
        "base_model_name_or_path": base, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": list(modules), "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0,
        "modules_to_save": None, **config,
    }  # fmt: skip
    tensors = {}
    block = struct.pack("<f", value) * (rank * hidden)
    for layer in range(layers):
        for module in modules:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = ("F32", (rank, hidden), block)
            tensors[f"{stem}.lora_B.weight"] = ("F32", (hidden, rank), block)
    return {
        "adapter_config.json": json.dumps(facts).encode(),
        "adapter_model.safetensors": safetensors_bytes(tensors),
    }
