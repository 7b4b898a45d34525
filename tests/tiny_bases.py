"""Base models small enough for a test: random weights, real architectures, a tokenizer of single characters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.store import AdapterFiles, folder_ref
from lora_cli.models.base_model import BaseModel
from lora_cli.records import Example
from tests.paths import SHARED

STORIES = SHARED / "wild" / "bases" / "stories260K"
CHAT = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]

needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/wild/bases/stories260K is not here")


def characters(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; a beginning-of-sequence token in front of plain text."""
    words = [*_SPECIAL, *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=_SPECIAL[4:],
    )
    if chat:
        wrapped.chat_template = CHAT
    return wrapped


def tiny_llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 104,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def tiny_gpt2(n_embd: int = 32, *, tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=104,
            tie_word_embeddings=tied,
            n_embd=n_embd,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def llama(*, chat: bool = True) -> BaseModel:
    return BaseModel("acme/tiny", tiny_llama(), characters(chat=chat))


def gpt2() -> BaseModel:
    return BaseModel("acme/gpt2", tiny_gpt2(), characters())


def saved(folder: Path, *, chat: bool = True, **config: Any) -> Path:
    """A tiny Llama with its tokenizer in a folder, as `save_pretrained` writes it."""
    tiny_llama(**config).save_pretrained(folder)
    characters(chat=chat).save_pretrained(folder)
    return folder


def opened(folder: Path, id: str = "") -> OpenAdapter:
    ref = folder_ref(folder, id or folder.name)
    return open_adapter(AdapterFiles(ref, folder / "adapter_config.json", folder / "adapter_model.safetensors"))


def examples(n: int, *, task: str = "shift") -> list[Example]:
    """Prompts of three letters; the completion repeats the first letter."""
    letters = "abcdefgh"
    made = []
    for i in range(n):
        word = "".join(letters[(i * 7 + 3 * place * (i + 1)) % len(letters)] for place in range(3))
        made.append(Example(id=str(i + 1), prompt=f"{task}:{word}", completion=word[0] * 2))
    return made
