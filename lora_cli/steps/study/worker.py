"""What every worker is: one loaded base, a catalogue of its own, and cells done one after another."""

import platform
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import DataError, LoraError
from lora_cli.formats.run_record import peak_bytes, versions
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import loaded_once, pin
from lora_cli.records import unheard
from lora_cli.settings import KEYS, Settings
from lora_cli.steps.evaluate.evaluate import Row
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.study.folder import Outcome
from lora_cli.steps.study.plan import Base

PART = 64
"""Test examples that are asked together: a killed cell asks at most so many again."""


class CellWorker(ABC):
    """Does the cells in a folder; use it in a `with` statement.

    What a cell needs is made first where nobody has made it. The catalogue is the worker's own, so that workers on
    other machines share nothing but the folder. On a CPU one thread computes: then every worker gives the same bytes.

    Entering raises DataError for a folder without a plan, a base or packages of other versions than it was planned
    with, and the errors of `pin`.
    """

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._begin(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @abstractmethod
    def _begin(self, stack: ExitStack) -> None:
        """Read the plan and `_open` its base."""

    @abstractmethod
    def _do(self, name: str) -> bool:
        """Do a piece of work by its name; False if it is done."""

    def _open(
        self,
        stack: ExitStack,
        base: Base,
        *,
        named: str,
        planned: Mapping[str, str],
        data: Path | None = None,
        test: Path | None = None,
        seed: int = 0,
    ) -> None:
        """Make ready for work on the base that is `named` so, by packages of the `planned` versions."""
        demand_versions(planned)
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-study-")))
        if base.device == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        stack.enter_context(loaded_once())
        self._settings = _settings(base, home, data=data, test=test, seed=seed)
        self._prompting = Prompting(**base.prompting)
        self._pool = Pool(
            catalogue=stack.enter_context(Catalogue(self._settings.db)),
            base=base.place,
            aliases=base.aliases,
            announce=unheard,
            policy=base.license_policy,
        )
        self._ref = pin(base.place, name=named, device=base.device, dtype=base.dtype, prompting=self._prompting)

    def load(self) -> None:
        """Load the base, which `run` does where it is not loaded. Errors are those of `BaseRef.load`."""
        self._ref.load()

    def run(self, name: str) -> Outcome:
        """Do a piece of work by its name, unless it is done. A failure is the outcome.

        Raises:
            OutputError: the folder cannot be written.
        """
        began = time.monotonic()
        try:
            made = self._do(name)
        except LoraError as error:
            return Outcome(name=name, error=error.message, hint=error.hint)
        except (MemoryError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            # A fault of one cell, even a bug, does not end the others.
            return Outcome(name=name, error=f"{type(error).__name__}: {error}")
        return Outcome(name=name, seconds=time.monotonic() - began if made else 0.0)


def answers_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers as a result holds them: nothing in them depends on the machine, the time or the place."""
    return [{"id": row.id, "value": row.value, "log_likelihood": row.log_likelihood, "text": row.text} for row in rows]


def cost_of(device: str, tokens: int, seconds: float) -> dict[str, Any]:
    """What work took in this process, which may have gone on from where a killed one stopped."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes(), "device": f"{device} ({name})"}


def demand_versions(planned: Mapping[str, str]) -> None:
    """DataError where Python or a package that computes has another version here than where a study was planned."""
    here = versions()
    for name, version in planned.items():
        if here.get(name) != version:
            raise DataError(
                f"{name} is {here.get(name, 'absent')} here, and was {version} where the study was planned",
                hint="results of different versions are not mixed in one study",
            )


def _settings(base: Base, home: Path, *, data: Path | None, test: Path | None, seed: int) -> Settings:
    """The settings of a worker, from its plan alone; its catalogue and runs are below `home`."""
    return Settings(
        base=base.place,
        base_aliases=base.aliases,
        pool=None,
        db=home / "lora.db",
        data=data,
        test=test,
        device=base.device,
        dtype=base.dtype,
        runs=home / "runs",
        license_policy=base.license_policy,
        seed=seed,
        origins=dict.fromkeys(KEYS, "study"),
    )
