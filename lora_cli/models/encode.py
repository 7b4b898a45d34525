"""An example as a base model reads it: token ids, the part that is learnt, and where an answer is generated from."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lora_cli.errors import DataError, Refused, UsageError
from lora_cli.records import Example

UNLIMITED = 1 << 30
MOST_TEMPLATE_BYTES = 1 << 20
# Parameters of apply_chat_template that are no variables of the template.
RESERVED = frozenset(
    (
        *("self", "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
# Tokens in front of a text that decide how its first token reads: a space mark, the bytes of a character.
_CONTEXT = 8
# Stands for an answer, to find out what a template writes around one: letters alone, which no template changes.
_ANSWER = "zqAnAnswerqz"
_OWN_SYSTEM = ("system", "developer")

Prompt = str | tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How prompts are put to a base model; by default with its own chat template, where it has one.

    Args:
        system: text of a system turn in front of every prompt; "" for none.
        template: a chat template (Jinja) in place of the base's own.
        arguments: values for the template's variables, which the template may know or not.
        templated: False reads prompts as plain text although there is a chat template.
        allow_mismatch: go on where a finished turn does not begin with its generation prompt.

    Raises:
        UsageError: something that only a chat template can use, and none is to be used; an argument of a name that
            is not the user's to set.
    """

    system: str = ""
    template: str | None = None
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
        """The options that were given and need a chat template to go into."""
        given = {"--system": self.system, "--template-arg": self.arguments}
        return [option for option, value in given.items() if value]

    @property
    def settings(self) -> dict[str, Any]:
        """Its part of a run's settings: under one key, what differs from the default. A template counts by its hash."""
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
        with file.open("rb") as opened:
            data = opened.read(MOST_TEMPLATE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}", hint="see --chat-template") from error
    if len(data) > MOST_TEMPLATE_BYTES:
        raise DataError(f"{file} is larger than 1 MiB: not a chat template", hint="see --chat-template")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text", hint="see --chat-template") from error


class Opening(NamedTuple):
    """The beginning of a text that generation continues.

    `ids` lack the end of the prompt, `left`, where a token spans prompt and answer: generated text has to begin with
    it. Generated text ends before `until` ("" for never), a turn's end that has no token of its own.
    """

    ids: tuple[int, ...]
    left: str = ""
    until: str = ""


class Encoded(NamedTuple):
    """An example as the model reads it when it is finished.

    `ids` are those of the whole text; the loss covers `ids[start:]`, all that follows the prompt: the completion with
    the template's text around it and the end of the turn. Exact match compares `answer` with the text generated from
    `opening`. `parted` is True where the finished turn does not begin with the generation prompt: the cut is where the
    two part. `id` is the example's.
    """

    ids: tuple[int, ...]
    start: int
    id: str
    opening: Opening
    answer: str
    parted: bool

    @property
    def tokens(self) -> int:
        """How many tokens the loss covers."""
        return len(self.ids) - self.start


class _Frame(NamedTuple):
    """The text around an answer: the generation prompt, all up to a plain answer, all behind it."""

    prompt: str
    lead: str
    closing: str


class _Form(Protocol):
    """How prompt and completion become one text, and a text token ids."""

    ends: Collection[int]
    marks: Collection[str]

    def prompt(self, prompt: Prompt) -> str:
        """The text in front of whatever is generated."""

    def frame(self, prompt: Prompt, mark: str) -> _Frame:
        """The text around an answer. `mark` is the end that the completion brought along."""

    def finished(self, prompt: Prompt, completion: str, mark: str) -> str:
        """The whole text."""

    def ids(self, text: str) -> list[int]:
        """A text that begins where the example begins, as token ids."""


class Encoder:
    """Turns examples into token ids and generated ids into text, as a tokenizer and its chat template have them.

    Args:
        tokenizer: a transformers tokenizer.
        name: how the user calls the base model.
        longest: the most tokens that the base takes.
        ends: token ids that end a generation besides the tokenizer's EOS and the template's end of a turn.

    Raises:
        Refused: the tokenizer has no EOS.
        UsageError: `prompting` has something for a chat template, and there is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompting: Prompting,
        *,
        name: str,
        longest: int = UNLIMITED,
        ends: Collection[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise Refused(f"{name}: its tokenizer has no end-of-sequence token", hint="choose another base model")
        self.prompting, self.name, self.longest = prompting, name, longest
        self._tokenizer = tokenizer
        self._control = _Control(tokenizer)
        self._form = self._chosen_form()
        self.ends: list[int] = sorted({*ends, *self._form.ends, tokenizer.eos_token_id})

    def _chosen_form(self) -> _Form:
        there_is_one = (self.prompting.template, self._tokenizer.chat_template) != (None, None)
        if there_is_one and self.prompting.templated:
            return _Chat(self._tokenizer, self.prompting, self.name, self._control)
        if needing := self.prompting.for_templates:
            raise UsageError(
                f"{self.name} has no chat template, which {needing[0]} needs",
                hint="give one with --chat-template FILE, or use the instruction-tuned base",
            )
        return _Plain(self._tokenizer, self.prompting, self.name)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of the generation prompt: the chat template around the prompt, else the prompt as plain text.

        Raises:
            DataError: a chat, but there is no chat template, or one that refuses it.
        """
        return self._form.ids(self._form.prompt(prompt))

    def opening(self, prompt: Prompt) -> Opening:
        """What an answer to a prompt is generated from: up to where a plain answer begins. Raises as `prompt_ids`."""
        frame = self._form.frame(prompt, "")
        return Opening(tuple(self._form.ids(frame.lead)), until=self._end_in(frame.closing)[0])

    def encode(self, example: Example) -> Encoded:
        """An example as the model reads it.

        Raises:
            DataError: longer than the model takes, or as `read`.
        """
        encoded = self.read(example)
        if len(encoded.ids) > self.longest:
            raise DataError(
                f"example {example.id} has {len(encoded.ids)} tokens, {self.name} takes {self.longest}",
                hint="shorten or remove the example",
            )
        return encoded

    def read(self, example: Example) -> Encoded:
        """An example as the model reads it, however long.

        Raises:
            DataError: a chat, but there is no chat template; a template that refuses it, or whose finished turn does
                not begin with its generation prompt; a system turn beside that of `prompting`.
        """
        self._demand_one_system(example)
        completion, mark = self._without_end(example.completion)
        frame = self._form.frame(example.prompt, mark)
        until, end = self._end_in(frame.closing)
        if until and completion.rstrip().endswith(until):
            completion = completion.rstrip().removesuffix(until).rstrip()
        whole = self._form.finished(example.prompt, completion, mark)
        parted = not whole.startswith(frame.prompt.rstrip())
        if parted and not self.prompting.allow_mismatch:
            raise self._mismatch(example, frame.prompt, whole)
        ids = self._form.ids(whole)
        if not until and end is None:
            ids.append(self._tokenizer.eos_token_id)
        prompt = self._form.ids(frame.prompt)
        # A completion may bring along what the template would write in front of a plain one, a block of thoughts.
        lead = frame.lead if whole.startswith(frame.lead) else whole[: _shared(whole, frame.prompt)]
        return Encoded(
            ids=tuple(ids),
            # Nothing predicts the first token.
            start=max(1, _shared(ids, prompt)),
            id=example.id,
            opening=self._opening(prompt if lead == frame.prompt else self._form.ids(lead), ids, until),
            answer=whole[len(lead) :].removesuffix(frame.closing),
            parted=parted,
        )

    def written(self, opening: Opening, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of generated ids, and whether it goes on from the prompt; see `Opening`."""
        text = self._after(opening.ids, ids)
        if opening.until:
            text = text.partition(opening.until)[0]
        return text.removeprefix(opening.left), text.startswith(opening.left)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, as it reads behind those before it."""
        return [self._after(ids[max(0, place - _CONTEXT) : place], [token]) for place, token in enumerate(ids)]

    def has_one_token(self, encoded: Encoded) -> bool:
        """Whether the answer of an example is a single token, what the template puts around it aside."""
        opening = encoded.opening
        behind = encoded.ids[len(opening.ids) :]
        texts = (self._after(opening.ids, behind[:count]) for count in range(1, len(behind) + 1))
        first = next((text for text in texts if len(text) > len(opening.left)), "")
        return first.removeprefix(opening.left).strip() == encoded.answer.strip()

    def holds_marks(self, prompt: Prompt) -> bool:
        """Whether a prompt contains control tokens that the chat template itself writes around prompts."""
        texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
        return any(mark in text for mark in self._form.marks for text in texts)

    def _opening(self, lead: Sequence[int], ids: Sequence[int], until: str) -> Opening:
        """`lead` without the ids at its end that the example has otherwise: a token spans lead and answer."""
        kept = _shared(lead, ids) or len(lead)
        return Opening(tuple(lead[:kept]), self._after(lead[:kept], lead[kept:]), until)

    def _without_end(self, completion: str) -> tuple[str, str]:
        """A completion without the control tokens that end it, and the first of these, "" for none."""
        found = re.search(rf"({self._end_marks})(?:\s|{self._end_marks})*\Z", completion)
        return (completion, "") if found is None else (completion[: found.start()], found[1])

    @cached_property
    def _end_marks(self) -> str:
        return "|".join(re.escape(text) for text, token in self._control.ids.items() if token in self.ends)

    def _end_in(self, closing: str) -> tuple[str, int | None]:
        """How what follows an answer ends it: by a text, and by the token behind that; "" and None for neither."""
        text, token = self._control.first(closing)
        return text.strip(), token

    def _demand_one_system(self, example: Example) -> None:
        roles = () if isinstance(example.prompt, str) else [turn["role"] for turn in example.prompt]
        if self.prompting.system and any(role in _OWN_SYSTEM for role in roles):
            raise DataError(
                f"example {example.id} has a system turn of its own", hint="leave out --system, or remove that turn"
            )

    def _mismatch(self, example: Example, prompt: str, whole: str) -> DataError:
        at = _shared(prompt, whole)
        return DataError(
            f"example {example.id}: the finished turn does not begin with the generation prompt, which goes on with "
            f"{prompt[at : at + 20]!r} where the turn has {whole[at : at + 20]!r}",
            hint="see --template-arg and --chat-template, or cut where they part with --allow-template-mismatch",
        )

    def _after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add behind `before`: a token's text depends on the few before it."""
        near = before[-_CONTEXT:]
        head, both = self._decoded(near), self._decoded([*near, *ids])
        return both.removeprefix(head) if both.startswith(head) else self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def encoder_of(name: str, tokenizer: Any, config: Any, generation: Any, prompting: Prompting | None = None) -> Encoder:
    """The encoder of a base with this configuration and generation configuration (those of transformers)."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    ends = generation.eos_token_id
    return Encoder(
        tokenizer,
        prompting or Prompting(),
        name=name,
        longest=longest if isinstance(longest, int) and longest > 0 else UNLIMITED,
        ends=[ends] if isinstance(ends, int) else ends or [],
    )


class _Plain:
    """No template: prompt and completion are one text, behind what the tokenizer puts in front of every text."""

    ends: Collection[int] = ()
    marks: Collection[str] = ()

    def __init__(self, tokenizer: Any, prompting: Prompting, name: str) -> None:
        self._tokenizer = tokenizer
        self._lacking = f"{name} has" if prompting.templated else "--no-chat-template leaves"
        bare, full = self._bare("a"), tokenizer("a")["input_ids"]
        self._front = full[: next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)]

    def prompt(self, prompt: Prompt) -> str:
        if not isinstance(prompt, str):
            raise DataError(
                f"{self._lacking} no chat template, which examples with messages need",
                hint='use {"prompt", "completion"} examples or the instruction-tuned base',
            )
        return prompt

    def frame(self, prompt: Prompt, mark: str) -> _Frame:
        text = self.prompt(prompt)
        return _Frame(text, text, mark)

    def finished(self, prompt: Prompt, completion: str, mark: str) -> str:
        return self.prompt(prompt) + completion + mark

    def ids(self, text: str) -> list[int]:
        ids = self._bare(text)
        return ids if ids[: len(self._front)] == self._front else [*self._front, *ids]

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Chat:
    """A chat template around the prompt and around the finished conversation."""

    def __init__(self, tokenizer: Any, prompting: Prompting, name: str, control: "_Control") -> None:
        self._tokenizer, self._prompting, self._name = tokenizer, prompting, name
        try:
            probe = self.frame("a", "")
        except DataError:
            probe = _Frame("", "", "")
        end = control.first(probe.closing)[1]
        self.ends: Collection[int] = () if end is None else (end,)
        self.marks: Collection[str] = {text for text in control.ids if text in probe.lead + probe.closing} - {
            tokenizer.bos_token
        }

    def prompt(self, prompt: Prompt) -> str:
        return self._rendered(self._turns(prompt), add_generation_prompt=True)

    def frame(self, prompt: Prompt, mark: str) -> _Frame:
        lead, found, closing = self.finished(prompt, _ANSWER, mark).rpartition(_ANSWER)
        if not found:
            raise DataError(
                f"{self._whose} does not write an assistant's text",
                hint="choose another with --chat-template, or none with --no-chat-template",
            )
        return _Frame(self.prompt(prompt), lead, closing)

    def finished(self, prompt: Prompt, completion: str, mark: str) -> str:
        # The template writes the end of a turn by itself.
        answer = {"role": "assistant", "content": completion}
        return self._rendered([*self._turns(prompt), answer], add_generation_prompt=False)

    def ids(self, text: str) -> list[int]:
        # As apply_chat_template does.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _whose(self) -> str:
        return f"the chat template of {self._name}" if self._prompting.template is None else "the chat template given"

    def _turns(self, prompt: Prompt) -> list[dict[str, str]]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        bos = self._tokenizer.bos_token
        # Exported texts begin with the BOS that a template writes by itself.
        if bos and turns[0]["content"].startswith(bos) and self._rendered(turns).startswith(bos):
            turns[0]["content"] = turns[0]["content"].removeprefix(bos)
        system = [{"role": "system", "content": self._prompting.system}] if self._prompting.system else []
        return system + turns

    def _rendered(self, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._prompting.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._prompting.arguments,
            )
            text.encode()  # Half of a surrogate pair, which no tokenizer takes, raises here.
        # A template is a program of somebody else's: whatever it raises is about the template.
        except Exception as error:
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise DataError(
                f"{self._whose} refuses an example with the roles {roles}: {error}",
                hint="write the examples' messages as this base was trained on them",
            ) from error
        return str(text)


class _Control:
    """The special and the added tokens of a tokenizer; `ids` maps the text of each to its id, longer texts first."""

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        found = sorted({**special, **added}.items(), key=lambda item: -len(item[0]))
        # Gemma's tokenizers have runs of line breaks among them, which control nothing.
        self.ids: Mapping[str, int] = {text: number for text, number in found if text.strip()}
        self._any = re.compile("|".join(map(re.escape, self.ids)))

    def first(self, text: str) -> tuple[str, int | None]:
        """The part of a text in front of its first control token, and that token; all of it and None without one."""
        found = self._any.search(text)
        return (text, None) if found is None else (text[: found.start()], self.ids[found[0]])


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
    """How many entries two sequences have in common from their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
