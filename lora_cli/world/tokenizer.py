"""The world's tokenizer: one entry per operation word, else one per printable character."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cli.world.tasks import OPERATIONS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>")
PRINTABLE = tuple(string.ascii_letters + string.digits + string.punctuation + " ")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template; its size is a multiple of 8."""
    words = sorted(OPERATIONS, key=lambda word: (-len(word), word))
    entries = [*SPECIAL, *PRINTABLE, *words]
    entries += [f"<spare{i}>" for i in range(-len(entries) % 8)]
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    # The longest word comes first, so that a word is not cut after a shorter one that it starts with.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*words, r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def render(prompt: str, completion: str) -> str:
    """The text a model is trained on: the chat template's rendering of one question and its answer."""
    return f"<bos><|user|>{prompt}<|assistant|>{completion}<eos>"
