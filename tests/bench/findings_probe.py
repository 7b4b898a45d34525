"""Why merges of a sequence lose: its LoRAs merged all at once, and with weights that do not shrink them."""

from pathlib import Path
from statistics import fmean

from lora_cli.api import OpenPool, open_pool
from lora_cli.models.ref import loaded_once
from lora_cli.steps.study.folder import ADAPTER_FOLDER
from lora_cli.steps.study.sequence.folder import SequenceFolder
from lora_cli.steps.study.sequence.plan import ALONE
from lora_cli.steps.study.sequence.table import table_of
from tests.bench.findings_tables import print_table

METHODS = ("linear", "ties", "lego")


def print_probes(folder: Path) -> None:
    """For every sequence: merges of all its LoRAs at once, with weights 1/T and 1, by the likelihood of all tasks."""
    for path in sorted(folder.glob("*/findings/sequence-*")):
        found = SequenceFolder(path)
        if table_of(found).missing:
            continue
        base = found.plan.base
        with (
            loaded_once(),
            open_pool(base.place, db=folder / "probe.db", base_aliases=base.aliases, device="cpu") as pool,
        ):
            scores = [_of_seed(pool, found, seed) for seed in found.plan.every_seed]
        title = f"All at once, {path.parents[1].name}: {path.name.removeprefix('sequence-')}, nll of all tasks"
        rows = [
            (name, *(f"{pick([one[name] for one in scores]):.3f}" for pick in (fmean, min, max))) for name in scores[0]
        ]
        print_table(title, ("merge", "mean over seeds", "lowest", "highest"), rows)


def _of_seed(pool: OpenPool, found: SequenceFolder, seed: int) -> dict[str, float]:
    """The mean likelihood of all tasks' test examples by each merge of one seed's LoRAs."""
    cells = found.plan.row(ALONE, seed)
    adapters = [found.cell(cell.name) / ADAPTER_FOLDER for cell in cells]
    names, merged = list[str](), list[str]()
    for method in METHODS:
        for weight in (1 / len(adapters), 1.0):
            out = found.path / "probe" / f"{method}-{weight:.2f}-s{seed}"
            names.append(f"{method}, weights {weight:.2f}")
            merged.append(str(pool.merge([f"{one}={weight}" for one in adapters], method, out=out)))
    scores: dict[str, list[float]] = {name: [] for name in names}
    for stage in found.plan.tasks:
        test = found.path.parent / f"{stage.name}.short.jsonl"
        values = pool.evaluate(test, merged, metric="nll", batch_size=64)
        for name, score in zip(names, values[1:], strict=True):
            scores[name].append(score.value)
    return {name: fmean(values) for name, values in scores.items()}
