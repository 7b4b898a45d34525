"""The door to EleutherAI's lm-evaluation-harness: its tasks, and a loaded base as its model.

The harness's own class for transformers models computes everything, on the loaded base. What is applied to the base in
the meantime is measured.
"""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError, NetworkError, NothingMatched, Refused, UsageError, shortage
from lora_cli.harness_options import HarnessOptions
from lora_cli.hashes import file_sha256
from lora_cli.hub.session import prepare
from lora_cli.models.base_model import BaseModel
from lora_cli.models.hf import quiet
from lora_cli.records import Progress, silent
from lora_cli.text import nearest, shortened

_FEWSHOT_SEED = 1234
"""The harness's own default, so that the examples in front of a question are those of its command line."""
_REQUESTS_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HarnessTask:
    """A task, or a group of tasks, of the harness, with its data.

    `name` is the user's name for it: one of the harness, or the path of a file. `sha256` identifies its configuration
    and its examples. `loaded` is the harness's own object.
    """

    name: str
    sha256: str
    loaded: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One metric of one task, as the harness computes it.

    `metric` is its name, with that of the filter if there is one. `stderr` is None where the harness has none, and so
    is `higher`, whether a higher value is better. `values` are those of the single examples, if `value` is their mean.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher: bool | None
    values: tuple[float, ...] | None


def version() -> str:
    """The harness's version. UsageError if it is not installed."""
    return str(_harness("").__version__)


def load_tasks(options: HarnessOptions) -> list[HarnessTask]:
    """The tasks of `options`, with their data, in the order in which they are named.

    A task file is a stranger's code: it may name functions, and its templates do not run in a sandbox.

    Raises:
        UsageError: the harness is not installed, a file without `trust_task`, or two files of one task.
        NothingMatched: a name that the harness does not know. DataError: a file that is missing.
        NetworkError: the data of a task cannot be downloaded. Refused: the harness cannot load a task.
    """
    _harness("")
    prepare()
    for name in options.tasks:
        if not _is_file(name):
            continue
        if not options.trust_task:
            raise UsageError(
                f"{name} is a task file, and a task file is code: its templates and functions run as yours",
                hint="read it, then add --trust-task",
            )
        if not Path(name).is_file():
            raise DataError(f"no such file: {name}", hint="give a task file of lm-evaluation-harness (YAML)")
    if not options.trust_task:
        # A metric that the harness lacks would be code from the Hub.
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
    with _silenced():
        manager = _harness(".tasks").TaskManager(include_defaults=not all(map(_is_file, options.tasks)))
    for name in options.tasks:
        if not _is_file(name) and name not in manager.task_index:
            raise NothingMatched(
                f"lm-evaluation-harness has no task {name!r}",
                hint=nearest(name, manager.all_tasks, "its tasks: lm_eval ls tasks"),
            )
    found = [_loaded(manager, name, options) for name in options.tasks]
    members = [member for task in found for member in task.loaded["tasks"]]
    if len({*members}) < len(members):
        raise UsageError(f"the task {max(members, key=members.count)!r} is named twice")
    return found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _loaded(manager: Any, name: str, options: HarnessOptions) -> HarnessTask:
    with _named(name), _silenced():
        loaded = manager.load([name])
        digest = hashlib.sha256(file_sha256(Path(name)).encode() if _is_file(name) else b"")
        for member, task in sorted(loaded["tasks"].items()):
            if task.get_config("num_fewshot") is None or (options.fewshot is not None and task.config.num_fewshot):
                task.set_config("num_fewshot", options.fewshot or 0)
            examples = [document for _, document in task.doc_iterator(limit=options.limit)]
            text = json.dumps([member, task.dump_config(), examples], sort_keys=True, default=str)
            digest.update(text.encode())
    return HarnessTask(name=name, sha256=digest.hexdigest(), loaded=loaded)


class Harness:
    """A loaded base as a model of the harness.

    Args:
        batch_size: texts per pass.
        progress: called with the number of texts that the current task has had read, of how many.
    """

    def __init__(self, base: BaseModel, *, batch_size: int, progress: Progress = silent) -> None:
        with _silenced():
            self._model = _reporting(progress)(
                pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=batch_size
            )

    def measure(self, task: HarnessTask, *, limit: int | None = None, who: str = "") -> list[Measured]:
        """Every metric of a task and of its parts, on the first `limit` examples of each.

        Raises:
            Refused: the harness fails.
        """
        self._model.who = f"{who}: {task.name}" if who else task.name
        with _named(task.name), _silenced():
            for one in task.loaded["tasks"].values():
                one.set_fewshot_seed(seed=_FEWSHOT_SEED)
            found = _harness(".evaluator").evaluate(lm=self._model, task_dict=task.loaded, limit=limit)
            return list(_measured(found))


def _measured(found: Any) -> Iterator[Measured]:
    for task, results in {**found["results"], **found.get("groups", {})}.items():
        samples = found["samples"].get(task, [])
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = results.get(f"{metric}_stderr,{kind}")
            each = [sample.get(metric) for sample in samples if sample["filter"] == kind]
            yield Measured(
                task=task,
                metric=metric if kind == "none" else f"{metric},{kind}",
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                n=int(found["n-samples"].get(task, {}).get("effective", results.get("sample_len", 0))),
                higher=found["higher_is_better"].get(task, {}).get(metric),
                values=_of_mean(each, float(value)),
            )


def _of_mean(each: Sequence[Any], value: float) -> tuple[float, ...] | None:
    """The values of which `value` is the mean, None if it is not."""
    if not each or not all(map(_is_number, each)):
        return None
    numbers = tuple(map(float, each))
    return numbers if math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or type(value).__module__ == "numpy"


def _reporting(progress: Progress) -> Any:
    """The harness's class for transformers models, which tells how far it is."""
    parent = _harness(".models.huggingface").HFLM

    class Reporting(parent):  # type: ignore[misc, valid-type]
        who = ""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().generate_until, requests)

        def _in_parts(self, compute: Any, requests: list[Any]) -> list[Any]:
            found: list[Any] = []
            size = _REQUESTS_AT_ONCE * self.batch_size
            for at in range(0, len(requests), size):
                progress(self.who, at, len(requests))
                found += compute(requests[at : at + size], disable_tqdm=True)
            progress(self.who, len(requests), len(requests))
            return found

    return Reporting


def _harness(part: str) -> Any:
    """A module of the harness. UsageError, with the extra to install, if it is not installed."""
    try:
        with _silenced():
            return importlib.import_module(f"lm_eval{part}")
    except ImportError as error:
        raise UsageError(
            f"--harness needs lm-evaluation-harness ({shortened(str(error))})", hint="pip install 'lora-cli[harness]'"
        ) from error


@contextlib.contextmanager
def _named(task: str) -> Iterator[None]:
    """Failures of the harness as errors about a task."""
    try:
        yield
    # The harness, the libraries of data sets and a task's own functions raise exceptions of many kinds.
    except Exception as error:
        if shortage(error):
            raise
        said = shortened(next(iter(str(error).splitlines()), ""))
        if isinstance(error, ConnectionError):
            raise NetworkError(f"the data of {task}: {said}", hint="check the network, and HF_HUB_OFFLINE") from error
        raise Refused(
            f"lm-evaluation-harness fails on {task}: {type(error).__name__}: {said}",
            hint=f"lm_eval run --tasks {task} has the details",
        ) from error


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep the harness's bars, remarks and prints away: stdout is for results."""
    bar = importlib.import_module("tqdm").tqdm
    for name in ("lm_eval", "datasets", "evaluate", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    usual = bar.__init__

    def hidden(self: Any, *given: Any, **named: Any) -> None:
        # The harness also asks for bars where it was told to show none.
        usual(self, *given, **{**named, "disable": True})

    bar.__init__ = hidden
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        bar.__init__ = usual
