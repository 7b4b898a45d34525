"""Select by fits to a task over some adapters at a time, on one load of the base."""

import json
import math
from collections.abc import Sequence
from functools import partial

from lora_cli.catalogue import runs
from lora_cli.errors import AccessDenied, DataError, NothingMatched, OutputError, Refused
from lora_cli.files import read_regular
from lora_cli.formats.run_record import key_of
from lora_cli.models.base_model import BaseModel
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.names import unpinned
from lora_cli.outputs import whole_file
from lora_cli.recipes import SELECTION_METHODS, Recipe, SelectOptions
from lora_cli.records import Candidates
from lora_cli.selection_methods._fits import Fits
from lora_cli.settings import Settings, base_of
from lora_cli.steps.fit.fit import Fitting, fit
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.pool.fetch import refused
from lora_cli.steps.pool.select import Scored
from lora_cli.task import Task
from lora_cli.text import counted


class Scan:
    """Fits to a task over adapters of a pool, each done once: its loss is kept in a file below `runs`."""

    def __init__(
        self,
        pool: Pool,
        task: Task,
        settings: Settings,
        options: SelectOptions,
        prompting: Prompting | None = None,
    ) -> None:
        self._pool, self._task, self._options = pool, task, options
        self._recipe = Recipe(seed=settings.seed)
        self._ref = pin(
            base_of(settings),
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting or Prompting(),
            progress=pool.progress,
        )
        self._target = () if options.target is None else (str(options.target),)
        described = {**self._ref.settings, **self._recipe.settings, "data": task.file.name}
        self._inputs = {**self._ref.inputs, task.file.name: task.sha256}
        self._inputs |= dict(pool.adapters(self._target).inputs) if self._target else {}
        self._settings, self._db = described, settings.db
        self._file = settings.runs / f"scan-{key_of('scan', described, self._inputs)[:8]}.jsonl"
        self._losses = self._stored()
        self._loaded: BaseModel | None = None
        self._quiet = pool.quiet  # an adapter's notes are those of its check
        self.fitted, self.failed = 0, dict[str, str]()

    def scored(self, ranked: Sequence[str], candidates: Candidates) -> Scored:
        """The set that the method chooses of the `ranked` adapters (`id@commit`), all with its validation loss.

        NothingMatched if no adapter can be fitted.
        """
        self._fetch(ranked)
        ranked = [name for name in ranked if unpinned(name) not in self.failed and self._opens(name)]
        if not ranked:
            raise NothingMatched("no adapter can be fitted to this task", hint="see lora pool verify")
        with runs.recorded(self._db, "scan", self._settings, self._inputs, self._file) as run:
            fits = Fits(names=ranked, most=self._options.k, loss=partial(self._loss, ranked))
            places, loss = SELECTION_METHODS.load(self._options.by)(fits)
            run.results |= {"loss": loss, "chosen": [ranked[place] for place in places]}
        if math.isinf(loss):
            raise Refused("no fit over these adapters has a finite loss", hint="see lora pool verify --deep")
        self._pool.announce(
            f"{self._options.by}: {counted(self.fitted, 'fit')} over segments by {self._options.rank_by}; "
            f"validation loss {loss:.3f} with {counted(len(places), 'adapter')}"
        )
        at = {name: place for place, name in enumerate(candidates.pinned)}
        chosen = [at[ranked[place]] for place in places]
        return Scored(
            scores=dict.fromkeys(chosen, loss),
            order={place: -number for number, place in enumerate(chosen)},
            unreadable=self.failed,
            outside={"not in the best fit": len(ranked) - len(chosen)},
        )

    def _loss(self, ranked: Sequence[str], places: Sequence[int]) -> float:
        """The validation loss of a fit over these adapters and the target; infinite where one cannot be used."""
        names = [ranked[place] for place in places]
        key = " ".join(names)
        if key not in self._losses:
            self._losses[key] = self._fitted(names)
            self._keep()
        return self._losses[key]

    def _fitted(self, names: Sequence[str]) -> float:
        adapters = self._quiet.adapters([*self._target, *names]).adapters
        if self._loaded is None:
            self._loaded = self._ref.load(self._pool.progress)
        how = Fitting(recipe=self._recipe, target=adapters[0].ref.pinned if self._target else "")
        self.fitted += 1
        try:
            return fit(self._loaded, adapters, self._task.examples, how, progress=self._pool.progress).learnt.loss_after
        except Refused as error:
            self._pool.announce(f"no fit over {unpinned(names[0])} and {len(names) - 1:,} more: {error.message}")
            return math.inf

    def _opens(self, name: str) -> bool:
        """Whether an adapter can be used; it is named and left out if not."""
        try:
            self._quiet.adapters([name])
        except (Refused, DataError, NothingMatched, AccessDenied) as error:
            self._leave_out(unpinned(name), error.message)
            return False
        return True

    def _fetch(self, names: Sequence[str]) -> None:
        """Bring the weights of all adapters to this machine."""
        refs = [row.ref for row in self._pool.catalogue.rows([*map(unpinned, names)], base=self._pool.base)]
        for adapter, reason in refused(self._pool.catalogue, refs, self._pool.announce, self._pool.progress):
            self._leave_out(adapter.id, reason)

    def _leave_out(self, id: str, reason: str) -> None:
        self.failed[id] = reason.removeprefix(f"{id}: ")
        self._pool.announce(f"{id} left out: {self.failed[id]}")

    def _stored(self) -> dict[str, float]:
        """The losses of earlier fits. Text after the last line break is one whose writing was interrupted."""
        try:
            *lines, _ = read_regular(self._file).decode().split("\n")
            return {str(names): float(loss) for names, loss in map(json.loads, lines)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise OutputError(f"{self._file}: not a file of fits", hint="move it away") from error

    def _keep(self) -> None:
        """Store all losses: they are few, and each took a fit."""
        lines = [json.dumps([key, loss]) + "\n" for key, loss in self._losses.items()]
        with whole_file(self._file) as file:
            file.write("".join(lines).encode())
