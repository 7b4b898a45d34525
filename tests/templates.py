"""Chat templates of the real families in a few lines each, with the families' own control tokens, and tokenizers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Kind = Literal["characters", "bytes", "pieces"]
KINDS: tuple[Kind, ...] = ("characters", "bytes", "pieces")
TEXT = (
    "Once upon a time there was a little girl named Lily.\n\nShe had a big red ball.\nassistant user system\n"
    "Answer in one word: what is the capital of France? Paris. The answer is 42, or 43.\n\n### Response:\n\n"
)


@dataclass(frozen=True, kw_only=True)
class Style:
    """One family. `tokens` are its control tokens beside `bos` and `eos`; `closing` is what follows an answer."""

    name: str
    template: str
    tokens: tuple[str, ...] = ()
    bos: str | None = None
    eos: str
    closing: str
    lead: str = ""
    system: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _each(turn: str, prompt: str, *, before: str = "", behind: str = "") -> str:
    """A template that writes `turn` for each message, then the generation prompt."""
    return (
        before
        + "{% for m in messages %}"
        + turn
        + "{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% else %}"
        + behind
        + "{% endif %}"
    )


_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_QWEN3 = (
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set own = '</think>' in m.content %}"
    "{% set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if own else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
)
_GPT_OSS = (
    "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' + m.content }}"
    "{{ '<|end|>' }}{% endif %}"
)
_MISTRAL = (
    "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'user' %}"
    "{{ '[INST] ' }}{% if messages[0].role == 'system' and loop.index0 == last.user %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% endif %}"
)
_LAST_USER = (
    "{{ bos_token }}{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
)

STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style(
            name="llama-3",
            template=_each(
                "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}",
                "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
                before="{{ bos_token }}",
            ),
            tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            bos="<|begin_of_text|>",
            eos="<|end_of_text|>",
            closing="<|eot_id|>",
        ),
        Style(
            name="chatml",
            template=_each(_CHATML, "{{ '<|im_start|>assistant\n' }}"),
            tokens=("<|im_start|>", "<|im_end|>"),
            eos="<|endoftext|>",
            closing="<|im_end|>\n",
        ),
        Style(
            name="qwen-3",
            template=_each(
                _QWEN3,
                "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
                "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
            ),
            tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
            eos="<|im_end|>",
            closing="<|im_end|>\n",
            lead="<think>\n\n</think>\n\n",
        ),
        Style(
            name="qwen-3 that always thinks",
            template=_each(_QWEN3, "{{ '<|im_start|>assistant\n<think>\n' }}"),
            tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
            eos="<|endoftext|>",
            closing="<|im_end|>\n",
            lead="\n</think>\n\n",
        ),
        Style(
            name="gemma",
            template=_each(
                "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
                "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
                "{{ m.content | trim + '<end_of_turn>\n' }}",
                "{{ '<start_of_turn>model\n' }}",
                before="{{ bos_token }}",
            ),
            tokens=("<start_of_turn>", "<end_of_turn>"),
            bos="<bos>",
            eos="<eos>",
            closing="<end_of_turn>\n",
            system=False,
        ),
        Style(
            name="phi",
            template=_each(
                "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}",
                "{{ '<|assistant|>\n' }}",
                behind="{{ eos_token }}",
            ),
            tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            eos="<|endoftext|>",
            closing="<|end|>\n<|endoftext|>",
        ),
        Style(
            name="mistral",
            template=_each(_MISTRAL, "", before=_LAST_USER),
            tokens=("[INST]", "[/INST]"),
            bos="<s>",
            eos="</s>",
            closing="</s>",
            lead=" ",
        ),
        Style(
            name="deepseek",
            template=_each(_DEEPSEEK, "{{ '<｜Assistant｜>' }}", before="{{ bos_token }}"),
            tokens=("<｜User｜>", "<｜Assistant｜>"),
            bos="<｜begin▁of▁sentence｜>",
            eos="<｜end▁of▁sentence｜>",
            closing="<｜end▁of▁sentence｜>",
        ),
        Style(
            name="zephyr",
            template=_each(
                "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}",
                "{{ '<|assistant|>\n' }}",
            ),
            bos="<s>",
            eos="</s>",
            closing="</s>\n",
        ),
        Style(
            name="command-r",
            template=_each(
                "{{ '<|START_OF_TURN_TOKEN|>' }}{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', "
                "'system': '<|SYSTEM_TOKEN|>'}[m.role] + m.content | trim + '<|END_OF_TURN_TOKEN|>' }}",
                "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}",
                before="{{ bos_token }}",
            ),
            tokens=(
                "<|START_OF_TURN_TOKEN|>",
                "<|END_OF_TURN_TOKEN|>",
                "<|USER_TOKEN|>",
                "<|CHATBOT_TOKEN|>",
                "<|SYSTEM_TOKEN|>",
            ),
            bos="<BOS_TOKEN>",
            eos="<EOS_TOKEN>",
            closing="<|END_OF_TURN_TOKEN|>",
        ),
        Style(
            name="gpt-oss",
            template=_each(_GPT_OSS, "{{ '<|start|>assistant' }}"),
            tokens=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
            bos="<|startoftext|>",
            eos="<|endoftext|>",
            closing="<|return|>",
            lead="<|channel|>final<|message|>",
        ),
        Style(
            name="text alone",
            template=_each(
                "{{ '### ' + m.role + '\n' + m.content + '\n### end\n\n' }}",
                "{{ '### assistant\n' }}",
            ),
            bos="<s>",
            eos="</s>",
            closing="\n### end\n\n",
        ),
    )
}
STYLES["qwen-3 without thinking"] = Style(
    name="qwen-3 without thinking",
    template=STYLES["qwen-3"].template,
    tokens=STYLES["qwen-3"].tokens,
    eos="<|im_end|>",
    closing="<|im_end|>\n",
    arguments={"enable_thinking": False},
)

PARTED = Style(
    name="deepseek that thinks",
    template=_each(_DEEPSEEK, "{{ '<｜Assistant｜><think>\n' }}", before="{{ bos_token }}"),
    tokens=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    closing="<｜end▁of▁sentence｜>",
)
"""Its generation prompt opens a block of thoughts that its finished turn does not have."""


def tokenizer_of(style: Style, kind: Kind = "characters") -> PreTrainedTokenizerFast:
    """A tokenizer with the family's control tokens and template."""
    made = tokenizer(kind, tokens=style.tokens, bos=style.bos, eos=style.eos)
    made.chat_template = style.template
    return made


def tokenizer(
    kind: Kind, *, tokens: Sequence[str] = (), bos: str | None = "<s>", eos: str = "</s>", post: str = "$A"
) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, of byte-level BPE (as GPT-2's), or of pieces with a space mark (as Llama 2's).

    post: what the tokenizer puts around every text, such as "<s> $A".
    """
    special = ["<pad>", "<unk>", *([bos] if bos else []), *([eos] if eos not in tokens else []), *tokens]
    made = {"characters": _characters, "bytes": _bytes, "pieces": _pieces}[kind](special)
    numbers = [(token, made.token_to_id(token)) for token in special]
    made.post_processor = processors.TemplateProcessing(single=post, special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=list(tokens),
    )


def _characters(special: Sequence[str]) -> Tokenizer:
    words = [*special, *(chr(code) for code in range(32, 127)), "\n"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def _bytes(special: Sequence[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(made, special, vocab_size=400, initial_alphabet=alphabet)


def _pieces(special: Sequence[str]) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{code:02X}>" for code in range(256)]
    return _trained(made, [*special, *fallback], vocab_size=700, max_token_length=8)


def _trained(made: Tokenizer, special: Sequence[str], **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(special_tokens=list(special), show_progress=False, **options)
    made.train_from_iterator([TEXT] * 3, trainer)
    return made
