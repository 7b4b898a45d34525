"""The folders of a sequence's shards brought together."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from lora_cli.outputs import whole_file
from lora_cli.records import Progress, silent
from lora_cli.steps.study.sequence.data import DATA_FOLDER
from lora_cli.steps.study.sequence.folder import PLAN_FILE, SequenceFolder
from lora_cli.steps.study.sequence.plan import Plan, plan_text
from lora_cli.steps.study.shards import bring_cells, bring_entries, demand_no_links, held_target, joined, sources_of


def collect_sequence(paths: Sequence[Path], out: Path | None = None, *, progress: Progress = silent) -> SequenceFolder:
    """Bring folders of one sequence together in `out`, by default the first of them; the table is not written.

    Nothing is written where two folders differ. The order of the folders does not matter to any cell.

    Raises:
        DataError: a folder without a sequence.
        OutputError: folders of different sequences, two results of one cell that differ, or a place that cannot be
            written or holds something else.
    """
    _joined([SequenceFolder(path.absolute()) for path in paths])
    with held_target(SequenceFolder, paths, out, PLAN_FILE, (DATA_FOLDER,), "sequence") as (target, folders):
        plan = _joined(folders)
        demand_no_links(folders, (DATA_FOLDER,))
        if [folder.path for folder in folders] != [target.path]:
            sources = sources_of(folders, [cell.name for cell in plan.cells()], progress)
            bring_entries([folder.path / DATA_FOLDER for folder in folders], target.path / DATA_FOLDER)
            bring_cells(sources, target, progress)
            with whole_file(target.path / PLAN_FILE) as file:
                file.write(plan_text(plan))
    return SequenceFolder(target.path)


def _joined(folders: Sequence[SequenceFolder]) -> Plan:
    plan = joined([(folder.path, folder.plan) for folder in folders], "sequence", "sequences")
    return msgspec.structs.replace(plan, base=folders[0].plan.base)
