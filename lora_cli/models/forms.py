"""Prompt and completion as one text: by a chat template, or plain."""

import hashlib
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lora_cli.errors import DataError, UsageError
from lora_cli.files import open_given
from lora_cli.records import Example

MOST_TEMPLATE_BYTES = 1 << 20
# Parameters of apply_chat_template that are not variables of the template.
RESERVED = frozenset(
    (
        *("self", "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
# A placeholder answer, to find the template's text around one: only letters, which no template changes.
_ANSWER = "zqAnAnswerqz"
_NOTHING: tuple[Any, ...] = (None, "", [], {})
_OWN_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """The form of prompts for a base model; by default its own chat template, if it has one.

    Args:
        system: text of a system turn in front of every prompt; "" for none.
        template: a chat template (Jinja) in place of the base's own.
        template_name: the template's name in messages.
        arguments: values for variables, which the template may or may not use.
        templated: False reads prompts as plain text although there is a chat template.
        allow_mismatch: accept a finished turn that does not begin with its generation prompt.

    Raises:
        UsageError: options for a chat template although none is used; an argument with a reserved name.
    """

    system: str = ""
    template: str | None = None
    template_name: str = "given"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    templated: bool = True
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        useless = ["--chat-template"] if self.template is not None else self.for_templates
        if useless and not self.templated:
            raise UsageError(f"{useless[0]} and --no-chat-template exclude each other")
        if reserved := sorted(RESERVED & self.arguments.keys()):
            raise UsageError(f"--template-arg cannot set {reserved[0]}", hint="lora sets it for the template")

    @property
    def for_templates(self) -> list[str]:
        """The given options that need a chat template."""
        given = {"--system": self.system, "--template-arg": self.arguments}
        return [option for option, value in given.items() if value]

    @property
    def settings(self) -> dict[str, Any]:
        """The prompting's part of a run's settings: changes from the default, under one key; a template by its hash."""
        template = self.template
        values = {
            "system": self.system,
            "chat_template": "" if template is None else hashlib.sha256(template.encode()).hexdigest(),
            "template_args": dict(self.arguments),
            "no_chat_template": not self.templated,
            "allow_template_mismatch": self.allow_mismatch,
        }
        given = {name: value for name, value in values.items() if value}
        return {"prompting": given} if given else {}


def read_template(file: Path) -> str:
    """The chat template in a file. DataError for one that cannot be read, is over 1 MiB, or is not UTF-8 text."""
    try:
        with open_given(file) as opened:
            data = opened.read(MOST_TEMPLATE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}", hint="see --chat-template") from error
    if len(data) > MOST_TEMPLATE_BYTES:
        raise DataError(f"{file} is larger than 1 MiB: not a chat template", hint="see --chat-template")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text", hint="see --chat-template") from error


class Frame(NamedTuple):
    """The text around an answer: the generation prompt, all up to a plain answer, all behind it."""

    prompt: str
    lead: str
    closing: str


class Form(Protocol):
    """Turns an example into one text. DataError for input that a chat template refuses.

    `templated` is False if the text comes after the tokenizer's own prefix, such as BOS; a template writes it itself.
    """

    templated: bool

    def prompt(self, example: Example) -> str:
        """The text before the generated text."""

    def frames(self, examples: Sequence[Example]) -> list[Frame]:
        """The text around an answer to each example's prompt."""

    def finished(self, examples: Sequence[Example]) -> list[str]:
        """The whole text of each."""

    def unread(self, examples: Sequence[Example]) -> set[str]:
        """The input without effect on the text of an example: further keys of messages and lines, `--system`."""

    def marked(self, examples: Sequence[Example], frames: Sequence[Frame], control: "Control") -> list[bool]:
        """Whether each prompt contains control tokens that the chat template itself writes around prompts."""


class Plain:
    """No template: prompt and completion are one text, after the tokenizer's own prefix."""

    templated = False

    def __init__(self, prompting: Prompting, name: str) -> None:
        self._lacking = f"{name} has" if prompting.templated else "--no-chat-template leaves"

    def prompt(self, example: Example) -> str:
        what = "messages" if not isinstance(example.prompt, str) else next(iter(example.extras), None)
        if what is not None or not isinstance(example.prompt, str):
            raise DataError(
                f"{self._lacking} no chat template, which {what} need",
                hint='use {"prompt", "completion"} examples or the instruction-tuned base',
            )
        return example.prompt

    def frames(self, examples: Sequence[Example]) -> list[Frame]:
        return [Frame(text, text, "") for text in map(self.prompt, examples)]

    def finished(self, examples: Sequence[Example]) -> list[str]:
        return [self.prompt(example) + example.completion for example in examples]

    def unread(self, examples: Sequence[Example]) -> set[str]:
        return set()

    def marked(self, examples: Sequence[Example], frames: Sequence[Frame], control: "Control") -> list[bool]:
        return [False] * len(examples)


class Chat:
    """A chat template around the prompt and around the finished conversation."""

    templated = True

    def __init__(self, tokenizer: Any, prompting: Prompting, name: str) -> None:
        self._tokenizer, self._prompting = tokenizer, prompting
        own = prompting.template is not None
        self._whose = f"the chat template {prompting.template_name}" if own else f"the chat template of {name}"
        self._remedy = "correct that template" if own else "give another one with --chat-template"

    def prompt(self, example: Example) -> str:
        return self._rendered(example, self._turns(example), add_generation_prompt=True)

    def frames(self, examples: Sequence[Example]) -> list[Frame]:
        return [self._frame(example) for example in examples]

    def finished(self, examples: Sequence[Example]) -> list[str]:
        return [self._finished(example) for example in examples]

    def _frame(self, example: Example) -> Frame:
        plain = replace(example, completion=_ANSWER, answer={})
        lead, found, closing = self._finished(plain).rpartition(_ANSWER)
        if not found:
            raise DataError(
                f"{self._whose} does not write an assistant's text",
                hint="choose another with --chat-template, or none with --no-chat-template",
            )
        return Frame(self.prompt(example), lead, closing)

    def _finished(self, example: Example) -> str:
        # The template itself writes the end of a turn.
        answer = {"role": "assistant", "content": example.completion, **example.answer}
        return self._rendered(example, [*self._turns(example), answer])

    def unread(self, examples: Sequence[Example]) -> set[str]:
        return {name for example in examples for name in self._unread(example)}

    def marked(self, examples: Sequence[Example], frames: Sequence[Frame], control: "Control") -> list[bool]:
        return [self._is_marked(*pair, control) for pair in zip(examples, frames, strict=True)]

    def _is_marked(self, example: Example, frame: Frame, control: "Control") -> bool:
        texts = "\n".join(content_of(turn) for turn in as_turns(example))
        around = frame.lead + frame.closing
        found = control.inside(texts) - {self._tokenizer.bos_token}
        return any(around.count(mark) > texts.count(mark) for mark in found)

    def _unread(self, example: Example) -> list[str]:
        left_out = [(name, self, without) for name, without in _each_left_out(example)]
        if self._prompting.system:
            silent = Chat(self._tokenizer, replace(self._prompting, system=""), "")
            left_out.append(("--system", silent, example))
        whole = self._finished(example) if left_out else ""
        return [name for name, form, without in left_out if form._writes(without, whole)]

    def _writes(self, example: Example, whole: str) -> bool:
        try:
            return self._finished(example) == whole
        except DataError:
            return False

    def _turns(self, example: Example) -> list[dict[str, Any]]:
        turns = as_turns(example)
        system = [{"role": "system", "content": self._prompting.system}] if self._prompting.system else []
        bos, first = self._tokenizer.bos_token, content_of(turns[0])
        # Exported texts may begin with the BOS that the template itself writes.
        if bos and first.startswith(bos):
            bare = [*system, {**turns[0], "content": first.removeprefix(bos)}, *turns[1:]]
            if self._rendered(example, bare).startswith(bos):
                return bare
        return [*system, *turns]

    def _rendered(
        self, example: Example, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._prompting.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **{**self._prompting.arguments, **example.extras},
            )
            text.encode()  # Half of a surrogate pair, which no tokenizer takes, raises here.
        # A template is a stranger's program: report every exception as a fault of the template.
        except Exception as error:
            raise self._failure(error, turns) from error
        return str(text)

    def _failure(self, error: Exception, turns: Sequence[Mapping[str, Any]]) -> DataError:
        # raise_exception in a template raises exactly this class; faults of the template are of other classes.
        if type(error).__name__ == "TemplateError":
            roles = ", ".join(str(turn["role"]) for turn in turns)
            return DataError(
                f"{self._whose} refuses the roles {roles}: {one_line(error)}",
                hint="write the examples' messages as this base was trained on them",
            )
        return DataError(f"{self._whose} fails{_place_in_template(error)}: {one_line(error)}", hint=self._remedy)


def as_turns(example: Example) -> list[dict[str, Any]]:
    """The turns of a prompt: plain text is one user's turn."""
    if isinstance(example.prompt, str):
        return [{"role": "user", "content": example.prompt}]
    return [dict(turn) for turn in example.prompt]


def turns_of(examples: Iterable[Example]) -> list[list[dict[str, Any]]]:
    """`as_turns` of each example."""
    return [as_turns(example) for example in examples]


def content_of(turn: Mapping[str, Any]) -> str:
    """The text of a turn, "" if it only calls tools."""
    return turn.get("content") or ""


def demand_no_system(examples: Iterable[Example]) -> None:
    """DataError for an example that has its own system turn."""
    if any(turn["role"] in _OWN_SYSTEM for turns in turns_of(examples) for turn in turns):
        raise DataError("the example has its own system turn", hint="leave out --system, or remove that turn")


def one_line(error: Exception) -> str:
    """The message of a library's error, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _each_left_out(example: Example) -> Iterator[tuple[str, Example]]:
    """The further non-empty keys of an example's messages and line, each with the example without the key."""
    turns = as_turns(example)
    keys = {key for turn in (*turns, example.answer) for key, value in turn.items() if value not in _NOTHING}
    for key in sorted(keys - {"role", "content"}):
        prompt = tuple(_without(turn, key) for turn in turns)
        yield key, replace(example, prompt=prompt, answer=_without(example.answer, key))
    for key in (key for key, value in example.extras.items() if value):
        yield key, replace(example, extras=_without(example.extras, key))


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _place_in_template(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [getattr(error, "lineno", None), *(frame.lineno for frame in frames if frame.filename == "<template>")]
    found = [line for line in lines if line is not None]
    return f" in its line {found[-1]}" if found else ""


class Control:
    """The special and the added tokens of a tokenizer; `ids` maps the text of each to its id, longer texts first."""

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        found = sorted({**special, **added}.items(), key=lambda item: -len(item[0]))
        # Skip runs of line breaks, which are added tokens in Gemma's tokenizers but no control tokens.
        controls = {text: number for text, number in found if text.strip() or number == tokenizer.eos_token_id}
        self.ids: Mapping[str, int] = controls
        self._any = re.compile("|".join(map(re.escape, self.ids)))

    def first(self, text: str) -> tuple[str, int | None]:
        """The part of a text before its first control token, and that token; the whole text and None without one."""
        found = self._any.search(text)
        return (text, None) if found is None else (text[: found.start()], self.ids[found[0]])

    def inside(self, text: str) -> set[str]:
        """The control tokens in a text."""
        return set(self._any.findall(text))

    def without_ends(self, texts: Iterable[str], ends: Iterable[Collection[int]]) -> list[tuple[str, int | None]]:
        """Each text without its tokens `ends` at its end, and the first of those removed, None for none."""
        return [self._without_end(*pair) for pair in zip(texts, ends, strict=True)]

    def _without_end(self, text: str, ends: Collection[int]) -> tuple[str, int | None]:
        marks = "|".join(re.escape(mark) for mark, token in self.ids.items() if token in ends)
        found = re.search(rf"({marks})(?:\s|{marks})*\Z", text) if marks else None
        return (text, None) if found is None else (text[: found.start()], self.ids[found[1]])
