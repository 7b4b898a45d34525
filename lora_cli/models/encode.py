"""An example as a base model reads it: token ids, the learnt part, and the start of generation."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from lora_cli.errors import DataError, Refused, UsageError
from lora_cli.models.forms import Chat, Control, Form, Frame, Plain, Prompting, demand_no_system, one_line
from lora_cli.records import Example, Prompt
from lora_cli.text import counted

UNLIMITED = 1 << 30
# The number of preceding tokens that decide how a text's first token reads: a space mark, the bytes of a character.
_CONTEXT = 8
_MOST_NAMED = 5


class Opening(NamedTuple):
    """The beginning of a text that generation continues.

    If a token spans prompt and answer, `ids` lack the end of the prompt, `left`, and generated text has to begin with
    `left`. Any of the tokens `ends` ends the generation. Generated text is cut before `until` ("" for never), a turn's
    end without a token of its own, and loses `tail`, the template's text between an answer and the end's token.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...] = ()
    left: str = ""
    until: str = ""
    tail: str = ""


class Encoded(NamedTuple):
    """A finished example as the model reads it.

    `ids` are the ids of the whole text; the loss covers `ids[start:]`, everything after the prompt: the completion with
    the template's text around it and the end of the turn. Exact match compares `answer`, decoded from the tokens, with
    the text generated from `opening`. `id` is the example's id.

    `parted` is True if there is no right cut: the finished turn does not begin with the generation prompt, or its first
    token spans the whole prompt. `marked` is True if the prompt holds control tokens that the template writes around
    prompts, `early` if the answer holds an end of turn, so that it cannot be generated completely.
    """

    ids: tuple[int, ...]
    start: int
    id: str
    opening: Opening
    answer: str
    parted: bool = False
    marked: bool = False
    early: bool = False

    @property
    def tokens(self) -> int:
        """The number of tokens in the loss."""
        return len(self.ids) - self.start


class _End(NamedTuple):
    """The end of an answer: a text, or else a text and the token after it, if there is one."""

    until: str
    tail: str
    token: int | None


class Encoder:
    """Turns examples into token ids and generated ids into text, by a tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer.
        name: the user's name for the base model.
        longest: the most tokens that the base takes.
        vocabulary: the number of token ids of the base.
        ends: token ids that end a generation besides the tokenizer's EOS and the template's end of a turn.

    Raises:
        Refused: the tokenizer has no EOS.
        UsageError: `prompting` has options for a chat template, but there is no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompting: Prompting,
        *,
        name: str,
        longest: int = UNLIMITED,
        vocabulary: int = UNLIMITED,
        ends: Collection[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise Refused(f"{name}: its tokenizer has no end-of-sequence token", hint="choose another base model")
        self.prompting, self.name, self.longest, self.vocabulary = prompting, name, longest, vocabulary
        self._tokenizer = tokenizer
        self._control = Control(tokenizer)
        self._form = self._chosen_form()
        self.ends: list[int] = sorted({*ends, tokenizer.eos_token_id})
        self._known: dict[int, tuple[Example, Encoded]] = {}
        self._ends_by_closing: dict[str, _End] = {}
        # Many adapters answer the same examples, and often alike.
        self._text_of = lru_cache(1 << 12)(
            lambda ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        )

    def _chosen_form(self) -> Form:
        there_is_one = (self.prompting.template, self._tokenizer.chat_template) != (None, None)
        if there_is_one and self.prompting.templated:
            return Chat(self._tokenizer, self.prompting, self.name)
        if needing := self.prompting.for_templates:
            raise UsageError(
                f"{self.name} has no chat template, which {needing[0]} needs",
                hint="give one with --chat-template FILE, or use the instruction-tuned base",
            )
        return Plain(self.prompting, self.name)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of the generation prompt: the chat template around the prompt, else the prompt as plain text.

        Raises:
            DataError: a chat, but there is no chat template, or one that refuses it.
        """
        return self._ids(self._form.prompt(_unanswered(prompt)))

    def opening(self, prompt: Prompt) -> Opening:
        """The start of generation for a prompt: everything before a plain answer. Raises as `prompt_ids`."""
        [frame] = self._form.frames([_unanswered(prompt)])
        end, ids = self._end(frame.closing), self._ids(frame.lead)
        self._demand_known(ids)
        return Opening(tuple(ids), self._ends_with(end), until=end.until, tail=end.tail)

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as the model reads them; see `encode`."""
        encoded = self.read_all(examples)
        self.demand_room({one.id: len(one.ids) for one in encoded})
        return encoded

    def encode(self, example: Example) -> Encoded:
        """An example as the model reads it.

        Raises:
            DataError: longer than the model takes, or as `read`.
        """
        return self.encode_all([example])[0]

    def demand_room(self, lengths: Mapping[str, int], *, new: int = 0) -> None:
        """Raise DataError, which counts and names them, if examples are longer than the model takes.

        Args:
            lengths: the tokens of each example, by its id; `new` tokens that are generated are among them.
        """
        long = {id: length for id, length in lengths.items() if length > self.longest}
        if not long:
            return
        one = len(long) == 1
        named = ", ".join(f"{id} ({length:,})" for id, length in [*long.items()][:_MOST_NAMED])
        raise DataError(
            f"{self.name} takes {self.longest:,} tokens; {len(long):,} of {counted(len(lengths), 'example')} "
            f"{'has' if one else 'have'} more{f' with {new:,} new ones' if new else ''}: {named}"
            + (f" and {len(long) - _MOST_NAMED:,} more" if len(long) > _MOST_NAMED else ""),
            hint=f"{'lower --max-new-tokens, or ' if new else ''}shorten or remove {'it' if one else 'them'}",
        )

    def prompts_of(self, examples: Sequence[Example]) -> list[Encoded]:
        """The prompts of examples before any first token of an answer, which is the one token in their loss.

        Raises:
            DataError: as `encode`.
        """
        # Any answer will do: only what comes before it is kept.
        found = self.encode_all([replace(example, completion="a", answer={}) for example in examples])
        return [one._replace(ids=(*one.opening.ids, 0), start=len(one.opening.ids)) for one in found]

    def read_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as the model reads them, however long.

        Raises:
            DataError: a chat, but there is no chat template; a template that refuses it, or whose finished turn does
                not begin with its generation prompt; a system turn beside that of `prompting`; a text that the
                tokenizer cannot read, or a token that the base does not know.
        """
        # Commands look at a task's examples before they use them, so each is held with its tokens.
        new = [*{id(example): example for example in examples if id(example) not in self._known}.values()]
        try:
            found = self._read_new(new) if new else []
        except DataError:
            for example in new:  # to name the one at fault
                try:
                    self._read_new([example])
                except DataError as error:
                    raise DataError(f"example {example.id}: {error.message}", hint=error.hint) from error
            raise
        self._known |= {id(example): (example, encoded) for example, encoded in zip(new, found, strict=True)}
        return [self._known[id(example)][1] for example in examples]

    def read(self, example: Example) -> Encoded:
        """An example as the model reads it, however long; see `read_all`."""
        return self.read_all([example])[0]

    def _read_new(self, examples: Sequence[Example]) -> list[Encoded]:
        if self.prompting.system:
            demand_no_system(examples)
        frames = self._form.frames(examples)
        bare, own_ends = self._without_ends(examples, [self._end(frame.closing) for frame in frames])
        wholes, marks = self._form.finished(bare), self._form.marked(bare, frames, self._control)
        return [self._read(*parts) for parts in zip(bare, own_ends, frames, wholes, marks, strict=True)]

    def _read(self, example: Example, own_end: int | None, frame: Frame, whole: str, marked: bool) -> Encoded:
        # The template's text after an answer may depend on the answer's end.
        closing = whole[len(whole) - _shared(whole[::-1], frame.closing[::-1]) :]
        end = self._end(closing)
        ids = self._ids(whole)
        if not end.until and end.token is None:
            ids.append(self._tokenizer.eos_token_id if own_end is None else own_end)
        self._demand_known(ids)
        prompt = self._ids(frame.prompt)
        start = _shared(ids, prompt)
        fault = _fault_of_cut(frame.prompt, whole, start)
        if fault is not None and not self.prompting.allow_mismatch:
            raise fault
        # A completion may already begin with the template's text before a plain answer, such as a block of thoughts.
        lead = frame.lead if whole.startswith(frame.lead) else whole[: _shared(whole, frame.prompt)]
        opening = self._opening(prompt if lead == frame.prompt else self._ids(lead), ids, end)
        answer = self._answer(opening, whole.removesuffix(closing), lead)
        generated, _ = self.written(opening, until_end(ids[len(opening.ids) :], opening.ends))
        return Encoded(
            ids=tuple(ids),
            # Nothing predicts the first token.
            start=max(1, start),
            id=example.id,
            opening=opening,
            answer=answer,
            parted=fault is not None,
            marked=marked,
            early=start > 0 and generated.strip() != answer.strip(),
        )

    def written(self, opening: Opening, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of generated ids, and whether it continues the prompt; see `Opening`."""
        text = self._after(opening.ids, ids).removesuffix(opening.tail)
        if opening.until:
            text, found, _ = text.partition(opening.until)
            # A generation may stop inside the white space at the end of a turn.
            text = text if found else text.removesuffix(opening.until.rstrip())
        return text.removeprefix(opening.left), text.startswith(opening.left)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token after the tokens before it."""
        return [self._after(ids[max(0, place - _CONTEXT) : place], [token]) for place, token in enumerate(ids)]

    def one_token(self, encoded: Sequence[Encoded]) -> int:
        """The number of examples whose answer, without the template's text around it, is a single token."""
        return sum(map(self._has_one_token, encoded))

    def unread(self, examples: Sequence[Example]) -> set[str]:
        """The input besides roles and texts that has no effect on the tokens of an example. Raises as `read`."""
        return self._form.unread(examples)

    def _has_one_token(self, encoded: Encoded) -> bool:
        opening = encoded.opening
        behind = encoded.ids[len(opening.ids) :]
        texts = (self._after(opening.ids, behind[:count]) for count in range(1, len(behind) + 1))
        first = next((text for text in texts if len(text) > len(opening.left)), "")
        return first.removeprefix(opening.left).strip() == encoded.answer.strip()

    def _opening(self, lead: Sequence[int], ids: Sequence[int], end: _End) -> Opening:
        """`lead` without the ids at its end that differ in the example, because a token spans lead and answer."""
        kept = _shared(lead, ids) or len(lead)
        left = self._after(lead[:kept], lead[kept:])
        return Opening(tuple(lead[:kept]), self._ends_with(end), left, end.until, end.tail)

    def _answer(self, opening: Opening, text: str, lead: str) -> str:
        """The part of a text after its lead, decoded from tokens: a tokenizer may normalise text."""
        ids = self._ids(text)
        if tuple(ids[: len(opening.ids)]) != opening.ids:
            return text[len(lead) :]
        return self._after(opening.ids, ids[len(opening.ids) :]).removeprefix(opening.left)

    def _without_ends(
        self, examples: Sequence[Example], ends: Sequence[_End]
    ) -> tuple[list[Example], list[int | None]]:
        """Examples without the end of turn at their completions' ends, and the tokens of those ends."""
        texts = [example.completion for example in examples]
        found = self._control.without_ends(texts, [self._ends_with(end) for end in ends])
        bare = []
        for example, end, (text, _) in zip(examples, ends, found, strict=True):
            if end.until and text.rstrip().endswith(end.until.rstrip()):
                text = text.rstrip().removesuffix(end.until.rstrip())
            bare.append(replace(example, completion=text))
        return bare, [token for _, token in found]

    def _ends_with(self, end: _End) -> tuple[int, ...]:
        return tuple(self.ends) if end.token is None else tuple(sorted({*self.ends, end.token}))

    def _end(self, closing: str) -> _End:
        """The end of an answer, from the text after it."""
        # A template writes the same text after nearly every answer.
        if closing not in self._ends_by_closing:
            self._ends_by_closing[closing] = self._read_end(closing)
        return self._ends_by_closing[closing]

    def _read_end(self, closing: str) -> _End:
        text, token = self._control.first(closing)
        text = text and self._as_read(text)
        return _End(text, "", None) if token is None and text.strip() else _End("", text, token)

    def _as_read(self, closing: str) -> str:
        """The text after an answer, decoded from tokens."""
        return self._decoded(self._ids(f"a{closing}")).removeprefix(self._decoded(self._ids("a")))

    def _ids(self, text: str) -> list[int]:
        try:
            if self._form.templated:  # as apply_chat_template does
                return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            return self._with_prefix(text)
        # Tokenizers raise exceptions of many kinds, for example if they have no token for unknown text.
        except Exception as error:
            raise DataError(
                f"the tokenizer of {self.name} cannot read the text: {one_line(error)}",
                hint="change or remove the example, or use a base whose tokenizer knows its characters",
            ) from error

    def _with_prefix(self, text: str) -> list[int]:
        """The token ids of a text after the tokenizer's own prefix, unless the text begins with it."""
        bare = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        full = list(self._tokenizer(text)["input_ids"])
        front = full[: next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)]
        return bare if bare[: len(front)] == front else [*front, *bare]

    def _demand_known(self, ids: Sequence[int]) -> None:
        unknown = next((token for token in ids if token >= self.vocabulary), None)
        if unknown is not None:
            text = self._tokenizer.convert_ids_to_tokens(unknown)
            raise DataError(
                f"token {text!r} has id {unknown}, but {self.name} has a vocabulary of {self.vocabulary}",
                hint="the tokenizer does not belong to these weights: restore the base's own tokenizer files",
            )

    def _after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add behind `before`: a token's text depends on the few before it."""
        near = before[-_CONTEXT:]
        head, both = self._decoded(near), self._decoded([*near, *ids])
        return both.removeprefix(head) if both.startswith(head) else self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._text_of(tuple(ids))


def encoder_of(name: str, tokenizer: Any, config: Any, generation: Any, prompting: Prompting | None = None) -> Encoder:
    """The encoder of a base with this configuration and generation configuration (those of transformers)."""
    text = config.get_text_config()
    ends = generation.eos_token_id
    return Encoder(
        tokenizer,
        prompting or Prompting(),
        name=name,
        longest=_limit(text, "max_position_embeddings"),
        vocabulary=_limit(text, "vocab_size"),
        ends=[ends] if isinstance(ends, int) else ends or [],
    )


def until_end(ids: Sequence[int], ends: Collection[int]) -> Sequence[int]:
    """The token ids before the first end token."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _fault_of_cut(prompt: str, whole: str, start: int) -> DataError | None:
    """The error if there is no right place to cut prompt and completion, else None."""
    if not whole.startswith(prompt):
        at = _shared(prompt, whole)
        return DataError(
            "the finished turn does not begin with the generation prompt, which goes on with "
            f"{prompt[at : at + 20]!r} where the turn has {whole[at : at + 20]!r}",
            hint="see --template-arg and --chat-template, or cut where the two differ with --allow-template-mismatch",
        )
    if not start:
        return DataError(
            "its first token spans the whole prompt and the completion's beginning",
            hint="lengthen the prompt, or accept the example without that token with --allow-template-mismatch",
        )
    return None


def _limit(config: Any, key: str) -> int:
    value = getattr(config, key, None)
    return value if isinstance(value, int) and value > 0 else UNLIMITED


def _unanswered(prompt: Prompt) -> Example:
    return Example(id="", prompt=prompt, completion="")


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
