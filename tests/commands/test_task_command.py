"""`lora task show`, and the line about the data that every command prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import NetworkError, NothingMatched, Refused
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoder
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import load_encoder
from lora_cli.records import Example
from lora_cli.steps.task_view import look, read
from tests.cli import ok, refused
from tests.templates import STYLES, tokenizer, tokenizer_of
from tests.test_screen import on_terminal
from tests.tiny_bases import saved, tiny_llama

LINES = [
    {"prompt": "ab", "completion": "xy"},
    {"prompt": "cd", "completion": "z"},
    {"prompt": "ab", "completion": "xy"},
    {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "[v]"}]},
]


@pytest.fixture
def here(own_home: Path) -> Path:
    """A working folder with a task, and a base without its weights."""
    saved(own_home / "base")
    (own_home / "base" / "model.safetensors").unlink()
    (own_home / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return own_home


def document(*words: str) -> dict[str, Any]:
    return dict(json.loads(ok("task", "show", *words, "--json").out))


def test_examples_are_shown_as_tokens_with_what_is_learnt_in_brackets(here: Path) -> None:
    told = ok("task", "show", "task.jsonl", "--base", "base", "-n", "2")
    assert told.out.splitlines()[:4] == [
        "example 1: 8 tokens, 3 of them learnt",
        "<bos>|<user>|a|b|<assistant>|[x|y|<eos>]",
        "example 2: 7 tokens, 2 of them learnt",
        "<bos>|<user>|c|d|<assistant>|[z|<eos>]",
    ]
    assert told.err == (
        "data: 4 examples · tokens median 8, 95 % 9, longest 9 · 1 duplicate · 25 % one-token completions\n"
        "warning: 1 validation prompt is also a training prompt, which flatters the best step and its gain: "
        "remove the repeated lines\n"
    )
    assert "duplicates\t1" in told.out


def test_the_document_for_scripts_holds_all_facts_about_the_task(here: Path) -> None:
    Path("test.jsonl").write_text(json.dumps(LINES[1]) + "\n" + json.dumps({"prompt": "new", "completion": "x"}) + "\n")
    found = document("task.jsonl", "--base", "base", "--test", "test.jsonl", "-n", "1")
    [shown] = found.pop("shown")
    assert found == {
        "schema": "lora.task.show/1",
        "file": "task.jsonl",
        "base": str(here / "base"),
        "examples": 4,
        "unit": "tokens",
        "lengths": {"median": 8, "p95": 9, "longest": 9},
        "duplicates": 1,
        "across_split": 1,
        "in_test": 1,
        "usual": "xy",
        "usual_share": 0.5,
        "takes": 64,
        "too_long": [],
        "one_token": 1,
        "parted": 0,
        "marked": 0,
        "early": 0,
        "unread": [],
    }
    assert shown["pieces"] == ["<bos>", "<user>", "a", "b", "<assistant>", "x", "y", "<eos>"]
    assert (shown["start"], shown["generated_from"], len(shown["ids"])) == (5, 5, 8)


def test_without_a_base_the_text_alone_is_looked_at(here: Path) -> None:
    told = ok("task", "show", "task.jsonl", "-n", "4")
    assert "no base model: lengths are in characters" in told.err
    assert "characters median 4, 95 % 5, longest 5 · 1 duplicate" in told.err
    assert "user: ab|[[v]]" in told.out
    assert document("task.jsonl")["one_token"] is None
    assert "only a base model renders prompts" in refused(2, "task", "show", "task.jsonl", "--system", "x")


def test_file_base_and_test_come_from_the_settings(here: Path) -> None:
    assert "no task file" in refused(2, "task", "show")
    Path("lora.toml").write_text('data = "task.jsonl"\ntest = "task.jsonl"\nbase = "base"\n')
    found = document()
    assert (found["file"], found["in_test"], found["unit"]) == ("task.jsonl", 4, "tokens")
    assert "no such file" in refused(1, "task", "show", "absent.jsonl")


def test_what_does_not_fit_is_named_and_everything_is_shown(here: Path) -> None:
    with Path("task.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "x" * 100, "completion": "y"}) + "\n")
    told = ok("task", "show", "task.jsonl", "--base", "base")
    assert "1 longer than the base takes (64)" in told.err
    assert document("task.jsonl", "--base", "base")["too_long"] == ["long"]


def test_prompting_shows_before_anything_is_trained(here: Path) -> None:
    told = ok("task", "show", "task.jsonl", "--base", "base", "-n", "1", "--system", "S")
    assert "<bos>|<system>|S|<user>|a|b|<assistant>|[x|y|<eos>]" in told.out
    told = refused(1, "task", "show", "task.jsonl", "--base", "base", "-n", "1", "--no-chat-template")
    assert "--no-chat-template leaves no chat template" in told
    Path("plain.jsonl").write_text('{"prompt": "<user>q<assistant>", "completion": "xy"}\n')
    assert (
        "1 prompt with control tokens, see --no-chat-template"
        in ok("task", "show", "plain.jsonl", "--base", "base").err
    )
    told = ok("task", "show", "plain.jsonl", "--base", "base", "--no-chat-template")
    assert "<bos>|<user>|q|<assistant>|[x|y|<eos>]" in told.out
    assert "control tokens" not in told.err


def test_the_text_of_a_stranger_shows_escaped(here: Path) -> None:
    Path("odd.jsonl").write_text(json.dumps({"prompt": "a\x1b]0;t\x07", "completion": "[/x]\n"}) + "\n")
    told = ok("task", "show", "odd.jsonl")
    assert "user: a\\x1b]0;t\\x07|[[/x]\\x0a]" in told.out


def test_what_is_learnt_is_in_colour_where_there_is_colour() -> None:
    code = (
        "from lora_cli.screen import Screen\nScreen().pieces('one', [('a[b]', False), ('c\\x1b', True), ('d', True)])"
    )
    styled = on_terminal(code, 80, styled=True)
    assert "\x1b[1;32mc\\x1b\x1b[0m" in styled
    assert styled.startswith("one\na[b]")
    assert styled.endswith("\x1b[1;32md\x1b[0m\n")
    bare = on_terminal(f"import os\nos.environ['NO_COLOR'] = '1'\n{code}", 80, styled=True)
    assert bare == "one\na[b]|[c\\x1b|d]\n"


@pytest.mark.parametrize("name", STYLES)
def test_the_encoder_of_a_base_is_loaded_without_its_weights(name: str, own_home: Path) -> None:
    made = tokenizer_of(STYLES[name])
    model = tiny_llama(vocab_size=len(made), eos_token_id=made.eos_token_id, max_position_embeddings=99)
    model.generation_config.eos_token_id = [0, made.eos_token_id]
    model.save_pretrained("base")
    made.save_pretrained("base")
    Path("base/model.safetensors").unlink()
    light, whole = load_encoder("base"), BaseModel("base", model, made).encoder
    one = Example(id="1", prompt="Who?", completion="Lily")
    assert (light.ends, light.longest) == (whole.ends, 99)
    assert light.encode(one) == whole.encode(one)
    Path("base/generation_config.json").unlink()
    assert made.eos_token_id in load_encoder("base").ends


@pytest.mark.slow
def test_a_base_that_is_not_there_is_one_line(here: Path) -> None:
    with pytest.raises(NothingMatched):
        load_encoder("./absent")
    with pytest.raises(NetworkError):
        load_encoder("acme/absent")
    Path("base/tokenizer.json").write_text("{")
    with pytest.raises(Refused):
        load_encoder("base")


def test_pieces_are_tokens_or_turns() -> None:
    example = Example(id="1", prompt="a girl named Li", completion="ly")
    encoder = Encoder(tokenizer("pieces", post="<s> $A"), Prompting(), name="acme/tiny")
    shown = read(example, encoder)
    assert (shown.pieces, shown.start) == (("<s>", " a", " girl", " named", " Lily", "</s>"), 4)
    assert shown.generated_from == 4
    assert "".join(read(example).pieces) == "user: a girl named Lily"


@pytest.mark.parametrize("name", STYLES)
def test_one_token_means_the_answer_alone(name: str) -> None:
    style = STYLES[name]
    encoder = Encoder(tokenizer_of(style, "bytes"), Prompting(arguments=style.arguments), name="acme/tiny")
    # This tokenizer has "it" as one token, and none for "was there".
    for completion, single in (("it", True), ("was there", False)):
        assert look([Example(id="1", prompt="Who?", completion=completion)], encoder).one_token == single
