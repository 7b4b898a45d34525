import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_cli
from lora_cli.errors import DataError, ExitCode
from lora_cli.records import Example
from lora_cli.task import HeldOut, load_task, read_task, split, task_sha256

GOOD = '{"prompt": "2+2=", "completion": "4"}'


def task(tmp_path: Path, *lines: str | bytes) -> Path:
    file = tmp_path / "task.jsonl"
    file.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return file


def test_both_formats_in_file_order(tmp_path: Path) -> None:
    chat = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "id": "greeting",
    }
    choice = {"prompt": "Sky?", "completion": "blue", "choices": ["blue", "red"], "source": "ours", "id": 7}
    examples = load_task(task(tmp_path, GOOD, json.dumps(chat), json.dumps(choice)))
    assert examples == [
        Example(id="1", prompt="2+2=", completion="4"),
        Example(id="greeting", prompt=({"role": "user", "content": "Hi"},), completion="Hello"),
        Example(id="7", prompt="Sky?", completion="blue", choices=("blue", "red")),
    ]


def test_only_the_last_assistant_turn_is_the_completion(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    [example] = load_task(task(tmp_path, json.dumps(row)))
    assert example.completion == "d"
    assert [turn["content"] for turn in example.prompt if not isinstance(turn, str)] == ["Be brief.", "a", "b", "c"]


def test_a_missing_last_line_break_a_byte_order_mark_and_crlf_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode())
    assert [example.id for example in load_task(file)] == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "the line is empty"),
        ("   ", "the line is empty"),
        ('{"prompt": "a"', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"prompt": "a", "completion": "b", "n": 1' + "0" * 5000 + "}", "malformed JSON"),
        ('["prompt"]', "a JSON object is expected, not a list"),
        ('{"prompt": "a"}', "neither of the two formats"),
        ('{"prompt": 3, "completion": "b"}', '"prompt" must be text, not a number'),
        ('{"prompt": "a", "completion": null}', '"completion" must be text, not nothing'),
        ('{"prompt": "a", "completion": " "}', '"completion" is empty'),
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
        ('{"messages": "hi"}', '"messages" must be a list, not text'),
        ('{"messages": [["user", "a"]]}', "message 1 must be an object, not a list"),
        ('{"messages": [{"role": "user"}]}', '"content" of message 1 must be text'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": []}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing comes before"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "the last turn must be the assistant's, not the user's",
        ),
        ('{"messages": [], "prompt": "a"}', "exclude each other"),
        ('{"prompt": "a", "completion": "b", "choices": ["b"]}', "at least two"),
        ('{"prompt": "a", "completion": "b", "choices": ["b", "b"]}', '"choices" repeats one text'),
        ('{"prompt": "a", "completion": "b", "choices": ["c", "d"]}', "not one of the choices"),
        ('{"prompt": "a", "completion": "b", "id": []}', '"id" must be text, not a list'),
        ('{"prompt": "a", "completion": "b", "id": "1"}', "already used in line 1"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    file = task(tmp_path, GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load_task(file)
    assert caught.value.message.startswith(f"{file}:2: ")
    assert reason in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.ERROR


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.jsonl:2: not UTF-8"):
        load_task(task(tmp_path, GOOD, b'{"prompt": "\xff", "completion": "b"}'))


def test_files_that_hold_nothing_or_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file is empty"):
        load_task(task(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        load_task(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        load_task(tmp_path)


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_bytes(b"abc")
    assert task_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def examples(n: int) -> list[Example]:
    return [Example(id=str(i), prompt=f"p{i}", completion="c") for i in range(n)]


@given(n=st.integers(2, 60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_split_loses_nothing_and_leaves_neither_part_empty(n: int, fraction: float, seed: int) -> None:
    training, validation = split(examples(n), fraction=fraction, seed=seed)
    assert training
    assert validation
    assert sorted(training + validation, key=lambda e: int(e.id)) == examples(n)
    assert training == sorted(training, key=lambda e: int(e.id))
    held = HeldOut(share=fraction)
    assert (held.learnt(n), held.count(n)) == (len(training), len(validation))
    own = HeldOut(own=tuple(validation))
    assert (own.learnt(n), own.count(n)) == (n, len(validation))


def test_split_is_eighty_to_twenty_and_depends_on_the_seed() -> None:
    training, validation = split(examples(100))
    assert (len(training), len(validation)) == (80, 20)
    assert split(examples(100), seed=1)[1] != validation


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="cannot be split"):
        split(examples(1))


def test_split_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from lora_cli.task import split; from lora_cli.records import Example;"
        "print([e.id for e in split([Example(id=str(i), prompt='p', completion='c') for i in range(50)], seed=3)[1]])"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(lora_cli.__file__).parents[1])}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**here, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_prompts_alone_are_read_where_no_answers_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answered = [*chat, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "p"}, {"prompt": "p", "completion": "c"}, {"messages": chat}, {"messages": answered}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_task(file, labelled=False).examples
    assert [one.completion for one in found] == ["", "c", "", "a"]
    assert [one.prompt for one in found] == ["p", "p", tuple(chat), tuple(chat)]
    with pytest.raises(DataError, match=r"prompts.jsonl:1: neither of the two formats"):
        read_task(file)
