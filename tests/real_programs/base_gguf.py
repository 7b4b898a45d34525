"""A small model as GGUF, without its tokenizer: names by the gguf package, the order of rows by llama.cpp's rule."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def write_llama(folder: Path, file: Path) -> None:
    """The Llama in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        count = heads if "q_proj" in name else pairs if "k_proj" in name else 0
        numbers = tensor.astype(np.float32)
        if count:
            numbers = numbers.reshape(count, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gpt2(folder: Path, file: Path) -> None:
    """The GPT-2 in `folder`, whose Conv1D store (in, out)."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        numbers = np.ascontiguousarray((tensor.T if turned else tensor).astype(np.float32))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
