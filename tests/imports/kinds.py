"""Adapters as other programs write them: one row a kind, written by the safetensors library and dense float64 formulas.

A row's `write` puts an adapter into a folder and returns the update of each of its modules as its program applies it.
The rows share no code with `lora_cli.imports`. docs/exchange.md lists them.
"""

import json
import struct
import warnings
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

FIRST = next(iter(SHAPES))
LEAVES = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Sample:
    """One kind of adapter: `program` is the member of lora_cli/imports, `source` the file to convert ("" the folder).

    `exact`: the factors are copied bit for bit, `rank` that of the LoRA, None where it is refused with `refused`.
    `best`: it needs --rank, and is the same update at the rank `rank`. `says` is the remark in docs/exchange.md.
    """

    title: str
    program: str
    write: Callable[[Path], Updates]
    rank: int | None = None
    exact: bool = False
    best: bool = False
    refused: str = ""
    source: str = ""
    says: str = ""


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers of standard deviation 1/8, as `dtype` holds them."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8
    return made.to(dtype)


def _config(folder: Path, **entries: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(entries))


def _save_as_mlx(tensors: Mapping[str, Tensor], file: Path) -> None:
    """As mlx writes a file without metadata: with a null in its place."""
    save_file(dict(tensors), file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(data[8 : 8 + length])}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


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
    _save_as_mlx(tensors, folder / "adapters.safetensors")
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


UNET = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": (16, 8, 1, 1),
    "lora_unet_down_blocks_0_resnets_0_conv1": (16, 8, 3, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (24, 12),
}


def kohya(
    folder: Path,
    *,
    alphas: tuple[float | None, ...] = (2.0, 2.0, 2.0),
    dtype: torch.dtype = torch.float16,
    alpha_dtype: torch.dtype | None = None,
    more: Mapping[str, Tensor] | None = None,
    name: str = "style.safetensors",
) -> Updates:
    tensors, updates = {**(more or {})}, {}
    for seed, ((module, (out, into, *kernel)), alpha) in enumerate(zip(UNET.items(), alphas, strict=True)):
        down = drawn(4, into, *kernel, seed=seed, dtype=dtype)
        up = drawn(out, 4, *(1 for _ in kernel), seed=seed + 50, dtype=dtype)
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha, dtype=alpha_dtype or dtype)
        scale = 1.0 if alpha is None else alpha / 4
        updates[module] = scale * up.double().flatten(1) @ down.double().flatten(1)
    metadata = {"ss_base_model_version": "sd_v1.5", "modelspec.architecture": "stable-diffusion-v1/lora"}
    save_file(tensors, folder / name, metadata)
    return updates


PIPELINE = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "unet.down_blocks.0.resnets.0.conv1": (16, 8, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (24, 24),
}


def _diffusers(folder: Path, *, metadata: Mapping[str, object] | None = None, ends: str = "peft") -> Updates:
    """As save_lora_weights of diffusers 0.42 writes it, or as its attention processors before 0.22 (`ends` "lora").

    With the ends "scripts" as its training scripts write it, by the table PEFT_TO_DIFFUSERS of diffusers.
    """
    every = {
        "peft": ("lora_A.weight", "lora_B.weight"),
        "lora": ("lora.down.weight", "lora.up.weight"),
        "text": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    }
    of_scripts = {"to_q": "lora", "conv1": "peft", "q_proj": "text"}
    tensors, updates = {}, {}
    for seed, (module, (out, into, *kernel)) in enumerate(PIPELINE.items()):
        sides = every[of_scripts[module.rpartition(".")[2]] if ends == "scripts" else ends]
        a, b = drawn(4, into, *kernel, seed=seed), drawn(out, 4, *(1 for _ in kernel), seed=seed + 50)
        tensors |= {f"{module}.{sides[0]}": a, f"{module}.{sides[1]}": b}
        scale = 1.0
        if metadata is not None:
            scale = 4.0 if module.startswith("unet") else 0.5
        updates[module] = scale * b.double().flatten(1) @ a.double().flatten(1)
    held = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt", **held})
    return updates


DIFFUSERS = {
    "unet.r": 4,
    "unet.lora_alpha": 16,
    "unet.target_modules": ["to_q", "conv1"],
    "text_encoder.r": 4,
    "text_encoder.lora_alpha": 8,
    "text_encoder.alpha_pattern": {"q_proj": 2},
}


def _processors(folder: Path, *, twice: bool = False) -> Updates:
    """As the attention processors of diffusers 0.15 wrote it, with those of a text encoder of 0.17."""
    unet = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors, updates = {}, {}
    for seed, (theirs, ours) in enumerate(
        (
            (f"{unet}.processor.to_q_lora", f"{unet}.to_q"),
            (f"{unet}.processor.to_out_lora", f"{unet}.to_out.0"),
            (f"{text}.to_q_lora", f"{text}.q_proj"),
            (f"{text}.to_out_lora", f"{text}.out_proj"),
        )
    ):
        a, b = drawn(4, 16, seed=seed), drawn(16, 4, seed=seed + 5)
        tensors |= {f"{theirs}.down.weight": a, f"{theirs}.up.weight": b}
        updates[ours] = b.double() @ a.double()
    if twice:
        tensors |= {f"{text}.q_proj.lora_{side}.weight": drawn(16, 16, seed=20) for side in "AB"}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return updates


def adapterhub(folder: Path, *, rank: int = 4, **settings: object) -> Updates:
    tensors, updates = {}, {}
    for layer in range(2):
        module = f"roberta.encoder.layer.{layer}.attention.self.query"
        a, b = drawn(rank, 24, seed=layer), drawn(24, rank, seed=layer + 5)
        tensors |= {f"{module}.loras.mine.lora_A": a, f"{module}.loras.mine.lora_B": b}
        updates[module] = 16 / rank * b.double() @ a.double()
    save_file(tensors, folder / "adapter.safetensors")
    inner = {"architecture": "lora", "r": 4, "alpha": 16, "composition_mode": "add", "use_gating": False, **settings}
    _config(
        folder, config=inner, model_name="roberta-base", model_type="roberta", name="mine", version="adapters.1.3.0"
    )
    return updates


def _pickled(folder: Path) -> Updates:
    (folder / "pytorch_adapter.bin").write_bytes(b"\x80\x04")
    _config(folder, config={"architecture": "lora"}, model_name="roberta-base")
    return {}


def _torchtune(folder: Path) -> Updates:
    tensors = {f"layers.0.attn.q_proj.lora_{side}.weight": drawn(4, 4, seed=1) for side in "ab"}
    save_file(tensors, folder / "adapter_model.safetensors")
    return {}


def _peft(
    folder: Path,
    *,
    files: tuple[str, ...],
    names: tuple[str, ...] = ("",),
    config: bool = True,
    index: Mapping[str, str] | None = None,
) -> Updates:
    """PEFT's tensors dealt out to files; the update is that of the adapter named first."""
    dealt: list[dict[str, Tensor]] = [{} for _ in files]
    updates = {}
    for place, (module, (out, into)) in enumerate(SHAPES.items()):
        for at, name in enumerate(names):
            a, b = drawn(4, into, seed=place + 9 * at), drawn(out, 4, seed=place + 9 * at + 50)
            stem = f"base_model.model.{module}"
            end = f"{name}.weight" if name else "weight"
            dealt[place % len(files)] |= {f"{stem}.lora_A.{end}": a, f"{stem}.lora_B.{end}": b}
            updates.setdefault(module, 2.0 * b.double() @ a.double())
    for file, tensors in zip(files, dealt, strict=True):
        save_file(tensors, folder / file)
    if index is not None:
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if config:
        _config(folder, peft_type="LORA", r=4, lora_alpha=8, base_model_name_or_path="acme/tiny", **PATTERNS)
    return updates


PATTERNS = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "target_modules": [*LEAVES]}
PARTS = tuple(f"adapter_model-0000{part}-of-00002.safetensors" for part in (1, 2))


def _nest(shapes: Mapping[str, tuple[int, int]]) -> torch.nn.Module:
    """A module with linear layers of these names and shapes (out, in)."""
    root = torch.nn.Module()
    for name, (out, into) in shapes.items():
        *parents, last = name.split(".")
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(last, torch.nn.Linear(into, out, bias=False))
    return root


def of_peft(folder: Path, kind: str, **settings: object) -> Updates:
    """An adapter of a type of PEFT, made and saved by PEFT; the updates are PEFT's own get_delta_weight in float64."""
    import peft

    torch.manual_seed(1)
    config = getattr(peft, f"{kind}Config")(target_modules=[*LEAVES], **settings)
    made = peft.get_peft_model(_nest(SHAPES), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 4)
        made.save_pretrained(folder)
        made.double()
        layers = {name: layer for name, layer in made.named_modules() if hasattr(layer, "get_delta_weight")}
        found = {name.removeprefix("base_model.model."): layers[name].get_delta_weight("default") for name in layers}
    config_file = folder / "adapter_config.json"
    (folder / "README.md").unlink(missing_ok=True)
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "base_model_name_or_path": "acme/tiny"}))
    return found


def on_base(folder: Path, kind: str, **settings: object) -> Updates:
    """An adapter of PEFT that multiplies the weights of the base beside it; the updates are PEFT's merge in float64."""
    import peft

    torch.manual_seed(1)
    weights = {f"{module}.weight": drawn(*shape, seed=seed) for seed, (module, shape) in enumerate(SHAPES.items())}
    place = folder.parent / "base"
    place.mkdir()
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(_LLAMA | {"architectures": ["LlamaForCausalLM"]}))
    base = _nest(SHAPES)
    base.load_state_dict(weights)
    made = peft.get_peft_model(base, getattr(peft, f"{kind}Config")(target_modules=[*LEAVES], **settings))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
        made.save_pretrained(folder)
        merged = made.double().merge_and_unload().state_dict()
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "acme/tiny"}))
    return {module: merged[f"{module}.weight"] - weights[f"{module}.weight"].double() for module in SHAPES}


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "vocab_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _vera(folder: Path, *, base: bool = True, **settings: object) -> Updates:
    if base:
        (folder.parent / "base").mkdir()
        config = _LLAMA | {"architectures": ["LlamaForCausalLM"]}
        (folder.parent / "base" / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(action="ignore"):
        return of_peft(folder, "Vera", r=6, **settings)


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
        "Olive, one module twice",
        "olive",
        lambda folder: _olive(
            folder,
            more={
                f"base_model.model.{FIRST}.lora_A.weight": drawn(24, 4, seed=3),
                f"base_model.model.{FIRST}.lora_B.weight": drawn(4, 24, seed=3),
            },
        ),
        refused="two of its modules have one name",
    ),
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
    Sample("kohya", "kohya", kohya, rank=4, exact=True, source="style.safetensors"),
    Sample(
        "kohya, several alphas",
        "kohya",
        lambda folder: kohya(folder, alphas=(2.0, 4.0, 1.0)),
        rank=4,
        says="the scale goes into the factors",
    ),
    Sample("kohya, no alpha", "kohya", lambda folder: kohya(folder, alphas=(None,) * 3), rank=4, exact=True),
    Sample(
        "kohya, alphas as integers",
        "kohya",
        lambda folder: kohya(folder, alpha_dtype=torch.int64),
        rank=4,
        exact=True,
    ),
    Sample("kohya, alpha 0", "kohya", lambda folder: kohya(folder, alphas=(2, 0, 2)), refused="alpha is 0: sd-scripts"),
    Sample("kohya, one alpha", "kohya", lambda folder: kohya(folder, alphas=(2, None, 2)), refused="has no alpha, but"),
    Sample(
        "kohya, DoRA",
        "kohya",
        lambda folder: kohya(
            folder, more={"lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale": drawn(24, seed=1)}
        ),
        refused="DoRA",
    ),
    Sample(
        "kohya, alpha of two numbers",
        "kohya",
        lambda folder: kohya(folder, alphas=(2, 2, None), more={f"{[*UNET][2]}.alpha": drawn(2, seed=1)}),
        refused="is no single number",
    ),
    Sample("diffusers", "diffusers", _diffusers, rank=4, exact=True),
    Sample(
        "diffusers with its configurations",
        "diffusers",
        lambda folder: _diffusers(folder, metadata=DIFFUSERS),
        rank=4,
        says="the scale goes into the factors",
    ),
    Sample("diffusers before 0.22", "diffusers", lambda folder: _diffusers(folder, ends="lora"), rank=4, exact=True),
    Sample(
        "diffusers, its training scripts",
        "diffusers",
        lambda folder: _diffusers(folder, ends="scripts"),
        rank=4,
        exact=True,
    ),
    Sample("diffusers, attention processors", "diffusers", _processors, rank=4, exact=True),
    Sample(
        "diffusers, one module in two forms",
        "diffusers",
        lambda folder: _processors(folder, twice=True),
        refused="two of its modules are both",
    ),
    Sample(
        "diffusers, a part without its configuration",
        "diffusers",
        lambda folder: _diffusers(folder, metadata={"unet.r": 4, "unet.lora_alpha": 16}),
        refused="no configuration of text_encoder",
    ),
    Sample(
        "diffusers, rsLoRA and DoRA",
        "diffusers",
        lambda folder: _diffusers(folder, metadata={**DIFFUSERS, "unet.use_dora": True}),
        refused="unet: DoRA",
    ),
    Sample("AdapterHub", "adapterhub", adapterhub, rank=4, exact=True, says="safetensors"),
    Sample("AdapterHub, pickled", "adapterhub", _pickled, refused="a pickle", says="a line converts it"),
    Sample(
        "AdapterHub, bottlenecks",
        "adapterhub",
        lambda folder: adapterhub(folder, architecture=None),
        refused="its architecture is bottleneck",
    ),
    Sample(
        "AdapterHub, (IA)³",
        "adapterhub",
        lambda folder: adapterhub(folder, composition_mode="scale"),
        refused="multiply the weights",
    ),
    Sample("AdapterHub, another rank", "adapterhub", lambda folder: adapterhub(folder, rank=2), refused="but r is 4"),
    Sample(
        "torchtune's own names",
        "torchtune",
        _torchtune,
        refused="alpha and the order",
        says="its PEFT folders are read",
    ),
    Sample("PEFT in parts", "parts", lambda folder: _peft(folder, files=PARTS), rank=4, exact=True),
    Sample(
        "PEFT in parts, one missing",
        "parts",
        lambda folder: _peft(folder, files=PARTS[:1]),
        refused="part 2 of 2 is missing",
    ),
    Sample(
        "PEFT in parts, another index",
        "parts",
        lambda folder: _peft(folder, files=PARTS, index={"x": PARTS[0]}),
        refused="names other tensors",
    ),
    Sample(
        "PEFT under another name",
        "peft",
        lambda folder: _peft(folder, files=("mine.safetensors",)),
        rank=4,
        exact=True,
    ),
    Sample(
        "PEFT without a configuration",
        "peft",
        lambda folder: _peft(folder, files=("mine.safetensors",), config=False),
        refused="no adapter_config.json",
    ),
    Sample(
        "several adapters in one file",
        "peft",
        lambda folder: _peft(folder, files=("adapter_model.safetensors",), names=("speech", "vision")),
        refused="2 adapters in one file (speech, vision)",
        says="--adapter NAME takes one",
    ),
    Sample(
        "PEFT, one factor under two names",
        "peft",
        lambda folder: _peft(folder, files=("mine.safetensors",), names=("", "speech")),
        refused="with an adapter's name and without one",
    ),
    Sample(
        "LoHa of PEFT",
        "loha",
        lambda folder: of_peft(folder, "LoHa", r=3, alpha=6, init_weights=False),
        rank=9,
        says="rank r²",
    ),
    Sample(
        "LoHa of PEFT, patterns",
        "loha",
        lambda folder: of_peft(
            folder, "LoHa", r=3, alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 1}, init_weights=False
        ),
        rank=9,
    ),
    Sample(
        "LoKr of PEFT",
        "lokr",
        lambda folder: of_peft(folder, "LoKr", r=2, alpha=4, init_weights=False),
        rank=8,
        says="rank of w1 by rank of w2",
    ),
    Sample(
        "LoKr of PEFT, both sides factored",
        "lokr",
        lambda folder: of_peft(
            folder, "LoKr", r=1, alpha=4, decompose_both=True, decompose_factor=4, init_weights=False
        ),
        rank=1,
    ),
    Sample("VeRA of PEFT", "vera", _vera, rank=6, says="with --base"),
    Sample("VeRA of PEFT, no base", "vera", lambda folder: _vera(folder, base=False), refused="widths of its modules"),
    Sample(
        "VeRA of PEFT, projections not saved",
        "vera",
        lambda folder: _vera(folder, save_projection=False),
        refused="not in the file",
    ),
    Sample(
        "(IA)³ of PEFT",
        "ia3",
        lambda folder: on_base(folder, "IA3", feedforward_modules=["down_proj"]),
        rank=24,
        best=True,
        says="with --base and --rank",
    ),
    Sample(
        "OFT of PEFT",
        "oft",
        lambda folder: on_base(folder, "OFT", oft_block_size=4),
        rank=24,
        best=True,
        says="with --base and --rank",
    ),
    Sample(
        "(IA)³ of PEFT, no rank",
        "ia3",
        lambda folder: on_base(folder, "IA3", feedforward_modules=[]),
        refused="multiply the base's weights",
        says="--base and --rank take it",
    ),
    Sample(
        "OFT of PEFT, no rank",
        "oft",
        lambda folder: on_base(folder, "OFT", oft_block_size=4),
        refused="rotates the base's weights",
        says="--base and --rank take it",
    ),
)
