"""task.jsonl → Examples: every line is read strictly; an error names file, line number and reason."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError
from lora_cli.files import read_given
from lora_cli.records import Example, Prompt
from lora_cli.text import counted

FORMATS = '{"prompt": "…", "completion": "…"} or {"messages": [{"role": "user", …}, {"role": "assistant", …}]}'


class _BadLine(Exception):
    """The fault of one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task file as it was read: its examples in file order, and the SHA-256 of its bytes.

    `valid` is the user's own file of validation examples, None where a part of the task is held out.
    """

    file: Path
    examples: list[Example]
    sha256: str
    valid: "Task | None" = None

    @property
    def held(self) -> "HeldOut":
        """The examples that choose the best step."""
        return HeldOut() if self.valid is None else HeldOut(own=tuple(self.valid.examples), file=self.valid.file.name)

    @property
    def validated(self) -> int:
        """The number of these examples."""
        return self.held.count(len(self.examples))

    @property
    def learnt(self) -> int:
        """The number of those that are learnt from."""
        return self.held.learnt(len(self.examples))

    @property
    def inputs(self) -> dict[str, str]:
        """The SHA-256 of each file by its name in the record of a run."""
        valid = {} if self.valid is None else {f"{VALID}{self.valid.file.name}": self.valid.sha256}
        return {self.file.name: self.sha256, **valid}

    @property
    def settings(self) -> dict[str, str]:
        """The names of the files in the record of a run."""
        valid = {} if self.valid is None else {"valid": self.valid.file.name}
        return {"data": self.file.name, **valid}

    def parts_in_words(self, seed: int) -> str:
        """What is learnt and what chooses the best step, for the line that a command begins with."""
        learnt = f"{counted(len(self.examples), 'example')} of {self.file.name}"
        if self.valid is None:
            return f"{learnt}, split 80/20 by seed {seed}"
        return f"{learnt} to learn from, {len(self.valid.examples):,} of {self.valid.file.name} to choose the best step"


def load_task(path: Path) -> list[Example]:
    """The examples of `read_task`, which raises likewise."""
    return read_task(path).examples


def read_task(path: Path, *, labelled: bool = True, valid: Path | None = None) -> Task:
    """Every example of a task file, in file order. Without `labelled` a line may lack its completion.

    `valid` is a file of the same kind, whose examples choose the best step of a training.

    A line is `{"prompt": str, "completion": str}` or `{"messages": [{"role": str, "content": str}, …]}` with the
    assistant's turn last. Further keys of messages are kept for the chat template, and so are `"tools"` and
    `"documents"` of a line. A message that calls tools needs no content. `"choices"` (strings, the completion among
    them) and `"id"` are optional, other keys of a line are ignored. An example without an id gets its line number.

    Raises:
        DataError: names the file, the line and the reason.
    """
    own = None if valid is None else read_task(valid, labelled=labelled)
    return replace(task_of(path, _bytes_of(path), labelled=labelled), valid=own)


def task_of(path: Path, data: bytes, *, labelled: bool = True) -> Task:
    """The task in the bytes of a file, as `read_task` reads it."""
    return Task(file=path, examples=_examples(path, data, labelled), sha256=hashlib.sha256(data).hexdigest())


def _examples(path: Path, data: bytes, labelled: bool) -> list[Example]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{number}: not UTF-8 text", hint="save the file as UTF-8") from error
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise DataError(f"{path}: the file is empty", hint=f"one example per line: {FORMATS}")
    examples: list[Example] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            example = _example(line, number, labelled)
            if example.id in first_line:
                raise _BadLine(f"id {example.id!r} is already used in line {first_line[example.id]}")
        except _BadLine as reason:
            raise DataError(f"{path}:{number}: {reason}", hint="correct or remove the line; none is skipped") from None
        first_line[example.id] = number
        examples.append(example)
    return examples


def task_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex, which identifies a task in records. Raises DataError."""
    return hashlib.sha256(_bytes_of(path)).hexdigest()


HELD_OUT = 0.2
"""The share of a task's examples that choose the best step, and are not learnt."""
VALID = "valid:"
"""The beginning of a validation file's name among the inputs of a run."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The examples that choose the best step and are not learnt: a share of a task's, or the user's `own` of a file."""

    share: float = HELD_OUT
    own: tuple[Example, ...] = ()
    file: str = ""

    def parts(self, examples: Sequence[Example], *, seed: int) -> tuple[list[Example], list[Example]]:
        """(training, validation); see `split`, which raises likewise."""
        return ([*examples], [*self.own]) if self.own else split(examples, fraction=self.share, seed=seed)

    def count(self, examples: int) -> int:
        """The number of validation examples beside so many in the task."""
        return len(self.own) or _held_out(examples, self.share)

    def learnt(self, examples: int) -> int:
        """The number of training examples of so many in the task."""
        return examples if self.own else examples - self.count(examples)

    @property
    def settings(self) -> list[Any]:
        """What decides about the parts, beside the task and the seed."""
        return [self.share, [asdict(example) for example in self.own]]

    def demand_parts(self, examples: Sequence[Example]) -> None:
        """Raise DataError where the examples do not suffice for both parts."""
        if not self.own:
            demand_two(examples)


def split(
    examples: Sequence[Example], *, fraction: float = HELD_OUT, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(training, validation): `fraction` of the examples, at least one, is held out; both parts keep the file's order.

    The draw orders the examples by a hash of seed and id, so it is the same on every machine. Raises DataError when
    there are fewer than two examples.
    """
    demand_two(examples)
    held_out = _held_out(len(examples), fraction)
    drawn = sorted(examples, key=lambda example: hashlib.sha256(f"{seed}\n{example.id}".encode()).digest())
    chosen = {example.id for example in drawn[:held_out]}
    training = [example for example in examples if example.id not in chosen]
    return training, [example for example in examples if example.id in chosen]


def _held_out(examples: int, fraction: float) -> int:
    return min(max(1, round(fraction * examples)), examples - 1)


def demand_two(examples: Sequence[Example]) -> None:
    """Raise DataError for fewer examples than a split needs."""
    if len(examples) < 2:
        raise DataError(
            "one example cannot be split into a training and a validation part",
            hint="give at least two examples, or --valid FILE",
        )


def _bytes_of(path: Path) -> bytes:
    try:
        return read_given(path)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}", hint="a task file has one JSON example per line") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _example(line: str, number: int, labelled: bool) -> Example:
    if not line.strip():
        raise _BadLine("the line is empty")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadLine(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise _BadLine("malformed JSON: a number too long or nesting too deep") from None
    if not isinstance(row, dict):
        raise _BadLine(f"a JSON object is expected, not {_kind(row)}")
    prompt: Prompt
    answer: Mapping[str, Any] = {}
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise _BadLine('"messages" and "prompt"/"completion" exclude each other')
        prompt, completion, answer = _chat(row["messages"], labelled)
    elif "prompt" in row and "completion" in row:
        prompt, completion = _text(row["prompt"], '"prompt"'), _text(row["completion"], '"completion"')
    elif "prompt" in row and not labelled:
        prompt, completion = _text(row["prompt"], '"prompt"'), ""
    else:
        raise _BadLine(f"neither of the two formats: {FORMATS}")
    return Example(
        id=_id(row.get("id"), number),
        prompt=prompt,
        completion=completion,
        choices=_choices(row, completion) if completion else (),
        answer=answer,
        extras=_extras(row),
    )


def _extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """The other parts of a line for a chat template, as arguments of apply_chat_template."""
    given = {key: row[key] for key in ("tools", "documents") if row.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise _BadLine(f'"{key}" must be a list of objects')
    return given


def _chat(messages: Any, labelled: bool) -> tuple[tuple[Mapping[str, Any], ...], str, Mapping[str, Any]]:
    """The prompt, the text of the answer, and the other keys of the answer's message."""
    if not isinstance(messages, list):
        raise _BadLine(f'"messages" must be a list, not {_kind(messages)}')
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _BadLine(f"message {place} must be an object, not {_kind(message)}")
        _text(message.get("role"), f'"role" of message {place}')
        if not (message.get("tool_calls") and message.get("content") in (None, "")):
            _text(message.get("content"), f'"content" of message {place}')
        turns.append(message)
    if turns and turns[-1]["role"] != "assistant" and not labelled:
        return tuple(turns), "", {}
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _BadLine("no assistant turn")
    if turns[-1]["role"] != "assistant":
        raise _BadLine(f"the last turn must be the assistant's, not the {turns[-1]['role']}'s")
    if len(turns) == 1:
        raise _BadLine("nothing comes before the assistant's turn")
    *prompt, last = turns
    further = {key: value for key, value in last.items() if key not in ("role", "content")}
    if last.get("content"):
        return tuple(prompt), last["content"], further
    return tuple(prompt), "", {**further, "content": last.get("content")}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _BadLine(f"{what} must be text, not {_kind(value)}")
    if not value.strip():
        raise _BadLine(f"{what} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadLine(f"{what} holds half of a surrogate pair, which is not text")
    return value


def _choices(row: Mapping[str, Any], completion: str) -> tuple[str, ...]:
    if row.get("choices") is None:
        return ()
    if not isinstance(row["choices"], list) or len(row["choices"]) < 2:
        raise _BadLine('"choices" must be a list of at least two texts')
    choices = tuple(_text(choice, f"choice {place}") for place, choice in enumerate(row["choices"], start=1))
    if len({*choices}) < 2:
        raise _BadLine('"choices" repeats one text')
    if completion not in choices:
        raise _BadLine("the completion is not one of the choices")
    return choices


def _id(value: Any, number: int) -> str:
    if value is None:
        return str(number)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, '"id"')


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}.get(
        type(value), "an object"
    )
