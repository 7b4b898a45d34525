"""What coefficients are worth, by a metric or by the user's own command: the cost of a search without gradients.

The base stays loaded: a metric judges what the mixture applies to it, a command gets the candidate as a PEFT folder.
"""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import torch

from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.methods import Method
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import stream
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example
from lora_cli.steps.evaluate.choices import chosen, read_choices
from lora_cli.steps.evaluate.evaluate import read_for
from lora_cli.text import duration, shortened

Cost = Callable[[Sequence[float]], float]
"""From θ, one number per entry of `Mixture.theta`, to a cost: the lower, the better."""
ADAPTER = "LORA_ADAPTER"
"""The variable of the environment in which a command finds the candidate's folder."""
_MOST_OUTPUT = 1 << 20


def cost_by_metric(base: BaseModel, mixture: Mixture, examples: Sequence[Example], options: EvalOptions) -> Cost:
    """The mean of a metric of `lora eval` over the examples, negated if a higher value is better.

    Raises:
        NothingMatched: no examples.
        DataError: an example that the base cannot take, or one without the choices that the metric judges.
    """
    if not examples:
        raise NothingMatched("no examples to judge coefficients on")
    metric = METRICS.get(options.metric)
    values = _values(base, examples, metric, options)
    sign = -1.0 if metric.better == "higher" else 1.0

    def cost(theta: Sequence[float]) -> float:
        _take(mixture, theta)
        with torch.no_grad(), mixture.applied(base):
            found = values()
        return sign * math.fsum(found) / len(found)

    return cost


def _values(
    base: BaseModel, examples: Sequence[Example], metric: Method, options: EvalOptions
) -> Callable[[], list[float]]:
    """The metric's value of each example, with what is applied to the base when it is called."""
    judge = partial(METRICS.load(metric.name), **options.knobs)
    size = options.batch_size
    if metric.kind == "choice":
        asked = [*read_choices(base, examples).values()]
        return lambda: [one.value for one in chosen(base, asked, judge, batch_size=size)]
    new = options.max_new_tokens if metric.kind == "output" else 0
    encoded = [*read_for(base, examples, new=new).values()]
    if metric.kind == "likelihood":
        return lambda: [float(value) for value in judge(base.mean_log_likelihoods(encoded, batch_size=size))]
    answers = [one.answer for one in encoded]

    def of_outputs() -> list[float]:
        texts = [""] * len(encoded)
        for place, written in stream(base, [one.opening for one in encoded], max_new_tokens=new, batch_size=size):
            texts[place] = written.text if written.continues else ""
        return [float(value) for value in judge(texts, answers)]

    return of_outputs


def cost_by_command(mixture: Mixture, command: str, write: Callable[[Path], object], *, seconds: float) -> Cost:
    """The negative of the number that a command of the user prints, so that a higher number is better.

    Args:
        command: a program and its arguments, quoted as in a shell, which does not run. It finds the candidate, a PEFT
            folder, in the environment as LORA_ADAPTER. The last line of its stdout is the number.
        write: makes the folder of the mixture's current coefficients, which does not exist before.
        seconds: the time that the command may take; it and its children are killed then.

    Raises:
        UsageError: a command that ends inside quotes, or an empty one. The cost raises Refused if the command cannot be
            run, fails, takes too long, or prints no finite number, and the errors of `write`.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the objective {shortened(command)!r}: {error}", hint="close the quotes") from None
    if not words:
        raise UsageError("the objective is empty", hint=f"one of {', '.join(METRICS.methods)}, or a command")

    def cost(theta: Sequence[float]) -> float:
        _take(mixture, theta)
        with tempfile.TemporaryDirectory(prefix="lora-candidate-") as made:
            folder = Path(made, "adapter")
            write(folder)
            return -_number(words, folder, seconds)

    return cost


def _take(mixture: Mixture, theta: Sequence[float]) -> None:
    """Give a mixture these parameters. ValueError for another number of them."""
    given = torch.as_tensor(theta, dtype=mixture.theta.dtype)
    if given.shape != mixture.theta.shape:
        raise ValueError(f"{given.numel()} parameters for a mixture of {mixture.theta.numel()}")
    with torch.no_grad():
        mixture.theta.copy_(given)


def _number(words: Sequence[str], folder: Path, seconds: float) -> float:
    """The number that a command prints about an adapter."""
    called = f"the objective {shortened(shlex.join(words))}"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, ADAPTER: str(folder)},
                start_new_session=True,
            )
        except OSError as error:
            raise Refused(f"{called} cannot be run: {error.strerror}", hint="a pipe needs sh -c '…'") from None
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Refused(
                f"{called} takes more than {duration(seconds)}", hint="give it more time, or less work"
            ) from None
        finally:
            # What it started in the background ends with it, also if it is interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said, complaint = _last_line(out), _last_line(err)
    if code:
        why = f" by signal {-code}" if code < 0 else f" with code {code}"
        raise Refused(
            f"{called} ended{why}: {complaint or said or 'it said nothing'}", hint=f"run it with {ADAPTER}=DIR"
        )
    try:
        number = float(said)
    except ValueError:
        raise Refused(f"{called} printed {said!r}, not a number", hint="its last line must be the score") from None
    if not math.isfinite(number):
        raise Refused(f"{called} printed {said}, which is not finite")
    return number


def _last_line(file: IO[bytes]) -> str:
    """The last line with text in the end of a file, for a sentence."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _MOST_OUTPUT))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return shortened(lines[-1].strip()) if lines else ""
