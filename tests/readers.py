"""What other programs make of an adapter folder: one function per program, written from its documented or read rules.

Each takes a folder and the modules of the base, and returns the updates that the program would apply, (out, in) in
float64 by module. A module that is not among them is not changed. Versions: PEFT 0.21, vLLM 0.33, SGLang 0.5.23,
llama.cpp, LoRAX, TensorRT-LLM, OpenVINO GenAI 2026.4, Olive 0.13 and lmdeploy 0.18 as of November 2026.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

Deltas = dict[str, Tensor]
Factors = Mapping[str, tuple[Tensor, Tensor]]
Reader = Callable[[Path, Collection[str]], Deltas]


class Refuses(Exception):
    """The program does not load this folder, or fills what is missing with anything."""


def peft(folder: Path, base: Collection[str] = ()) -> Deltas:
    """Patterns: the first key that matches wins. Tensors of modules that are no target are ignored."""
    config, factors = _config(folder), _factors(folder)
    if config.get("task_type") == "":
        raise Refuses("no such task type")
    deltas = {}
    for module, (b, a) in factors.items():
        if not _targeted(config["target_modules"], module):
            continue
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        if a.shape[0] != rank:
            raise Refuses(f"{module}: size mismatch")
        deltas[module] = _scale(config, rank, _by_pattern(config.get("alpha_pattern"), module, None)) * b @ a
    return deltas


def vllm(folder: Path, base: Collection[str] = ()) -> Deltas:
    """As PEFT, but whatever has tensors is applied."""
    config = _config(folder)
    if max([config["r"], *config.get("rank_pattern", {}).values()]) > 512:
        raise Refuses("max_lora_rank")
    deltas = {}
    for module, (b, a) in _factors(folder).items():
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        deltas[module] = _scale(config, rank, _by_pattern(config.get("alpha_pattern"), module, None)) * b @ a
    return deltas


def llama_cpp(folder: Path, base: Collection[str] = ()) -> Deltas:
    """One alpha, over the rank of each tensor."""
    alpha = _config(folder)["lora_alpha"]
    return {module: alpha / a.shape[0] * b @ a for module, (b, a) in _factors(folder).items()}


def tensorrt_llm(folder: Path, base: Collection[str] = ()) -> Deltas:
    """As llama.cpp, and rslora."""
    config = _config(folder)
    return {module: _scale(config, a.shape[0]) * b @ a for module, (b, a) in _factors(folder).items()}


def sglang(folder: Path, base: Collection[str] = ()) -> Deltas:
    """alpha / r; the modules of a fused layer are joined by q and by gate, of one rank; k and up may be missing."""
    config, factors = _config(folder), _factors(folder)
    needs = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for module, (_, a) in factors.items():
        last = module.rpartition(".")[2]
        if last in needs and module.removesuffix(last) + needs[last] not in factors:
            raise Refuses(f"{module} without {needs[last]}")
        if a.shape[0] != config["r"]:
            raise Refuses(f"{module}: a buffer of another shape")
    return {module: config["lora_alpha"] / config["r"] * b @ a for module, (b, a) in factors.items()}


def lorax(folder: Path, base: Collection[str]) -> Deltas:
    """Kind by kind of module: one that any layer lacks is dropped, and each kind's rank becomes the r of the next."""
    config, factors = _config(folder), _factors(folder)
    deltas: Deltas = {}
    for modules in _kinds(base).values():
        if not all(module in factors for module in modules):
            continue
        scale = _scale(config, config["r"])
        if len({factors[module][1].shape[0] for module in modules}) > 1:
            raise Refuses("stack expects each tensor to be equal size")
        deltas |= {module: scale * factors[module][0] @ factors[module][1] for module in modules}
        config["r"] = factors[modules[0]][1].shape[0]
    return deltas


def lmdeploy(folder: Path, base: Collection[str]) -> Deltas:
    """alpha / r. Every module of the base whose last part is a target's gets memory of rank r, which is not zeroed."""
    config, factors = _config(folder), _factors(folder)
    targets = {target.rpartition(".")[2] for target in config["target_modules"]}
    if missing := [m for m in base if m.rpartition(".")[2] in targets and m not in factors]:
        raise Refuses(f"{missing[0]}: uninitialised memory")
    if [module for module, (_, a) in factors.items() if a.shape[0] != config["r"]]:
        raise Refuses("the size of tensor a must match the size of tensor b")
    return {module: config["lora_alpha"] / config["r"] * b @ a for module, (b, a) in factors.items()}


def openvino(folder: Path, base: Collection[str] = ()) -> Deltas:
    """The configuration is not read."""
    return {module: b @ a for module, (b, a) in _factors(folder).items()}


def olive(folder: Path, base: Collection[str] = ()) -> Deltas:
    """One scale, from r and alpha of the configuration."""
    config = _config(folder)
    return {module: _scale(config, config["r"]) * b @ a for module, (b, a) in _factors(folder).items()}


READERS: Mapping[str, Reader] = {
    "PEFT": peft,
    "transformers": peft,
    "vLLM": vllm,
    "SGLang": sglang,
    "llama.cpp": llama_cpp,
    "LoRAX": lorax,
    "TensorRT-LLM": tensorrt_llm,
    "lmdeploy": lmdeploy,
    "OpenVINO GenAI": openvino,
    "Olive": olive,
}


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def _factors(folder: Path) -> Factors:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            tensors[name.replace("lora_A", "lora_B")].double(),
            a.double(),
        )
        for name, a in tensors.items()
        if ".lora_A." in name
    }


def _scale(config: Mapping[str, Any], rank: int, alpha: float | None = None) -> float:
    alpha = config["lora_alpha"] if alpha is None else alpha
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    keys = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", module))
    key = next(keys, None)
    return default if key is None else (patterns or {})[key]


def _targeted(targets: str | list[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _kinds(base: Collection[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for module in base:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", module, count=1), []).append(module)
    return kinds
