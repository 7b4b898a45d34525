"""Real architectures at a size for tests: random weights in the classes of transformers, and adapters for them."""

import copy
import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from lora_cli.formats.reader import open_adapter
from lora_cli.formats.skeleton import Matrix, Skeleton
from lora_cli.formats.store import AdapterFiles, folder_ref
from lora_cli.models.skeleton import skeleton_of

_TEXT = {
    "vocab_size": 104,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_NO_HEAD_DIM = {key: value for key, value in _TEXT.items() if key != "head_dim"}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEPTH = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 64}
_SEQ2SEQ = {
    "vocab_size": 104,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_ENCODER = {
    "vocab_size": 104,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": 104, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
SPECS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _TEXT),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 104, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3": ("Qwen3ForCausalLM", _TEXT | {"tie_word_embeddings": True}),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": 104, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    ),
    "phi3": ("Phi3ForCausalLM", _NO_HEAD_DIM),
    "gemma3_text": ("Gemma3ForCausalLM", _TEXT | {"sliding_window": 16}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _TEXT | {"sliding_window": 16, "vocab_size": 300},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 290,
        },
    ),
    "llama4_text": ("Llama4ForCausalLM", _TEXT | _LLAMA4 | {"interleave_moe_layer_step": 1}),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": _TEXT | _LLAMA4 | {"interleave_moe_layer_step": 1},
            "vision_config": _VISION
            | {
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": _TEXT | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
            "vision_config": _VISION
            | {
                "num_global_layers": 1,
                "attention_heads": 4,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": _DEPTH | {"patch_size": 14, "fullatt_block_indexes": [1]},
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": _TEXT | EXPERTS | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": _DEPTH
            | {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _TEXT | _LINEAR_ATTENTION),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": _TEXT | _LINEAR_ATTENTION,
            "vision_config": _DEPTH | {"patch_size": 14, "num_position_embeddings": 16},
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        _TEXT
        | {
            "hybrid_override_pattern": "M*-",
            "num_hidden_layers": 3,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "phimoe": ("PhimoeForCausalLM", _NO_HEAD_DIM | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _TEXT | EXPERTS),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _NO_HEAD_DIM | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **{key: value for key, value in _TEXT.items() if key not in ("head_dim", "num_key_value_heads")},
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "mixtral": ("MixtralForCausalLM", _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "whisper": (
        "WhisperForConditionalGeneration",
        _SEQ2SEQ | {"max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8},
    ),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ | {"max_position_embeddings": 64}),
    "mbart": ("MBartForConditionalGeneration", _SEQ2SEQ | {"max_position_embeddings": 64}),
    "pegasus": ("PegasusForConditionalGeneration", _SEQ2SEQ | {"max_position_embeddings": 64}),
    "marian": ("MarianMTModel", _SEQ2SEQ | {"max_position_embeddings": 64, "decoder_vocab_size": 104}),
    "t5": ("T5ForConditionalGeneration", _T5 | {"eos_token_id": 2, "decoder_start_token_id": 0}),
    "bert": ("BertForSequenceClassification", _ENCODER),
    "roberta": ("RobertaForMaskedLM", _ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 104, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "vit": ("ViTForImageClassification", _VISION),
    "siglip": (
        "SiglipModel",
        {"text_config": _ENCODER | {"max_position_embeddings": 20}, "vision_config": _VISION},
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": _ENCODER | {"max_position_embeddings": 20, "eos_token_id": 2},
            "vision_config": _VISION,
            "projection_dim": 16,
        },
    ),
}


def config(kind: str) -> Any:
    """The configuration of one of SPECS, as its repository would have it."""
    architecture, settings = SPECS[kind]
    made = transformers.AutoConfig.for_model(kind, **copy.deepcopy(dict(settings)))
    made.architectures = [architecture]
    return made


def model(kind: str) -> Any:
    """A model of one of SPECS with random weights, the same ones each time."""
    torch.manual_seed(0)
    return getattr(transformers, SPECS[kind][0])(config(kind)).eval()


@functools.cache
def skeleton(kind: str) -> Skeleton:
    """What one of SPECS is made of."""
    with torch.device("meta"):
        return skeleton_of(getattr(transformers, SPECS[kind][0])(config(kind)))


def linear_skeleton(shapes: Mapping[str, tuple[int, int]]) -> Skeleton:
    """A base of nothing but linear layers of these shapes (out, in)."""
    matrices = {name: Matrix("linear", shape, f"{name}.weight", shape) for name, shape in shapes.items()}
    return Skeleton("LinearForCausalLM", matrices, {})


def factors(shapes: Mapping[str, tuple[int, int]], *, rank: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """lora_A and lora_B by tensor name below PEFT's prefix, for modules of these shapes (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (out_features, in_features) in shapes.items():
        made[f"{name}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator) * 0.2
        made[f"{name}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator) * 0.2
    return made


def saved_adapter(
    folder: Path, tensors: Mapping[str, Tensor], targets: Sequence[str] | str | None, **settings: Any
) -> Path:
    """An adapter's folder; names of `tensors` are below "base_model.model." unless they begin with "/"."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        name[1:] if name.startswith("/") else f"base_model.model.{name}": tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(named, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    made = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "acme/base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": targets,
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(made))
    return folder


def trained(folder: Path, kind: str, config: LoraConfig, *, seed: int = 1) -> Path:
    """An adapter as PEFT saves it, with random factors."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model(kind), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "acme/base"}))
    return folder


def files(folder: Path) -> AdapterFiles:
    return AdapterFiles(folder_ref(folder), folder / "adapter_config.json", folder / "adapter_model.safetensors")


def by_peft(kind: str, folder: Path) -> dict[str, Tensor]:
    """ΔW in float64 by parameter, as PEFT applies the adapter to the base's own class."""
    base = model(kind)
    before = {name: weight.double().clone() for name, weight in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(base, str(folder)).double().merge_and_unload()
    found = {name: weight.double() - before[name] for name, weight in merged.named_parameters()}
    return {name: delta for name, delta in found.items() if delta.abs().max() > 1e-9}


def by_us(kind: str, folder: Path, *, fuse: bool = False) -> dict[str, Tensor]:
    """ΔW in float64 by parameter, as the reader gives it on the base's skeleton."""
    base = skeleton(kind)
    adapter = open_adapter(files(folder), base, fuse=fuse)
    found: dict[str, Tensor] = {}
    for name in adapter.modules:
        matrix, update = base.get(name), adapter.read(name, torch.float64).dense()
        assert matrix is not None
        delta = found.setdefault(matrix.parameter, torch.zeros(matrix.stored, dtype=torch.float64))
        if matrix.transposed:
            update = update.T
        if matrix.expert is None:
            delta += update.reshape(matrix.stored)
        else:
            delta[matrix.expert, matrix.row : matrix.row + len(update)] += update
    return found


def agree(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-6 * other[name].norm(), name
