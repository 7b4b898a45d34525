"""A fine-tuned model as a LoRA of its base: the best approximation of each layer's difference, a layer at a time."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_cli.algebra.threads import in_order, one_thread_each
from lora_cli.algebra.truncation import Truncated, truncate
from lora_cli.errors import Refused, UsageError
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.layout import Layout, Place
from lora_cli.formats.reader import natural
from lora_cli.formats.run_record import Run, peak_bytes
from lora_cli.formats.writer import AdapterWriter, base_entries
from lora_cli.hashes import sha256_of
from lora_cli.imports._written import HIGHEST_RANK, Converted
from lora_cli.outputs import demand_apart, whole_folder
from lora_cli.precision import STORED
from lora_cli.records import Progress, patient, silent, unheard
from lora_cli.settings import Settings, base_of
from lora_cli.steps.bake.plan import find_base
from lora_cli.steps.convert.pair import Pair, pair
from lora_cli.steps.convert.request import total_error
from lora_cli.steps.recorded import Finished, Job, run_once

_FIRST_RANK: Final = 64
# Bytes for the layers that are approximated at once, and for each entry of one: the difference, and as much again.
_MEMORY, _PER_ENTRY = 1_000_000_000, 8
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """What an extraction found: each changed layer as it was written, and how much every other tensor changed.

    `unchanged` counts the layers that do not differ; `others` maps tensors outside of linear layers to their relative
    change, None where the base has none of their name and shape, or zeros alone.
    """

    modules: Mapping[str, Converted]
    unchanged: int
    others: Mapping[str, float | None]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractJob:
    """An extraction that is checked as far as that needs no weights. One of `rank` and `energy` is None."""

    pair: Pair
    rank: int | None
    energy: float | None
    dtype: str
    job: Job

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[ExtractReport]:
        """Extract, unless the result is there; see `run_once`.

        Raises Refused if no layer differs, or for NaN or Inf in a weight.
        """

        def work(run: Run) -> ExtractReport:
            return _extract(self, run, replace=force, progress=progress)

        return run_once(db, self.job, work, force=force, progress=progress)


def extract_job(
    tuned: str,
    settings: Settings,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "fp32",
    out: Path | None = None,
    announce: Callable[[str], None] = unheard,
    progress: Progress = silent,
) -> ExtractJob:
    """The extraction of a LoRA from a fine-tuned model and the base of the settings.

    Args:
        tuned: a folder or a Hub id of the fine-tuned model.
        rank: the rank of every layer. energy: instead, the share of each layer's squared difference to keep.
        dtype: the precision on disk.

    Raises:
        UsageError: no base, both or neither of rank and energy, or values out of range.
        NothingMatched, AccessDenied, NetworkError: no such model. Refused: models that cannot be compared.
    """
    if (rank is None) == (energy is None):
        raise UsageError("give either --rank or --energy", hint="--rank 32, or --energy 0.9 for 90 % of each layer")
    if rank is not None and not 1 <= rank <= HIGHEST_RANK:
        raise UsageError(f"--rank must be from 1 to {HIGHEST_RANK}, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be above 0 and at most 1, not {energy:g}")
    base = find_base(base_of(settings), announce=announce, progress=progress)
    model = find_base(tuned, announce=announce, progress=progress)
    if model.version == base.version:
        raise Refused(f"{model.name} and {base.name} are one model: nothing to extract")
    found = pair(model, base)
    said: dict[str, Any] = {"base": base.name, "tuned": model.name, "dtype": dtype}
    said |= {"rank": rank} if energy is None else {"energy": energy}
    inputs = {**base.inputs, f"tuned:{model.name}@{model.version}": model.version}
    job = Job(verb="extract", settings=said, inputs=inputs, runs=settings.runs, out=out)
    demand_apart(job.folder, [("model", model.checkpoint.folder), ("base", base.checkpoint.folder)])
    return ExtractJob(pair=found, rank=rank, energy=energy, dtype=dtype, job=job)


def _extract(job: ExtractJob, run: Run, *, replace: bool, progress: Progress) -> ExtractReport:
    started, models = time.monotonic(), job.pair
    others = dict[str, float | None]()
    for done, name in enumerate(models.others):
        progress("compare", done, len(models.others))
        others[name] = models.change(name)
    with whole_folder(job.job.folder, replace=replace) as partial:
        changed = [name for name in natural(models.modules) if models.is_changed(name)]
        if not changed:
            raise Refused(
                f"no linear layer of {models.tuned.name} differs from {models.base.name}",
                hint="an update of embeddings or norms alone is no LoRA",
            )
        modules = _write(job, changed, partial, progress)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            run.outputs[name] = sha256_of(partial / name, patient(progress))
        run.results.update(
            rank=max(one.rank for one in modules.values()),
            error=total_error(modules),
            modules={
                name: {"rank": one.rank, "norm": math.sqrt(one.total), "error": one.error}
                for name, one in modules.items()
            },
            unchanged=len(models.modules) - len(changed),
            left_out={name: change for name, change in others.items() if change != 0},
        )
        run.write(partial)
    return ExtractReport(
        modules=modules,
        unchanged=len(models.modules) - len(changed),
        others=others,
        seconds=time.monotonic() - started,
        peak_bytes=peak_bytes(),
    )


def _write(job: ExtractJob, changed: Sequence[str], folder: Path, progress: Progress) -> dict[str, Converted]:
    """Write the two files of PEFT. Several layers are approximated at once, each on one thread."""
    models, found = job.pair, dict[str, Converted]()
    places = [Place(PREFIX + name, (name,), models.modules[name], name) for name in changed]
    layout = Layout(tuple(places))
    largest = max(math.prod(models.modules[name]) for name in changed)

    def work(name: str) -> tuple[int, Truncated]:
        return _best(job, models.delta(name))

    with AdapterWriter(folder, layout, STORED[job.dtype]) as writer, one_thread_each() as threads:
        workers = max(1, min(threads, _MEMORY // (_PER_ENTRY * largest)))
        calls = ((name,) for name in changed)
        results = in_order(work, calls, workers, pending=workers)
        for done, (name, (rank, best)) in enumerate(zip(changed, results, strict=True)):
            progress("extract", done, len(changed))
            writer.add(name, best.at(rank))
            found[name] = Converted(rank=rank, total=best.total, kept=best.total - best.remainder(rank))
        progress("extract", len(changed), len(changed))
        if writer.empty:
            raise Refused(f"the differences underflow to zero in {job.dtype}", hint="write them with --dtype fp32")
        turned = any(piece.transposed for name in changed for piece in models.places[1][name])
        config: dict[str, Any] = {**base_entries(models.base.name), "task_type": _task(models)}
        config |= {"fan_in_fan_out": turned, **layout.targets(None)}
        writer.finish(config)
    return found


def _best(job: ExtractJob, delta: torch.Tensor) -> tuple[int, Truncated]:
    """The rank that was asked for, or the lowest that keeps the share, and the leading directions."""
    most = min(*delta.shape, HIGHEST_RANK)
    if job.energy is None:
        rank = min(job.rank or most, most)
        return rank, truncate(delta, rank)
    width = min(_FIRST_RANK, most)
    while True:
        best = truncate(delta, width)
        rank = best.rank_for(job.energy)
        if rank <= width or width == most:
            return min(rank, most), best
        width = min(2 * width, most)


def _task(models: Pair) -> str | None:
    """PEFT's word for the task of the base's class, None for another."""
    named = models.base.checkpoint.config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
