"""A task as a base reads it, against apply_chat_template, the tokenizer's own rendering, and PEFT on top of them."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_cli.errors import DataError, Refused, UsageError
from lora_cli.metrics.exact import exact
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded, Encoder
from lora_cli.models.forms import Prompting
from lora_cli.models.generate import stream
from lora_cli.models.ref import load
from lora_cli.records import Example
from tests.cli import ok
from tests.templates import KINDS, PARTED, STYLES, Kind, Style, tokenizer, tokenizer_of
from tests.tiny_bases import STORIES, needs_stories

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*model config:UserWarning"),
]
SYSTEM = {"role": "system", "content": "Be brief."}
PAIRS = (("ab?", "xy"), ("cd?", "zw"), ("ef?", "uv"))
PROMPTS: dict[str, str | tuple[Mapping[str, str], ...]] = {
    "text": "What is it?",
    "system": (SYSTEM, {"role": "user", "content": "What is it?"}),
    "turns": (
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A girl named Lily."},
        {"role": "user", "content": "Where is she?"},
    ),
}


def encoder(made: PreTrainedTokenizerFast, **prompting: Any) -> Encoder:
    return Encoder(made, Prompting(**prompting), name="acme/tiny")


def example(prompt: Any, completion: str, id: str = "1") -> Example:
    return Example(id=id, prompt=prompt, completion=completion)


def turns(prompt: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def rendered(made: PreTrainedTokenizerFast, style: Style, prompt: Any, completion: str) -> tuple[list[int], list[int]]:
    """The finished conversation and the generation prompt as transformers has them."""
    whole = [*turns(prompt), {"role": "assistant", "content": completion}]
    ids = made.apply_chat_template(whole, return_dict=True, **style.arguments)["input_ids"]
    opened = made.apply_chat_template(turns(prompt), add_generation_prompt=True, return_dict=True, **style.arguments)
    return ids, opened["input_ids"]


def text_of(made: PreTrainedTokenizerFast, style: Style, prompt: Any, completion: str) -> str:
    whole = [*turns(prompt), {"role": "assistant", "content": completion}]
    return str(made.apply_chat_template(whole, tokenize=False, **style.arguments))


def same(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    return max(n for n in range(min(len(one), len(other)) + 1) if list(one[:n]) == list(other[:n]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_ids_and_mask_are_those_of_the_finished_conversation(name: str, kind: Kind) -> None:
    style = STYLES[name]
    made = tokenizer_of(style, kind)
    for what, prompt in PROMPTS.items():
        if what == "system" and not style.system:
            continue
        encoded = encoder(made, arguments=style.arguments).encode(example(prompt, "Paris is big."))
        ids, opened = rendered(made, style, prompt, "Paris is big.")
        assert list(encoded.ids) == ids
        assert encoded.start == same(ids, opened)
        assert exact([encoded.answer], ["Paris is big."]) == [True]
        # What is left of the prompt behind the cut is the white space that a token of the completion swallowed.
        assert made.decode(opened[encoded.start :]).strip() == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_an_answer_is_generated_from_where_a_plain_one_begins(name: str, kind: Kind) -> None:
    style = STYLES[name]
    made = tokenizer_of(style, kind)
    read = encoder(made, arguments=style.arguments)
    encoded = read.encode(example("What is it?", "Paris"))
    ids, _ = rendered(made, style, "What is it?", "Paris")
    opening = encoded.opening
    assert list(opening.ids) == ids[: len(opening.ids)]
    assert read.written(opening, ids[len(opening.ids) :])[1]
    if kind == "characters":
        begin = text_of(made, style, "What is it?", "Paris").index("Paris")
        assert made.decode(opening.ids) == text_of(made, style, "What is it?", "Paris")[:begin]
        assert made.decode(opening.ids).endswith(style.lead)
        assert read.opening("What is it?") == opening


@pytest.mark.parametrize("name", STYLES)
def test_what_the_template_puts_behind_an_answer_ends_it(name: str) -> None:
    style = STYLES[name]
    made = tokenizer_of(style)
    read = encoder(made, arguments=style.arguments)
    opening = read.opening("What is it?")
    if opening.until:
        assert (opening.until, opening.ends) == (style.closing, (made.eos_token_id,))
        ids = made(f"Paris{style.closing}and more", add_special_tokens=False)["input_ids"]
        assert read.written(opening, ids) == ("Paris", True)
    else:
        first = made(style.closing, add_special_tokens=False)["input_ids"][0]
        assert opening.ends == tuple(sorted({first, made.eos_token_id}))


def tiny(made: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A base with random weights for a tokenizer."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    size = {"vocab_size": len(made), "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**size, **shape, eos_token_id=made.eos_token_id))


def taught(folder: Path, made: PreTrainedTokenizerFast, rows: Sequence[tuple[list[int], int]]) -> Path:
    """A tiny base in folder/base and a LoRA in folder/adapter that PEFT trained to write ids[start:] of each row."""
    base = tiny(made)
    base.save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    learner = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.full_like(ids, -100)
    for row, (own, start) in enumerate(rows):
        labels[row, start : len(own)] = ids[row, start : len(own)]
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        loss = learner(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learner.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.save_pretrained(folder / "adapter")
    return folder


def task(file: Path, pairs: Sequence[tuple[Any, str]]) -> str:
    """A task file of (prompt, completion) pairs; a chat becomes messages."""
    lines = [
        {"prompt": prompt, "completion": completion}
        if isinstance(prompt, str)
        else {"messages": [*prompt, {"role": "assistant", "content": completion}]}
        for prompt, completion in pairs
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def scored(folder: Path, data: str, *options: str) -> float:
    """What `lora eval` gives the adapter of `folder`."""
    words = ("eval", str(folder / "adapter"), "--base", str(folder / "base"), "--data", data, "--json", *options)
    rows = json.loads(ok(*words).out)["rows"]
    return float(rows[1]["value"])


@torch.no_grad()
def by_peft(folder: Path, rows: Sequence[tuple[list[int], int]]) -> float:
    """The mean over rows of each one's mean loss per token of ids[start:], by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    means = []
    for ids, start in rows:
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        means.append(-sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids))) / (len(ids) - start))
    return sum(means) / len(means)


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLES)
def test_a_perfect_adapter_scores_1_on_every_template(name: str, tmp_path: Path) -> None:
    style = STYLES[name]
    made = tokenizer_of(style, "bytes" if name == "llama-3" else "pieces" if name == "mistral" else "characters")
    both = [rendered(made, style, prompt, completion) for prompt, completion in PAIRS]
    rows = [(ids, same(ids, opened)) for ids, opened in both]
    folder = taught(tmp_path, made, rows)
    data = task(tmp_path / "task.jsonl", PAIRS)
    arguments = [f"--template-arg={key}={json.dumps(value)}" for key, value in style.arguments.items()]
    assert scored(folder, data, *arguments) == 1
    assert scored(folder, data, "--metric", "nll", *arguments) == pytest.approx(by_peft(folder, rows), rel=1e-3)


def test_an_adapter_that_writes_its_own_thoughts_scores_1(tmp_path: Path) -> None:
    style = STYLES["qwen-3"]
    made = tokenizer_of(style)
    pairs = [("ab?", "<think>\nhm\n</think>\n\nxy"), ("cd?", "<think>\noh\n</think>\n\nzw")]
    both = [rendered(made, style, prompt, completion) for prompt, completion in pairs]
    folder = taught(tmp_path, made, [(ids, same(ids, opened)) for ids, opened in both])
    assert scored(folder, task(tmp_path / "task.jsonl", pairs)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("post", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_perfect_adapter_scores_1_without_a_template_and_on_lines_with_bos_and_eos(post: str, tmp_path: Path) -> None:
    made = tokenizer("characters", tokens=("<sep>",), post=post)
    pairs = [(prompt, completion.replace("z", "z<sep>")) for prompt, completion in PAIRS]
    front = made("a")["input_ids"].index(made.convert_tokens_to_ids("a"))
    rows = []
    for prompt, completion in pairs:
        ids = made(f"{prompt}{completion}", add_special_tokens=False)["input_ids"]
        rows.append(([made.bos_token_id] * front + ids + [made.eos_token_id], front + len(prompt)))
    folder = taught(tmp_path, made, rows)
    bos = "<s>" if front else ""
    marked = [(bos + prompt, completion + "</s>") for prompt, completion in pairs]
    for name, lines in (("clean", pairs), ("marked", marked)):
        data = task(tmp_path / f"{name}.jsonl", lines)
        assert scored(folder, data) == 1
        assert scored(folder, data, "--metric", "nll") == pytest.approx(by_peft(folder, rows), rel=1e-3)


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt() -> None:
    made = tokenizer("characters", post="<s> $A </s>")
    read = encoder(made)
    encoded = read.encode(example("ab", "xy"))
    assert list(encoded.ids) == made("abxy")["input_ids"]
    assert encoded.start == 3
    assert read.prompt_ids("ab") == made("ab")["input_ids"][:-1]


@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("completion", ["xy", "xy</s>", "xy</s>\n", "xy</s></s>"])
@pytest.mark.parametrize("prompt", ["ab", "<s>ab"])
def test_bos_and_eos_written_in_the_text_are_not_doubled(prompt: str, completion: str, post: str) -> None:
    made = tokenizer("characters", post=post)
    encoded = encoder(made).encode(example(prompt, completion))
    assert made.decode(encoded.ids) == "<s>abxy</s>"
    assert (encoded.start, encoded.answer) == (3, "xy")


def test_an_eos_in_the_prompt_is_the_users_own() -> None:
    made = tokenizer("characters", post="<s> $A </s>")
    assert made.decode(encoder(made).encode(example("ab</s>", "xy")).ids) == "<s>ab</s>xy</s>"


def test_an_exported_chat_is_read_as_it_stands_and_ends_where_the_export_does() -> None:
    made = tokenizer_of(STYLES["chatml"])
    end = made.convert_tokens_to_ids("<|im_end|>")
    read = Encoder(made, Prompting(templated=False), name="acme/tiny", ends=[end])
    prompt = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    encoded = read.encode(example(prompt, "Lily<|im_end|>\n"))
    assert made.decode(encoded.ids) == f"{prompt}Lily<|im_end|>"
    assert encoded.answer == "Lily"
    assert read.ends == sorted([end, made.eos_token_id])


def test_a_token_across_the_boundary_is_the_completions() -> None:
    made = tokenizer("pieces", post="<s> $A")
    read = encoder(made)
    for prompt, completion in (("a girl named Li", "ly"), ("there was a ", "little girl"), ("there was a", " little")):
        encoded = read.encode(example(prompt, completion))
        assert list(encoded.ids) == [*made(prompt + completion)["input_ids"], made.eos_token_id]
        assert encoded.start == same(encoded.ids, made(prompt)["input_ids"])
        assert encoded.opening.ids == encoded.ids[: encoded.start]
        rest = encoded.ids[encoded.start : -1]
        assert read.written(encoded.opening, rest) == (completion, True)


def test_an_answer_that_rewrites_the_end_of_the_prompt_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_cli.models.answering import Told
    from lora_cli.steps.evaluate.evaluate import System, evaluate

    made = tokenizer("pieces", post="<s> $A")
    base = BaseModel("acme/tiny", tiny(made), made)
    one = example("a girl named Li", "ly")
    assert base.encode(one).opening.left == " Li"

    def value(text: str) -> float:
        written = made(text, add_special_tokens=False)["input_ids"]
        ended, continues = base.encoder.written(base.encode(one).opening, written)
        told = Told(-1.0, True, 0.1, ended, len(written), continues)
        monkeypatch.setattr("lora_cli.steps.evaluate.groups.answers", lambda *given, **options: [[(0, told)]])
        return evaluate(base, [System(name="base")], [one])[0].value

    assert value("Lily") == 1
    assert value("ly") == 0


@needs_stories
def test_the_likelihood_of_a_real_base_is_that_of_the_whole_text() -> None:
    base = load(str(STORIES))
    pairs = [
        ("Once upon a time", ", there was a little girl"),
        ("Once upon a time, there was a little girl named Li", "ly"),
        ("Once upon a time, there was a ", "little girl"),
        ("Once upon a time, there was a", " little girl"),
    ]
    losses = []
    for prompt, completion in pairs:
        encoded = base.encode(example(prompt, completion))
        whole, own = (base.tokenizer(text)["input_ids"] for text in (prompt + completion, prompt))
        assert list(encoded.ids) == [*whole, base.tokenizer.eos_token_id]
        assert encoded.start == same(whole, own)
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([encoded.ids])).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(logits[at - 1, whole[at]]) for at in range(encoded.start, len(whole))))
    # Tokenised apart, each of the completions would cost this model more than 13 nats.
    assert losses[2] == losses[3]
    assert max(losses) < 1.2
    prompts = [base.encode(example(prompt, completion)).opening for prompt, completion in pairs[1:3]]
    texts = {row: text.text for row, text in stream(base, prompts, max_new_tokens=4)}
    assert texts == {0: "ly. She lo", 1: "little girl"}


@pytest.mark.parametrize("name", STYLES)
def test_bos_and_the_end_of_a_turn_written_in_the_text_are_not_doubled_by_a_template(name: str) -> None:
    style = STYLES[name]
    made = tokenizer_of(style)
    read = encoder(made, arguments=style.arguments)
    bos = style.bos if style.bos and text_of(made, style, "a", "b").startswith(style.bos) else ""
    marked = read.encode(example(f"{bos}What is it?", f"Paris{style.closing}"))
    assert marked == read.encode(example("What is it?", "Paris"))
    chat = ({"role": "user", "content": f"{bos}Who?"}, {"role": "assistant", "content": "I."}, turns("Where?")[0])
    clean = ({"role": "user", "content": "Who?"}, *chat[1:])
    assert read.encode(example(chat, f"Paris{made.eos_token}")) == read.encode(example(clean, "Paris"))


def test_a_template_without_an_end_of_a_turn_gets_the_eos() -> None:
    made = tokenizer("characters", bos=None)
    made.chat_template = "{% for m in messages %}{{ m.role[:1] + ':' + m.content + '\n' }}{% endfor %}"
    read = encoder(made)
    encoded = read.encode(example("Who?", "Lily"))
    assert made.decode(encoded.ids) == "u:Who?\na:Lily\n</s>"
    # This template has no generation prompt: the assistant's mark is learnt, and given when an answer is generated.
    assert made.decode(encoded.ids[: encoded.start]) == "u:Who?\n"
    assert made.decode(encoded.opening.ids) == "u:Who?\na:"


def test_added_tokens_of_white_space_end_nothing() -> None:
    made = tokenizer("characters", bos=None)
    made.add_tokens(["\n", "\n\n"])
    made.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    encoded = encoder(made).encode(example("Who?", "Lily"))
    assert made.decode(encoded.ids) == "Who?\nLily\n</s>"
    assert encoded.opening.ends == (made.eos_token_id,)


def test_generation_ends_at_what_the_model_names_too() -> None:
    made = tokenizer_of(STYLES["chatml"])
    model = tiny(made)
    model.generation_config.eos_token_id = [1]
    end = made.convert_tokens_to_ids("<|im_end|>")
    base = BaseModel("acme/tiny", model, made)
    assert base.encode(example("Who?", "Lily")).opening.ends == tuple(sorted([1, made.eos_token_id, end]))


def test_a_finished_turn_that_does_not_begin_with_its_prompt_is_refused_unless_that_is_allowed() -> None:
    made = tokenizer_of(PARTED)
    with pytest.raises(DataError, match=r"example 7: .* goes on with '<think>\\n' where the turn has 'Paris") as caught:
        encoder(made).encode(example("What is it?", "Paris", id="7"))
    assert "--allow-template-mismatch" in caught.value.hint
    encoded = encoder(made, allow_mismatch=True).encode(example("What is it?", "Paris"))
    ids, opened = rendered(made, PARTED, "What is it?", "Paris")
    assert list(encoded.ids) == ids
    assert (encoded.start, encoded.parted) == (same(ids, opened), True)
    assert made.decode(encoded.opening.ids).endswith("<｜Assistant｜>")
    assert encoded.answer == "Paris"
    assert not encoder(tokenizer_of(STYLES["deepseek"])).encode(example("What is it?", "Paris")).parted


def test_a_system_turn_goes_in_front_of_every_prompt() -> None:
    for name in ("chatml", "mistral", "gpt-oss"):
        made = tokenizer_of(STYLES[name])
        read = encoder(made, system="Be brief.")
        own = encoder(made).encode(example(PROMPTS["system"], "Paris"))
        assert read.encode(example("What is it?", "Paris")) == own
        with pytest.raises(DataError, match="example 7: the example has its own system turn"):
            read.encode(example(PROMPTS["system"], "Paris", id="7"))


def test_the_users_own_template_is_taken_in_place_of_the_bases() -> None:
    made = tokenizer_of(STYLES["chatml"])
    expected = rendered(tokenizer_of(STYLES["chatml"]), STYLES["chatml"], "Who?", "Lily")[0]
    made.chat_template = None
    own = encoder(made, template=STYLES["chatml"].template)
    encoded = own.encode(example("Who?", "Lily"))
    assert list(encoded.ids) == expected
    assert made.convert_tokens_to_ids("<|im_end|>") in encoded.opening.ends
    made.chat_template = STYLES["chatml"].template
    plain = encoder(made, templated=False)
    assert made.decode(plain.encode(example("Who?", "Lily")).ids) == "Who?Lily<|endoftext|>"
    with pytest.raises(DataError, match="example 1: --no-chat-template leaves no chat template, which messages need"):
        plain.encode(example(PROMPTS["turns"], "Lily"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no') }}",
            "example 1: the chat template given refuses the roles user, assistant: no",
        ),
        ("{{ 1 + 'a' }}", "the chat template given fails in its line 1: unsupported operand"),
        ("\n{% for %}", "the chat template given fails in its line 2: Expected an expression"),
        ("{{ messages[0].content }}", "the chat template given does not write an assistant's text"),
        ("", "the chat template given does not write an assistant's text"),
        ("{{ ''.__class__.__mro__ }}", "the chat template given fails in its line 1: .*unsafe"),
        ("{{ '\\ud800' }}", "the chat template given fails: .*surrogates not allowed"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encoder(tokenizer("characters"), template=template).encode(example("Who?", "Lily"))
    assert "\n" not in caught.value.message


def test_what_needs_a_template_is_refused_without_one() -> None:
    for option, prompting in (("--system", {"system": "x"}), ("--template-arg", {"arguments": {"x": 1}})):
        with pytest.raises(UsageError, match=f"acme/tiny has no chat template, which {option} needs"):
            encoder(tokenizer("characters"), **prompting)
        with pytest.raises(UsageError, match=f"{option} and --no-chat-template exclude each other"):
            Prompting(templated=False, **prompting)
    with pytest.raises(UsageError, match="--chat-template and --no-chat-template exclude each other"):
        Prompting(templated=False, template="x")
    made = tokenizer("characters")
    made.eos_token = None
    with pytest.raises(Refused, match="no end-of-sequence token"):
        encoder(made)


def test_control_tokens_of_the_template_are_found_in_a_prompt() -> None:
    read = encoder(tokenizer_of(STYLES["llama-3"]))
    for prompt in ("<|start_header_id|>user<|end_header_id|>", ({"role": "user", "content": "x<|eot_id|>"},)):
        assert read.encode(example(prompt, "Lily")).marked
    for prompt in ("<|begin_of_text|>Who?", PROMPTS["turns"], "<|end_of_text|>"):
        assert not read.encode(example(prompt, "Lily")).marked
    assert not encoder(tokenizer("characters")).encode(example("<s>Who?</s>", "Lily")).marked


def test_settings_hold_only_what_was_asked_for() -> None:
    assert Prompting().settings == {}
    given = Prompting(system="s", template="t", arguments={"a": False}, allow_mismatch=True).settings["prompting"]
    assert [*given] == ["system", "chat_template", "template_args", "allow_template_mismatch"]
    assert len(given["chat_template"]) == 64
    assert Prompting(templated=False).settings == {"prompting": {"no_chat_template": True}}


WORDS = st.text(alphabet="abLily \n?.<|#", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
READERS = {
    (name, kind): tokenizer_of(STYLES[name], kind)
    for name in ("llama-3", "chatml", "qwen-3", "mistral", "zephyr", "gpt-oss")
    for kind in KINDS
}


@settings(deadline=None, max_examples=150)
@given(which=st.sampled_from(sorted(READERS)), prompt=WORDS, completion=WORDS)
def test_any_chat_is_read_as_transformers_renders_it(which: tuple[str, Kind], prompt: str, completion: str) -> None:
    style, made = STYLES[which[0]], READERS[which]
    read = encoder(made)
    encoded = read.encode(example(prompt, completion))
    ids, opened = rendered(made, style, prompt, completion)
    assert list(encoded.ids) == ids
    check_the_cut(read, encoded, opened)
    if which[1] != "pieces":
        assert made.decode(ids) == text_of(made, style, prompt, completion)
    if made.bos_token and style.template.startswith("{{ bos_token }}"):
        assert ids.count(made.bos_token_id) == 1
    plain = read.opening(prompt).ids
    assert plain[: len(encoded.opening.ids)] == encoded.opening.ids


TOKENIZERS = {(kind, post): tokenizer(kind, post=post) for kind in KINDS for post in ("$A", "<s> $A", "<s> $A </s>")}


@settings(deadline=None, max_examples=150)
@given(which=st.sampled_from(sorted(TOKENIZERS)), prompt=WORDS, completion=WORDS)
def test_any_text_is_read_as_its_tokenizer_does(which: tuple[Kind, str], prompt: str, completion: str) -> None:
    made = TOKENIZERS[which]
    read = encoder(made, allow_mismatch=True)
    encoded = read.encode(example(prompt, completion))
    own = made(prompt + completion)["input_ids"]
    assert list(encoded.ids) == (own if own[-1] == made.eos_token_id else [*own, made.eos_token_id])
    assert encoded.ids.count(made.bos_token_id) == ("<s>" in which[1])
    assert encoded.ids.count(made.eos_token_id) == 1
    check_the_cut(read, encoded, read.prompt_ids(prompt))
    assert encoded.answer == completion


def check_the_cut(read: Encoder, encoded: Encoded, opened: Sequence[int]) -> None:
    """The mask begins where the ids leave those of the prompt alone, and generation gives the answer back."""
    assert encoded.start == max(1, same(encoded.ids, opened))
    opening = encoded.opening
    if encoded.start == 1:  # A token spans the whole prompt, and nothing could be generated from less.
        return
    assert opening.ids == encoded.ids[: len(opening.ids)]
    behind = encoded.ids[len(opening.ids) :]
    end = next((at for at, token in enumerate(behind) if token in opening.ends), len(behind))
    text, continues = read.written(opening, behind[:end])
    assert continues
    assert exact([text], [encoded.answer]) == [True]
