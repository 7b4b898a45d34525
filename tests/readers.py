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

import torch
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


def gguf(folder: Path, base: Collection[str] = (), *, heads: tuple[int, int] | None = (4, 2)) -> Deltas:
    """llama.cpp's own: alpha / the tensor's rank; of Llama, the rows of q and k for its order of rotary halves.

    `heads` are those of q and k, None for a model whose rows stay as they are.
    """
    from gguf import GGUFReader

    file = GGUFReader(folder / "adapter.gguf")
    assert (file.fields["general.type"].contents(), file.fields["adapter.type"].contents()) == ("adapter", "lora")
    alpha = file.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: torch.from_numpy(one.data.astype("float64")) for one in file.tensors}
    deltas = {}
    for name, a in tensors.items():
        if not name.endswith(".weight.lora_a"):
            continue
        theirs = name.removesuffix(".weight.lora_a")
        b = tensors[f"{theirs}.weight.lora_b"]
        count = {"attn_q": 0, "attn_k": 1}.get(theirs.rpartition(".")[2])
        if heads is not None and count is not None:
            rows = torch.arange(b.shape[0]).view(heads[count], 2, -1).transpose(1, 2).flatten()
            b = torch.empty_like(b).index_copy_(0, rows, b)
        deltas[_LLAMA_NAMES.sub(lambda found: _OF_LLAMA[found[0]], theirs).replace("blk.", "model.layers.")] = (
            alpha / a.shape[0] * b @ a
        )
    return deltas


_OF_LLAMA = {
    **{f"attn_{side}": f"self_attn.{side}_proj" for side in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{side}": f"mlp.{side}_proj" for side in ("gate", "up", "down")},
    "output": "lm_head",
}
_LLAMA_NAMES = re.compile(r"attn_output|attn_[qkv]$|ffn_(?:gate|up|down)|^output$")


def mlx(folder: Path, base: Collection[str] = ()) -> Deltas:
    """W += scale·(a@b)ᵀ, scale as it is. Every tensor is that of a key's module, and has the configuration's rank."""
    config = _config(folder)
    parameters, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    deltas = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        module = name.removesuffix(".lora_a")
        key = re.sub(r"^model\.layers\.\d+\.", "", module)
        if key not in parameters["keys"] or a.shape[1] != parameters["rank"]:
            raise Refuses(f"{module}: not an adapter parameter")
        deltas[module] = parameters["scale"] * (a.double() @ tensors[f"{module}.lora_b"].double()).T
    return deltas


def olive_file(folder: Path, base: Collection[str] = ()) -> Deltas:
    """What a model reads that Olive made: transposed factors, no scale."""
    tensors = load_file(folder / "adapter_weights.safetensors")
    return {
        name.removesuffix(".lora_A.weight"): (a.double() @ tensors[name.replace("lora_A", "lora_B")].double()).T
        for name, a in tensors.items()
        if ".lora_A." in name
    }


OF_EXPORTS: Mapping[str, Reader] = {
    "gguf": gguf,
    "ollama": gguf,
    "mlx": mlx,
    "olive": olive_file,
    "openvino": openvino,
    "peft": peft,
    "sglang": sglang,
    "vllm": vllm,
}
"""How a program reads what `lora export` writes for it, by the export's name."""

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
