"""What an evaluation will need: prompts, tokens, batches, memory and time, from lengths and counted work."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_cli.formats.run_record import peak_bytes
from lora_cli.metrics import METRICS
from lora_cli.models.forms import Prompting
from lora_cli.models.loading import load_tokenizer
from lora_cli.models.ref import BaseRef, load_encoder, pin
from lora_cli.models.room import MOST_ROWS, TOKENS_PER_PASS, row_bytes
from lora_cli.precision import torch_dtype
from lora_cli.recipes import EvalOptions
from lora_cli.records import Adapter, Example
from lora_cli.settings import Settings, base_of
from lora_cli.steps.bake.plan import is_here
from lora_cli.steps.estimate import CALLS, FIRST_PASS, Estimate, Outline, model_of, outlines, place_of
from lora_cli.steps.evaluate.choices import read_choices
from lora_cli.steps.evaluate.groups import MOST_TOGETHER
from lora_cli.steps.evaluate.request import EvaluateRequest, test_data
from lora_cli.steps.evaluate.systems import parts_of
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.speed import rates_of

_ROW = 180
"""The bytes of a row of an evaluation without its text."""
_PER_TOKEN = 4
"""Those of a token in that text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The prompts of an evaluation, and the tokens of each row that is read.

    prompts: examples, once per system.
    rows: the tokens of each row of one system: of an example with its answer, or of each of its options.
    judged: the most tokens of a row whose probabilities are needed.
    expected, most: tokens to be written by one system: as many as the expected answers have, and the limit.
    longest: of a row with all that may be written, in tokens.
    """

    systems: int
    prompts: int
    rows: Sequence[int]
    judged: int
    expected: int
    most: int
    longest: int

    @property
    def at_once(self) -> int:
        """Rows that one pass reads, if memory takes them."""
        return max(1, min(MOST_ROWS, TOKENS_PER_PASS // max(self.rows)))

    def facts(self, options: EvalOptions) -> dict[str, int]:
        """The numbers as data."""
        at_once = min(self.at_once, options.batch_size or MOST_ROWS)
        return {
            "systems": self.systems,
            "prompts": self.prompts * self.systems,
            "tokens_read": sum(self.rows) * self.systems,
            "tokens_written_at_most": self.most * self.systems,
            "rows_per_batch": at_once,
            "batches": math.ceil(len(self.rows) * self.systems / at_once),
        }


class Planned(NamedTuple):
    """The plan of an evaluation as data, what it needs if the base is here, and the adapters that are not here."""

    plan: dict[str, Any]
    needs: Estimate | None
    absent: Sequence[Adapter]


def questions(ref: BaseRef, examples: Sequence[Example], options: EvalOptions, systems: int) -> Questions:
    """What so many systems are asked. DataError as `Encoder.encode` for examples that the base cannot read."""
    encoder, kind = load_encoder(ref.place, prompting=ref.prompting), METRICS.get(options.metric).kind
    new = options.max_new_tokens if kind == "output" else 0
    if kind == "choice":
        parts = [option for one in read_choices(encoder, examples).values() for option in one.encoded]
    else:
        parts = encoder.read_all(examples)
    lengths = {one.id: max(len(one.ids), len(one.opening.ids) + new) for one in parts}
    encoder.demand_room(lengths, new=new)
    return Questions(
        systems=systems,
        prompts=len(examples),
        rows=[len(one.ids) for one in parts],
        judged=max(one.tokens for one in parts),
        expected=sum(min(new, one.tokens) for one in parts),
        most=new * len(parts) if new else 0,
        longest=max(lengths.values()),
    )


def of_evaluation(
    ref: BaseRef, asked: Questions, known: Sequence[Sequence[Outline]], options: EvalOptions, *, stored: int = 0
) -> Estimate | None:
    """An evaluation on one load of the base; None if the base is not on this machine.

    Seconds are those of answers as long as the expected ones.

    Args:
        known: the adapters of each system beside the base: one, or all of a router.
        stored: answers that are there already.
    """
    model, place = model_of(ref), place_of(ref)
    if model is None or place is None:
        return None
    width, facts = torch_dtype(ref.compute).itemsize, asked.facts(options)
    one = row_bytes(load_tokenizer(place, named=ref.name)[1], width, longest=asked.longest, judged=asked.judged)
    waiting, limit = len(asked.rows) * asked.systems, options.batch_size or MOST_ROWS
    held = one.reading * min(facts["rows_per_batch"], waiting)
    if asked.most:
        held = max(held, one.writing * min(limit, waiting))
    # The factors of a group, and as many again where the rows of a batch are in another order than the systems.
    numbers = 2 * max(map(_numbers, _groups(known)), default=0)
    rates = rates_of(ref.device, ref.compute, torch.get_num_threads())
    tokens = asked.systems * (sum(asked.rows) + asked.expected)
    own = sum(
        sum(out + into for out, into, _ in adapter.modules.values()) * 8 for system in known for adapter in system
    )
    products = tokens * model.products + (tokens / asked.systems) * own
    passes = facts["batches"] + math.ceil(waiting / limit) * (asked.expected > 0) * options.max_new_tokens
    left, small = 1 - stored / (asked.prompts * asked.systems), CALLS / 3 * rates.call
    read = model.bytes + sum(adapter.bytes for system in known for adapter in system)
    parts = {"base": model.bytes, "adapters": math.ceil(numbers * width), "rows": held}
    parts["program"] = math.ceil(peak_bytes() + FIRST_PASS) if ref.device == "cpu" else 0
    return Estimate(
        read_bytes=read,
        written_bytes=asked.systems * (asked.prompts * _ROW + asked.expected * _PER_TOKEN),
        memory_bytes=sum(parts.values()),
        seconds=read / rates.hashed + left * (products / rates.products + passes * len(model.layers) * small),
        parts=parts,
    )


def _groups(known: Sequence[Sequence[Outline]]) -> list[Sequence[Sequence[Outline]]]:
    """The systems that are asked together, those of like ranks."""
    order = sorted(known, key=lambda system: -max(rank for one in system for *_, rank in one.modules.values()))
    return [order[start : start + MOST_TOGETHER] for start in range(0, len(order), MOST_TOGETHER)]


def _numbers(group: Sequence[Sequence[Outline]]) -> float:
    """The numbers in the factors of a group: in each module all have the highest rank."""
    most: dict[str, float] = {}
    for system in group:
        ranks = Counter[str]()
        for one in system:
            for name, (_, _, rank) in one.modules.items():
                ranks[name] += round(rank)
        for name, rank in ranks.items():
            most[name] = max(most.get(name, 0), rank)
    sides = {name: out + into for system in group for one in system for name, (out, into, _) in one.modules.items()}
    return len(group) * sum(rank * sides[name] for name, rank in most.items())


def planned(
    pool: Pool, names: Sequence[str], settings: Settings, options: EvalOptions, prompting: Prompting, out: Path | None
) -> Planned:
    """An evaluation as `EvaluateRequest` would run it; nothing is downloaded, loaded or written.

    Raises as `EvaluateRequest` does.
    """
    own, here = [parts_of(name) for name in names], is_here(base_of(settings))
    absent = pool.absent([part for parts in own for part in parts])
    plan: dict[str, Any] = {"out": None}
    if not absent:
        request = EvaluateRequest(pool, names, settings, options, prompting)
        ref, task, stored = request.ref, request.task, request.stored(out)
        plan = {"out": str(request.rows(out)), **request.run_settings, "stored": stored}
    elif here:
        base, stored, task = base_of(settings), 0, test_data(settings)
        ref = pin(base, device=settings.device, dtype=settings.dtype, prompting=prompting, progress=pool.progress)
    if not here:
        return Planned(plan, None, absent)
    asked, known = questions(ref, task.examples, options, 1 + len(own)), [outlines(pool, parts) for parts in own]
    needs = of_evaluation(ref, asked, known, options, stored=stored)
    return Planned({**plan, **asked.facts(options)}, needs, absent)
