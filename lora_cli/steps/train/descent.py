"""The training that `fit` and `train` share: AdamW on a few tensors, best checkpoint by validation loss, resumable."""

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import DataError, Refused
from lora_cli.files import open_regular
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.outputs import whole_file
from lora_cli.recipes import Recipe
from lora_cli.records import Example
from lora_cli.task import HeldOut

TRACE_FILE = "trace.jsonl"
TOKENS_PER_PASS = 8192
_PADDING_PER_PASS = 512
"""The most padding in a pass, in tokens: more of it costs more than a pass of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The state after `step` steps.

    `training` is the mean loss per token over the batches since the last point, `validation` a mean as in `Learnt`.
    """

    step: int
    training: float | None
    validation: float


class Step(NamedTuple):
    """One step of the optimiser.

    `loss` is the mean per token over its batch, in nats, without a penalty; `gradient` the norm of the gradient before
    it is clipped; `tokens` counts those that were read, without padding.
    """

    lr: float
    loss: float
    gradient: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """The outcome of a training.

    The tuples hold the loss of each validation example, a mean over its completion tokens in nats; the two losses are
    their means, so that every example counts the same, here as in the intervals. `trace` holds every step in order.
    `done` of `steps` were done: a time limit may come before the last one; `unit` is the word for one of them, a step
    or an evaluation of a search, which has no trace. `speed` is the number of tokens that this process read in a second
    of training.
    """

    curve: tuple[Point, ...]
    trace: tuple[Step, ...]
    unit: str = "step"
    done: int
    steps: int
    speed: float = field(compare=False)
    best_step: int
    loss_before: float
    loss_after: float
    each_before: tuple[float, ...]
    each_after: tuple[float, ...]

    @property
    def finished(self) -> bool:
        """Whether every step was done."""
        return self.done == self.steps

    @property
    def place(self) -> str:
        """How far it came, in words."""
        return f"{self.unit} {self.done:,} of {self.steps:,}"


@dataclass(frozen=True, slots=True)
class Parts:
    """The examples of a training as the base reads them: some to learn from, the others to choose the best step."""

    training: list[Encoded]
    validation: list[Encoded]

    @classmethod
    def of(
        cls,
        encode: Callable[[Sequence[Example]], Sequence[Encoded]],
        examples: Sequence[Example],
        *,
        held: HeldOut,
        seed: int,
    ) -> "Parts":
        """The examples encoded, and split as `held` says. DataError for examples that the base cannot take."""
        training, validation = held.parts(examples, seed=seed)
        if held.own:
            return cls([*encode(training)], _of_file(held.file, encode, validation))
        encoded = {one.id: one for one in encode(examples)}
        return cls([encoded[example.id] for example in training], [encoded[example.id] for example in validation])


def _of_file(
    name: str, encode: Callable[[Sequence[Example]], Sequence[Encoded]], examples: Sequence[Example]
) -> list[Encoded]:
    """The examples encoded; an error begins with the file's name."""
    try:
        return [*encode(examples)]
    except DataError as error:
        raise DataError(f"{name}: {error.message}", hint=error.hint) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a training minimises, and what it ends with.

    measure: of a base and a batch, one sum per example, which is divided by the example's tokens.
    penalty: added to the mean of the measure.
    last: end with the last step's parameters, not the best ones.
    """

    measure: Callable[[BaseModel, Sequence[Encoded]], Tensor] = BaseModel.completion_losses
    penalty: Callable[[], Tensor] | None = None
    last: bool = False


_LOSS = Goal()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The file in which the state of a training is kept; `key` identifies the training.

    The training stops at the first step after `deadline`, on the clock of `time.monotonic`; its state is kept.
    """

    file: Path
    key: str
    deadline: float = math.inf


def learn(
    base: BaseModel,
    parameters: Sequence[Tensor],
    parts: Parts,
    recipe: Recipe,
    *,
    goal: Goal = _LOSS,
    while_training: Callable[[], AbstractContextManager[None]] = nullcontext,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None],
) -> Learnt:
    """Train `parameters`, through which `base` already runs; they end at their best values by validation loss.

    Args:
        goal: what is minimised, the loss unless given.
        while_training: entered around every training step (dropout).
        checkpoint: where the state is kept every `recipe.every` steps. A state with the same key is resumed, and the
            outcome is the same to the bit; any other is overwritten.
        progress: called as (steps done, steps in all).

    Raises:
        Refused: a loss that is not finite.
        OutputError: the checkpoint cannot be written.
    """
    run = _Run(base, list(parameters), parts, recipe, goal)
    if checkpoint is None or not run.restore(checkpoint):
        run.evaluate()
    late = False
    while run.step < recipe.steps and not late:
        progress(run.step, recipe.steps)
        with while_training():
            run.advance()
        judged = run.step % recipe.every == 0 or run.step == recipe.steps
        if judged:
            run.evaluate()
        if checkpoint is not None:
            late = time.monotonic() >= checkpoint.deadline
            if judged or late:
                run.keep(checkpoint)
    progress(run.step, recipe.steps)
    with torch.no_grad():
        for parameter, best in zip(run.parameters, run.best, strict=True):
            parameter.copy_(best)
    first = run.curve[0]
    best_point = run.curve[-1] if goal.last else min(run.curve, key=lambda point: point.validation)
    return Learnt(
        curve=tuple(run.curve),
        trace=tuple(run.trace),
        done=run.step,
        steps=recipe.steps,
        speed=run.tokens / run.seconds if run.seconds else 0.0,
        best_step=best_point.step,
        loss_before=first.validation,
        loss_after=best_point.validation,
        each_before=tuple(run.each_before),
        each_after=tuple(run.each_best),
    )


def identity(base: BaseModel, examples: Sequence[Example], *settings: object) -> str:
    """The key of a training: a SHA-256 of the base, the prompts' form, the examples, and the settings given."""
    about = [base.pinned, base.arithmetic, base.encoder.prompting.settings, *settings]
    return hashlib.sha256(json.dumps([about, [asdict(example) for example in examples]]).encode()).hexdigest()


def write_trace(learnt: Learnt, folder: Path) -> str:
    """Write `trace.jsonl`, a line per step or generation of a training, into `folder`; returns its SHA-256.

    Times are left out, so that equal work gives equal bytes.
    """
    judged = {point.step: {"validation_loss": point.validation} for point in learnt.curve}
    rows: list[dict[str, float | None]] = [{"step": 0, **judged[0]}]
    for number, step in enumerate(learnt.trace, 1):
        done = {"lr": step.lr, "training_loss": step.loss, "gradient_norm": step.gradient, "tokens": step.tokens}
        rows.append({"step": number, **done, **judged.get(number, {})})
    for point in () if learnt.trace else learnt.curve[1:]:  # a search, which has generations and no steps
        rows.append({"step": point.step, "lowest_cost": point.training, **judged[point.step]})
    data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    (folder / TRACE_FILE).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@torch.no_grad()
def losses(base: BaseModel, examples: Sequence[Encoded], goal: Goal = _LOSS) -> tuple[float, list[float]]:
    """(mean over examples, mean loss per completion token of each example), in nats, with the update now on `base`."""
    each = [0.0] * len(examples)
    for rows in passes([len(item.ids) for item in examples]):
        sums = goal.measure(base, [examples[row] for row in rows]).tolist()
        for row, total in zip(rows, sums, strict=True):
            each[row] = total / examples[row].tokens
    return math.fsum(each) / len(each), each


class _Run:
    """The state of one training, and its steps."""

    def __init__(
        self,
        base: BaseModel,
        parameters: list[Tensor],
        parts: Parts,
        recipe: Recipe,
        goal: Goal,
    ) -> None:
        self.base, self.parameters, self.parts, self.recipe, self.goal = base, parameters, parts, recipe, goal
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.rate(0), betas=(0.9, 0.999), weight_decay=0.0)
        self.trace: list[Step] = []
        self.tokens, self.seconds = 0, 0.0
        self.curve: list[Point] = []
        self.each_before: list[float] = []
        self.each_best: list[float] = []
        self.best: list[Tensor] = []

    @property
    def step(self) -> int:
        """The steps done."""
        return len(self.trace)

    def advance(self) -> None:
        """One step of the optimiser."""
        recipe, began = self.recipe, time.perf_counter()
        batch = [self.parts.training[row] for row in self._rows()]
        tokens = sum(item.tokens for item in batch)
        total = 0.0
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # Each step has its own seed, so that a resumed run draws the same numbers as an unbroken one.
            torch.manual_seed(_number(f"{recipe.seed} dropout {self.step}"))
            for rows in passes([len(item.ids) for item in batch]):
                loss = self.goal.measure(self.base, [batch[row] for row in rows]).sum() / tokens
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            if self.goal.penalty is not None:
                extra = self.goal.penalty()
                extra.backward()  # type: ignore[no-untyped-call]
        for parameter in self.parameters:
            if parameter.grad is None:  # of an expert to which no token went
                parameter.grad = torch.zeros_like(parameter)
        self._demand_finite(total)
        norm, lr = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0), recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        read = sum(len(item.ids) for item in batch)
        self.trace.append(Step(lr=lr, loss=total, gradient=float(norm), tokens=read))
        self.tokens, self.seconds = self.tokens + read, self.seconds + time.perf_counter() - began

    def evaluate(self) -> None:
        """Take the validation loss and keep the parameters when they are the best so far."""
        loss, each = losses(self.base, self.parts.validation, self.goal)
        self._demand_finite(loss)
        if not self.curve:
            self.each_before = each
        if self.goal.last or not self.curve or loss < min(point.validation for point in self.curve):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
            self.each_best = each
        since = [step.loss for step in self.trace[self.curve[-1].step if self.curve else 0 :]]
        seen = math.fsum(since) / len(since) if since else None
        self.curve.append(Point(step=self.step, training=seen, validation=loss))

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write the state, whole or not at all."""
        notes = {
            "key": checkpoint.key,
            "trace": self.trace,
            "curve": [[point.step, point.training, point.validation] for point in self.curve],
            "before": self.each_before,
            "best": self.each_best,
        }
        state = {"notes": np.array(json.dumps(notes))}
        for place, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            own = self.optimizer.state[parameter]
            tensors = {"now": parameter, "best": best, "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
            state |= {f"{place}.{name}": tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        with whole_file(checkpoint.file) as file:
            np.savez(file, **state)  # type: ignore[arg-type]

    def restore(self, checkpoint: Checkpoint) -> bool:
        """Resume from the state in `checkpoint`; False if there is no state or it belongs to another training."""
        try:
            with open_regular(checkpoint.file) as opened, np.load(opened, allow_pickle=False) as file:
                notes = json.loads(str(file["notes"]))
                if notes["key"] != checkpoint.key:
                    return False
                state = {name: torch.from_numpy(file[name]).to(self.base.device) for name in file.files[1:]}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        self.trace = [Step(*step) for step in notes["trace"]]
        self.curve = [Point(step=step, training=seen, validation=loss) for step, seen, loss in notes["curve"]]
        self.each_before, self.each_best = notes["before"], notes["best"]
        self.best = [state[f"{place}.best"] for place in range(len(self.parameters))]
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters):
                parameter.copy_(state[f"{place}.now"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state[f"{place}.exp_avg"],
                    "exp_avg_sq": state[f"{place}.exp_avg_sq"],
                }
        return True

    def _rows(self) -> list[int]:
        """The examples of this step: one shuffled round after another, each round a function of seed and number."""
        n = len(self.parts.training)
        start = self.step * self.recipe.batch
        rounds = range(start // n, (start + self.recipe.batch - 1) // n + 1)
        stream = [row for number in rounds for row in _shuffled(n, self.recipe.seed, number)]
        offset = start - rounds.start * n
        return stream[offset : offset + self.recipe.batch]

    def _demand_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Refused(
                f"the loss is {loss} at step {self.step}",
                hint="lower --lr, or leave out adapters of extreme norm ('lora pool list --sort -norm')",
            )


def passes(lengths: Sequence[int], copies: int = 1) -> list[list[int]]:
    """Examples of so many tokens, by place, in passes with little padding, the longest first.

    So many `copies` of a pass fit into memory together.
    """
    found: list[list[int]] = []
    longest = padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += longest - lengths[row]
        full = found and copies * (len(found[-1]) + 1) * longest > TOKENS_PER_PASS
        if not found or full or padding > _PADDING_PER_PASS:
            found.append([])
            longest, padding = lengths[row], 0
        found[-1].append(row)
    return found


@lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, number: int) -> list[int]:
    return sorted(range(n), key=lambda row: _number(f"{seed} round {number} row {row}"))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
