"""Texts, tokenizers and templates that are not as the common ones: each is read rightly, or named in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cli.errors import DataError
from lora_cli.metrics.exact import exact
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded, Encoder, until_end
from lora_cli.models.generate import generate, stream
from lora_cli.task import load_task
from tests.cli import ok, refused
from tests.models.test_encode import PAIRS, encoder, example, rendered, same, scored, task, taught, tiny
from tests.templates import STYLES, tokenizer, tokenizer_of
from tests.tiny_bases import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
CHATML = STYLES["chatml"]
STERN = "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn, please') }}{% endif %}"
RULED = "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n###\n' }}{% endfor %}"
RULED += "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
TOOLS = "{% if tools %}{{ tools | length }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
TOOLS += "{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']' }}{% endif %}{{ m.content or '' }}"
TOOLS += "{% for call in m.tool_calls or [] %}{{ '<call>' + call.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
TOOLS += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def made_of(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of characters with ChatML's tokens and another template."""
    made = tokenizer_of(CHATML)
    made.chat_template = template
    return made


def given_back(read: Encoder, encoded: Encoded) -> bool:
    """Whether a model that writes just the example's ids scores 1 on it."""
    opening = encoded.opening
    assert opening.ids == encoded.ids[: len(opening.ids)]
    text, continues = read.written(opening, until_end(encoded.ids[len(opening.ids) :], opening.ends))
    return continues and exact([text], [encoded.answer]) == [True]


def put(folder: Path, made: PreTrainedTokenizerFast, size: int | None = None) -> None:
    """A base in folder/base that knows `size` tokens."""
    tiny_llama(vocab_size=size or len(made), eos_token_id=made.eos_token_id).save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")


def lines(file: Path, *rows: Mapping[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_template_that_wants_a_system_turn_keeps_its_end_of_a_turn(tmp_path: Path) -> None:
    made = made_of(STERN + CHATML.template)
    prompts = [({"role": "system", "content": "s"}, {"role": "user", "content": text}) for text, _ in PAIRS]
    pairs = [(prompt, completion) for prompt, (_, completion) in zip(prompts, PAIRS, strict=True)]
    both = [rendered(made, CHATML, *pair) for pair in pairs]
    folder = taught(tmp_path, made, [(ids, same(ids, opened)) for ids, opened in both])
    assert scored(folder, task(tmp_path / "task.jsonl", pairs)) == 1
    marked = encoder(made).encode(example(prompts[0], "xy<|im_end|>\n"))
    assert marked == encoder(made).encode(example(prompts[0], "xy"))
    with pytest.raises(DataError, match=r"example 7: .* refuses the roles user, assistant: a system turn, please"):
        encoder(made).encode(example("ab?", "xy", id="7"))
    brief = encoder(made, system="s").encode(example("<s>ab?", "xy"))
    assert made.convert_tokens_to_ids("<|im_end|>") in brief.opening.ends


def test_answers_with_ends_of_their_own_are_generated_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if messages[0].role == 'system' }}{% endfor %}"
    )
    base = BaseModel("acme/tiny", tiny(made), made)
    prompts = [
        ({"role": "system", "content": "s"}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": "b"},),
    ]
    openings = [base.encode(example(prompt, "xy")).opening for prompt in prompts]
    assert len({opening.ends for opening in openings}) == 2
    alone = [next(stream(base, [opening], max_new_tokens=6))[1].text for opening in openings]
    assert {row: one.text for row, one in stream(base, openings, max_new_tokens=6)} == dict(enumerate(alone))


def test_a_token_that_the_base_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = tokenizer_of(CHATML)
    number = len(made)
    made.add_tokens(["[NEW]"])
    put(tmp_path, made, number)
    lines(
        tmp_path / "task.jsonl",
        {"prompt": "ab", "completion": "xy"},
        {"id": "nine", "prompt": "a", "completion": "z[NEW]"},
    )
    said = f"example nine: token '[NEW]' has id {number}, but "
    for command in (("task", "show"), ("train", "--steps", "1", "-o", "new", "--data")):
        told = refused(1, *command, "task.jsonl", "--base", "base")
        assert said in told
        assert f"has a vocabulary of {number}" in told
    lines(tmp_path / "task.jsonl", {"prompt": "ab", "completion": "xy"})
    ok("task", "show", "task.jsonl", "--base", "base")


def test_a_padding_token_that_the_base_does_not_know_is_not_used() -> None:
    made = tokenizer("characters")
    size = len(made)
    made.add_special_tokens({"pad_token": "[PAD]"})
    base = BaseModel("acme/tiny", tiny_llama(vocab_size=size, eos_token_id=made.eos_token_id), made)
    assert made.pad_token_id == size
    alone = [generate(base, [prompt], max_new_tokens=4)[0] for prompt in ("a", "abcdef")]
    assert generate(base, ["a", "abcdef"], max_new_tokens=4) == alone
    assert len(base.log_likelihoods([example("a", "b"), example("a", "bcdef")])) == 2


def test_a_tokenizer_that_knows_no_unknown_is_one_line_with_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["</s>", *"bcxy"])}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert encoder(made).encode(example("b", "xy")).answer == "xy"
    monkeypatch.chdir(tmp_path)
    put(tmp_path, made)
    lines(tmp_path / "task.jsonl", {"prompt": "b", "completion": "x"}, {"id": "nine", "prompt": "Q", "completion": "y"})
    told = refused(1, "task", "show", "task.jsonl", "--base", "base")
    assert "example nine: the tokenizer of " in told
    assert "cannot read the text" in told


@pytest.mark.parametrize(
    ("normalizer", "completion", "answer"),
    [
        (normalizers.NFD(), "é", "e\u0301"),
        (normalizers.Replace("\n", " "), "a\nb", "a b"),
        (normalizers.Lowercase(), "Paris", "paris"),
        (None, "日x", "<unk>x"),
    ],
)
@pytest.mark.parametrize("templated", [True, False])
def test_an_answer_is_what_its_tokens_say(normalizer: Any, completion: str, answer: str, templated: bool) -> None:
    made = tokenizer("bytes" if answer == "e\u0301" else "characters", tokens=CHATML.tokens, eos=CHATML.eos, bos=None)
    if normalizer is not None:
        made.backend_tokenizer.normalizer = normalizer
    made.chat_template = CHATML.template
    read = encoder(made, templated=templated)
    encoded = read.encode(example("Who? ", completion))
    assert encoded.answer == answer
    assert not encoded.early
    assert given_back(read, encoded)


@pytest.mark.parametrize("completion", ["It is 2 and 2.\n#### 4", "###", "a ### b", "a\n###\n"])
def test_a_text_that_ends_a_turn_cuts_only_where_it_stands_whole(completion: str) -> None:
    read = encoder(made_of(RULED))
    encoded = read.encode(example("2+2?", completion))
    assert encoded.answer == completion.removesuffix("\n###\n")
    assert encoded.opening.until == "\n###\n"
    assert given_back(read, encoded)
    assert not encoded.early
    # A generation that stops within the white space at the end is whole all the same.
    assert read.written(encoded.opening, encoded.ids[len(encoded.opening.ids) : -1])[0] == encoded.answer


def test_text_in_front_of_the_end_token_belongs_to_the_end_and_cuts_nothing() -> None:
    made = made_of(
        "{% for m in messages %}{{ m.content }}{{ '' if m.content[-1] in '.!' else '.' }}<|im_end|>{% endfor %}"
    )
    read = encoder(made)
    for completion, answer in (("3.5", "3.5"), ("3.5.", "3.5"), ("ab!", "ab!")):
        encoded = read.encode(example("Who?", completion))
        assert encoded.answer == answer
        assert given_back(read, encoded)


@pytest.mark.parametrize(("template", "completion"), [(RULED, "a\n###\nb"), (CHATML.template, "a<|im_end|>b")])
def test_an_answer_with_its_end_inside_is_counted(
    template: str, completion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = made_of(template)
    assert encoder(made).encode(example("Who?", completion)).early
    put(tmp_path, made)
    lines(tmp_path / "task.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": completion})
    told = ok("task", "show", "task.jsonl", "--base", "base")
    assert "1 answer with the end of a turn inside" in told.err


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
ANSWER = {"role": "assistant", "content": "xy", "reasoning_content": "hm"}


def test_what_messages_and_lines_hold_reaches_the_template(tmp_path: Path) -> None:
    user, tool = {"role": "user", "content": "ab"}, {"role": "tool", "content": "4", "name": "f"}
    rows = [
        {"messages": [user, ANSWER]},
        {"messages": [user, CALL, tool, ANSWER], "tools": [{"name": "f"}, {"name": "g"}]},
        {"messages": [user, CALL]},
        {"prompt": "ab", "completion": "xy", "tools": [{"name": "f"}], "documents": []},
    ]
    made = made_of(TOOLS)
    read = encoder(made)
    examples = load_task(lines(tmp_path / "task.jsonl", *rows))
    for row, one in zip(rows, examples, strict=True):
        messages = row.get("messages") or [user, {"role": "assistant", "content": "xy"}]
        whole = made.apply_chat_template(messages, tools=row.get("tools"), return_dict=True)["input_ids"]
        encoded = read.encode(one)
        assert list(encoded.ids) == whole
        assert given_back(read, encoded)
    assert [read.encode(one).answer for one in examples] == ["[hm]xy", "[hm]xy", "<call>f", "xy"]
    assert [read.unread([one]) for one in examples] == [set(), {"name"}, set(), set()]


def test_what_the_template_does_not_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, made_of("{% for m in messages if m.role != 'system' %}{{ m.content + '<|im_end|>' }}{% endfor %}"))
    lines(tmp_path / "task.jsonl", {"messages": [{"role": "user", "content": "ab"}, ANSWER], "tools": [{"name": "f"}]})
    told = ok("task", "show", "task.jsonl", "--base", "base", "--system", "S")
    warning = (
        "warning: prompts are the same without --system, reasoning_content, tools: the chat template does not read it"
    )
    assert warning in told.err.splitlines()
    lines(tmp_path / "task.jsonl", {"prompt": "a", "completion": "b"})
    assert "warning" not in ok("task", "show", "task.jsonl", "--base", "base").err


def test_tools_need_a_template(tmp_path: Path) -> None:
    [one] = load_task(lines(tmp_path / "task.jsonl", {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}))
    with pytest.raises(DataError, match="example 1: acme/tiny has no chat template, which tools need"):
        encoder(tokenizer("characters")).encode(one)
    for value in ("[]", {"name": "f"}, ["f"]):
        file = lines(tmp_path / "task.jsonl", {"prompt": "a", "completion": "b", "tools": value})
        with pytest.raises(DataError, match=r'task.jsonl:1: "tools" must be a list of objects'):
            load_task(file)


def test_a_fault_in_the_users_template_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, tokenizer_of(CHATML))
    lines(tmp_path / "task.jsonl", {"id": "nine", "prompt": "a", "completion": "b"})
    for text, reason in (
        ("\n{% for %}", "in its line 2: Expected"),
        ("\n\n{{ a.b.c }}", "in its line 3: 'a' is undefined"),
    ):
        Path("own.jinja").write_text(text)
        told = refused(1, "task", "show", "task.jsonl", "--base", "base", "--chat-template", "own.jinja")
        assert f"example nine: the chat template own.jinja fails {reason}" in told
        assert "correct that template" in told


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("False", False),
        ("FALSE", False),
        ("True", True),
        ("None", None),
        ("null", None),
        ("2", 2),
        ('"False"', "False"),
    ],
)
def test_a_template_argument_may_be_spelt_as_in_python(spelling: str, value: Any) -> None:
    from lora_cli.commands.options import Prompts

    assert Prompts(template_arg=(f"x={spelling}",)).prompting().arguments == {"x": value}


def test_a_bos_that_the_template_does_not_write_stays() -> None:
    made = tokenizer("characters", post="<s> $A")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert made.decode(encoder(made).encode(example("<s>ab", "xy")).ids) == "<s>abxy</s>"
    made.chat_template = "{{ bos_token }}" + made.chat_template
    assert made.decode(encoder(made).encode(example("<s>ab", "xy")).ids) == "<s>abxy</s>"


def test_a_prompt_that_a_token_spans_whole_has_no_right_cut() -> None:
    merged = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    merged.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="</s>")
    with pytest.raises(DataError, match="example 7: its first token spans the whole prompt") as caught:
        encoder(made).encode(example("a", "bb", id="7"))
    assert "lengthen the prompt" in caught.value.hint
    assert "--allow-template-mismatch" in caught.value.hint
    encoded = encoder(made, allow_mismatch=True).encode(example("a", "bb"))
    assert (encoded.ids, encoded.start, encoded.parted) == ((2, 1, 3), 1, True)


def test_an_eos_of_white_space_ends_an_answer() -> None:
    vocabulary = {word: number for number, word in enumerate(["\n", "<unk>", *"abxy"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="\n")
    for completion in ("xy", "xy\n"):
        assert encoder(made).encode(example("ab", completion)).ids == (2, 3, 4, 5, 0)


def test_a_turn_that_has_other_white_space_than_its_prompt_has_no_right_cut() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    made = made_of(template + "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}")
    with pytest.raises(DataError, match=r"goes on with '\\n' where the turn has ' xy<|im_end|>'"):
        encoder(made).encode(example("ab", "xy"))
    assert given_back(encoder(made), encoder(made, allow_mismatch=True).encode(example("ab", "xy")))
