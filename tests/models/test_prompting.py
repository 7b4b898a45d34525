"""The options for how prompts are put to a base: their effect, and where they are recorded."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lora_cli.models.forms import RESERVED
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.templates import PARTED, STYLES, Style, tokenizer, tokenizer_of
from tests.tiny_bases import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = (("ab?", "xy"), ("cd?", "zw"), ("ef?", "uv"), ("gh?", "st"))
QUICK = ("--rank", "2", "--steps", "2", "--data", "task.jsonl", "--base", "base")
REGMEAN = ("merge", "one", "two", "-m", "regmean", "--base", "base", "--data", "task.jsonl")


@pytest.fixture
def here(own_home: Path) -> Path:
    """A working folder with a task, a ChatML base and two adapters of it."""
    put(STYLES["chatml"])
    shapes = {f"model.layers.{n}.self_attn.q_proj": (32, 32) for n in (0, 1)}
    for seed, name in enumerate(("one", "two")):
        write_adapter(own_home / name, random_factors(shapes, 2, seed=seed), base="base")
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    (own_home / "task.jsonl").write_text("\n".join(lines) + "\n")
    return own_home


def put(style: Style | None) -> None:
    """A base in ./base that speaks in this style; None for a base without a template."""
    shutil.rmtree("base", ignore_errors=True)
    made = tokenizer("characters") if style is None else tokenizer_of(style)
    tiny_llama(vocab_size=len(made), max_position_embeddings=256, eos_token_id=made.eos_token_id).save_pretrained(
        "base"
    )
    made.save_pretrained("base")


def nll(*options: str) -> float:
    told = ok("eval", "one", "--base", "base", "--data", "task.jsonl", "--metric", "nll", "--json", *options)
    return float(json.loads(told.out)["rows"][0]["value"])


def plan(*options: str) -> dict[str, Any]:
    return dict(json.loads(ok("train", *QUICK, "--dry-run", "--json", *options).out))


def test_what_is_given_is_recorded_and_makes_another_run(here: Path) -> None:
    Path("own.jinja").write_text(STYLES["zephyr"].template)
    given = {
        "system": ("--system", "Be brief."),
        "chat_template": ("--chat-template", "own.jinja"),
        "template_args": ("--template-arg", "enable_thinking=false", "--template-arg", "date=May 1"),
        "no_chat_template": ("--no-chat-template",),
        "allow_template_mismatch": ("--allow-template-mismatch",),
    }
    plain = plan()
    assert "prompting" not in plain
    places = {plain["out"]}
    for key, options in given.items():
        found = plan(*options)
        assert [*found["prompting"]] == [key]
        places.add(found["out"])
    assert len(places) == 1 + len(given)
    arguments = plan(*given["template_args"])["prompting"]["template_args"]
    assert arguments == {"enable_thinking": False, "date": "May 1"}
    assert "own.jinja" not in json.dumps(plan(*given["chat_template"]))


def test_every_command_that_reads_a_task_takes_and_records_them(here: Path) -> None:
    system = {"system": "Be brief."}
    trained = json.loads(ok("train", *QUICK, "--system", "Be brief.", "-o", "new", "--json").out)
    assert trained["settings"]["prompting"] == system
    fitted = ok("fit", "one", "two", *QUICK[2:], "--system", "Be brief.", "--dry-run", "--json").out
    assert json.loads(fitted)["prompting"] == system
    scored = ok("eval", "one", "--base", "base", "--data", "task.jsonl", "--system", "Be brief.", "--json").out
    assert json.loads(scored)["prompting"] == system
    merged = json.loads(ok(*REGMEAN, "--system", "Be brief.", "-o", "merged", "--json").out)
    assert merged["settings"]["module_inputs"]["prompting"] == system
    rebuilt = ("merge", "--locked", "merged/run.json", "one", "two", *REGMEAN[5:], "-o", "again")
    assert "prompts" in refused(5, *rebuilt)
    ok(*rebuilt, "--system", "Be brief.")
    assert Path("again/adapter_model.safetensors").read_bytes() == Path("merged/adapter_model.safetensors").read_bytes()


def test_prompts_change_what_a_fit_and_a_regmean_merge_learn_from(here: Path) -> None:
    curves = []
    for name, options in (("plain", ()), ("system", ("--system", "Be brief."))):
        done = ok("fit", "one", "two", *QUICK[2:], "--init", "average", *options, "-o", name, "--json").out
        curves.append(json.loads(done)["results"]["curve"])
        ok(*REGMEAN, *options, "-o", f"merged-{name}")
    assert curves[0] != curves[1]
    weights = [Path(f"merged-{name}/adapter_model.safetensors").read_bytes() for name in ("plain", "system")]
    assert weights[0] != weights[1]


def test_rows_of_other_prompts_are_not_taken_up(here: Path) -> None:
    plain, brief = nll("-o", "rows.jsonl"), nll("-o", "rows.jsonl", "--system", "Be brief.")
    assert plain != brief
    assert nll("-o", "rows.jsonl") == plain
    assert nll("-o", "rows.jsonl", "--no-chat-template") not in (plain, brief)


def test_a_base_reads_the_template_it_is_given(here: Path) -> None:
    put(None)
    without = nll()
    Path("own.jinja").write_text(STYLES["zephyr"].template)
    given = nll("--chat-template", "own.jinja")
    put(STYLES["zephyr"])
    assert (nll("--no-chat-template"), nll()) == (without, given)
    assert without != given
    told = refused(2, "eval", "one", "--base", "base", "--data", "task.jsonl", "--system", "x", "--no-chat-template")
    assert "--system and --no-chat-template exclude each other" in told


def test_a_turn_that_does_not_begin_with_its_prompt_is_an_error_unless_it_is_allowed(here: Path) -> None:
    put(PARTED)
    for command in (("train", *QUICK), ("eval", "one", *QUICK[4:]), ("fit", "one", *QUICK[2:]), REGMEAN):
        told = refused(1, *command)
        assert "example 1: the finished turn does not begin with the generation prompt" in told
        assert "--allow-template-mismatch" in told
    told = ok("train", *QUICK, "--allow-template-mismatch", "-o", "new")
    assert "4 without a right cut" in told.err


def test_a_base_without_a_template_has_no_use_for_a_system_turn(here: Path) -> None:
    put(None)
    for options in (("--system", "x"), ("--template-arg", "x=1")):
        assert f"base has no chat template, which {options[0]} needs" in refused(2, "train", *QUICK, *options)


def test_an_example_with_a_system_turn_of_its_own_is_named(here: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    with Path("task.jsonl").open("a") as file:
        file.write(json.dumps({"id": "seven", "messages": turns}) + "\n")
    ok("train", *QUICK, "-o", "new")
    assert "example seven: the example has its own system turn" in refused(1, "train", *QUICK, "--system", "x")


@pytest.mark.parametrize(
    ("code", "options", "told"),
    [
        (2, ("--template-arg", "x"), "--template-arg is NAME=VALUE, once per name, not 'x'"),
        (2, ("--template-arg", "a b=1"), "--template-arg is NAME=VALUE"),
        (2, ("--template-arg", "x=1", "--template-arg", "x=2"), "once per name, not 'x=2'"),
        (2, ("--template-arg", "tokenize=true"), "--template-arg cannot set tokenize"),
        (2, ("--template-arg", "messages=[]"), "--template-arg cannot set messages"),
        (2, ("--system", "\udc80"), "--system is not UTF-8 text"),
        (2, ("--template-arg", "x=\udc80"), "--template-arg is not UTF-8 text"),
        (1, ("--chat-template", "date.jinja", "--template-arg", 'date="\\ud800"'), "surrogates not allowed"),
        (2, ("--chat-template", "own.jinja", "--no-chat-template"), "--chat-template and --no-chat-template exclude"),
        (1, ("--chat-template", "absent.jinja"), "cannot read absent.jinja: No such file"),
        (1, ("--chat-template", "."), "cannot read .: Is a directory"),
        (1, ("--chat-template", "large.jinja"), "large.jinja is larger than 1 MiB"),
        (1, ("--chat-template", "latin.jinja"), "latin.jinja is not UTF-8 text"),
        (
            1,
            ("--chat-template", "broken.jinja"),
            "the chat template broken.jinja fails in its line ",
        ),
        (1, ("--chat-template", "/dev/zero"), "cannot read /dev/zero: a device, not a file"),
    ],
)
def test_a_mistake_is_one_line(here: Path, code: int, options: tuple[str, ...], told: str) -> None:
    Path("own.jinja").write_text("x")
    Path("date.jinja").write_text("{{ date }}{{ messages }}")
    Path("large.jinja").write_bytes(b"x" * (1 << 20) + b"x")
    Path("latin.jinja").write_bytes("é".encode("latin-1"))
    Path("broken.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n")
    said = refused(code, "train", *QUICK, *options)
    assert told in said
    assert len([line for line in said.splitlines() if not line.startswith(("train:", "data:"))]) <= 2


def test_a_merge_that_reads_no_examples_takes_none_of_them(here: Path) -> None:
    told = refused(2, "merge", "one", "two", "-m", "ties", "--system", "x")
    assert "ties takes no options about prompts" in told


def test_no_argument_of_a_template_can_be_one_of_transformers_own() -> None:
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    # These two go to the template as they are.
    assert RESERVED | {"tools", "documents", "kwargs"} == own | {"messages"}
