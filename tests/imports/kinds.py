"""Adapters as other programs write them: one row a kind, written by the safetensors library and dense float64 formulas.

A row's `write` puts an adapter into a folder and returns the update of each of its modules as its program applies it.
The rows share no code with `lora_cli.imports`. docs/exchange.md lists them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Updates = Mapping[str, Tensor]  # module → (out, in), float64

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.0.self_attn.v_proj": (12, 24),
    "model.layers.1.mlp.down_proj": (24, 40),
}


@dataclass(frozen=True)
class Sample:
    """One kind of adapter: `program` is the member of lora_cli/imports, `source` the file to convert ("" the folder).

    `exact`: the factors are copied bit for bit, `rank` that of the LoRA, None where it is refused with `refused`.
    `says` is the remark in docs/exchange.md.
    """

    title: str
    program: str
    write: Callable[[Path], Updates]
    rank: int | None = None
    exact: bool = False
    refused: str = ""
    source: str = ""
    says: str = ""


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers of standard deviation 1/8, as `dtype` holds them."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8
    return made.to(dtype)


def _config(folder: Path, **entries: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(entries))


def _mlx(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float | None = 20.0,
    kind: str = "lora",
    more: Mapping[str, Tensor] | None = None,
    without: str = "",
) -> Updates:
    tensors, updates = {**(more or {})}, {}
    for seed, (module, (out, into)) in enumerate(SHAPES.items()):
        a, b = drawn(into, 4, seed=seed, dtype=dtype), drawn(4, out, seed=seed + 50, dtype=dtype)
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        updates[module] = (scale or 0.0) * (a.double() @ b.double()).T
    tensors = {name: tensor for name, tensor in tensors.items() if not without or not name.endswith(without)}
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 4, "dropout": 0.0, **({} if scale is None else {"scale": scale})}
    _config(folder, model="acme/tiny", fine_tune_type=kind, num_layers=-1, lora_parameters=parameters)
    return updates


def _mlx_embedding(folder: Path) -> Updates:
    a, b = drawn(64, 4, seed=1), drawn(4, 24, seed=2)
    save_file({"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, folder / "adapters.safetensors")
    _config(folder, model="acme/tiny", num_layers=0, lora_parameters={"rank": 4, "scale": 2.0})
    return {"model.embed_tokens": 2.0 * (a.double() @ b.double()).T}


def _mlx_experts(folder: Path) -> Updates:
    module = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{module}.lora_a": drawn(3, 4, 24, seed=1), f"{module}.lora_b": drawn(3, 40, 4, seed=2)}
    save_file(tensors, folder / "adapters.safetensors")
    _config(folder, lora_parameters={"rank": 4, "scale": 2.0})
    return {}


def _olive(folder: Path, *, scale: float = 2.0, more: Mapping[str, Tensor] | None = None) -> Updates:
    """By the code of Olive 0.13: prefix, transposition, scale in B."""
    tensors, updates = {**(more or {})}, {}
    for seed, (module, (out, into)) in enumerate(SHAPES.items()):
        a, b = drawn(4, into, seed=seed), drawn(out, 4, seed=seed + 50)
        name = f"base_model.model.{module}".replace("base_model.model.model", "model")
        turned = (b.numpy().transpose().copy() * scale).astype("float32")
        tensors |= {f"{name}.lora_A.weight": a.T.contiguous(), f"{name}.lora_B.weight": torch.from_numpy(turned)}
        updates[module] = torch.from_numpy(turned).double().T @ a.double()
    save_file(tensors, folder / "adapter.safetensors")
    return updates


def _gguf(
    folder: Path,
    *,
    arch: str = "llama",
    alpha: float | None = 8.0,
    heads: tuple[int, int] | None = (4, 2),
    ranks: tuple[int, int, int] = (4, 4, 4),
    kind: str = "adapter",
    more: Mapping[str, Tensor] | None = None,
) -> Updates:
    """By llama.cpp's rules: the file by its own package, the order of rows by convert_hf_to_gguf.py's `permute`."""
    import gguf

    writer = gguf.GGUFWriter(folder / "adapter.gguf", arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    names = ("blk.0.attn_q", "blk.0.attn_v", "blk.1.ffn_down", "blk.0.attn_k")
    shapes = {**SHAPES, "model.layers.0.self_attn.k_proj": (12, 24)}
    updates = {}
    for seed, (theirs, (module, (out, into)), rank) in enumerate(zip(names, shapes.items(), (*ranks, 4), strict=True)):
        a, b = drawn(rank, into, seed=seed), drawn(out, rank, seed=seed + 50)
        updates[module] = (alpha / rank if alpha else 1.0) * b.double() @ a.double()
        numbers = b.numpy()
        if arch == "llama" and theirs[-1] in "qk":
            count = (4, 2)[theirs[-1] == "k"]
            numbers = numbers.reshape(count, 2, out // count // 2, rank).swapaxes(1, 2).reshape(out, rank)
        writer.add_tensor(f"{theirs}.weight.lora_a", a.numpy())
        writer.add_tensor(f"{theirs}.weight.lora_b", numbers.copy())
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if heads is not None:
        (folder.parent / "base").mkdir()
        config = {"model_type": "llama", "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
        (folder.parent / "base" / "config.json").write_text(json.dumps(config))
    return updates


SAMPLES: tuple[Sample, ...] = (
    Sample("mlx-lm", "mlx", _mlx, rank=4, exact=True),
    Sample(
        "mlx-lm in bf16",
        "mlx",
        lambda folder: _mlx(folder, dtype=torch.bfloat16, scale=10.0),
        rank=4,
        exact=True,
    ),
    Sample("mlx-lm, a checkpoint file", "mlx", _mlx, rank=4, exact=True, source="adapters.safetensors"),
    Sample("mlx-lm, the embedding", "mlx", _mlx_embedding, rank=4, exact=True),
    Sample("mlx-lm, no scale", "mlx", lambda folder: _mlx(folder, scale=None), refused="scale is missing in lora"),
    Sample("mlx-lm, scale 0", "mlx", lambda folder: _mlx(folder, scale=0.0), refused="it changes nothing"),
    Sample("mlx-lm, DoRA", "mlx", lambda folder: _mlx(folder, kind="dora"), refused="DoRA"),
    Sample(
        "mlx-lm, DoRA by its tensors",
        "mlx",
        lambda folder: _mlx(folder, more={"model.layers.0.self_attn.q_proj.m": drawn(24, seed=9)}),
        refused="DoRA",
    ),
    Sample("mlx-lm, whole weights", "mlx", lambda folder: _mlx(folder, kind="full"), refused="whole weights"),
    Sample("mlx-lm, experts", "mlx", _mlx_experts, refused="a stack of experts"),
    Sample("mlx-lm, half a pair", "mlx", lambda folder: _mlx(folder, without="v_proj.lora_b"), refused="but no lora_b"),
    Sample("Olive", "olive", _olive, rank=4, exact=True, source="adapter.safetensors"),
    Sample(
        "Olive, int4",
        "olive",
        lambda folder: _olive(folder, more={"model.layers.0.mlp.up_proj.lora_A.quant.weight": drawn(4, 4, seed=3)}),
        refused="quantised to int4",
    ),
    Sample(
        "Olive, a head saved whole",
        "olive",
        lambda folder: _olive(folder, more={"lm_head.weight": drawn(4, 4, seed=3)}),
        refused="tensors that are no factors: lm_head.weight",
    ),
    Sample("GGUF of Llama", "gguf", _gguf, rank=4, exact=True, source="adapter.gguf", says="with --base"),
    Sample("GGUF of Qwen 3", "gguf", lambda folder: _gguf(folder, arch="qwen3", heads=None), rank=4, exact=True),
    Sample(
        "GGUF, several ranks",
        "gguf",
        lambda folder: _gguf(folder, arch="qwen2", ranks=(4, 8, 2), heads=None),
        rank=8,
        says="the scale goes into the factors",
    ),
    Sample("GGUF, no alpha", "gguf", lambda folder: _gguf(folder, alpha=None), rank=4, exact=True),
    Sample("GGUF of Llama, no base", "gguf", lambda folder: _gguf(folder, heads=None), refused="heads of the base"),
    Sample("GGUF, other heads", "gguf", lambda folder: _gguf(folder, heads=(5, 5)), refused="which are no 5 heads"),
    Sample("GGUF of Mamba", "gguf", lambda folder: _gguf(folder, arch="mamba"), refused="the architecture mamba"),
    Sample(
        "GGUF, the embedding",
        "gguf",
        lambda folder: _gguf(
            folder,
            more={"token_embd.weight.lora_a": drawn(8, 4, seed=1), "token_embd.weight.lora_b": drawn(24, 4, seed=1)},
        ),
        refused="token_embd",
    ),
    Sample(
        "GGUF, a model",
        "gguf",
        lambda folder: _gguf(folder, kind="model"),
        refused="a GGUF file of type model",
        source="adapter.gguf",
    ),
)
