"""How a study scales: cells of the paper's grid, and the time and memory of a plan and a table of 100,000 cells.

python -m tests.bench.bench_study [CELLS]
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_cli.formats.run_record import peak_bytes
from lora_cli.steps.study.collect import collect
from lora_cli.steps.study.folder import RESULT_FILE, StudyFolder, write_plan
from lora_cli.steps.study.plan import Base, Cell, Grid, Study
from lora_cli.steps.study.ways import rule_of, way_of
from lora_cli.study_options import StudyOptions
from tests.bench.study_on_paper import print_on_paper

SYSTEMS = (
    "base", "single", "average", "norm-matched", "ties", "tsv", "lego", "adaptive", "adaptive+target", "ties+target",
    "lorahub", "target",
)  # fmt: skip
POOLS = ("relevant", "random", "noise")


def study_of(seeds: int) -> Study:
    """A study of twelve systems on three pools, of no data."""
    options = StudyOptions()
    return Study(
        shared={"data": "", "test": "", "candidates": "", "evaluation": {"metric": "exact"}},
        base=Base(place="acme/base", aliases=(), device="cpu", dtype="fp32", prompting={}, license_policy="warn"),
        evaluation={"metric": "exact", "max_new_tokens": 30, "batch_size": 16},
        systems={name: way_of(name, options) for name in SYSTEMS},
        pools={name: rule_of(name, options, {}) for name in POOLS},
        grids=(Grid(systems=SYSTEMS, pools=POOLS, seed=0, seeds=seeds),),
    )


def fill(folder: StudyFolder, cells: list[Cell]) -> int:
    """Write a result of one answer for each cell; the bytes of one."""
    size = 0
    for cell in cells:
        found: dict[str, Any] = {
            "schema": "lora.study.cell/1", "cell": cell.name, "system": cell.system, "pool": cell.pool,
            "seed": cell.seed, "metric": "exact", "value": 0.0, "n": 1, "results": {}, "adapters": {},
            "answers": [{"id": "1", "value": 0.0}],
        }  # fmt: skip
        place = folder.cell(cell.name)
        place.mkdir(parents=True)
        text = json.dumps(found).encode()
        (place / RESULT_FILE).write_bytes(text)
        size = len(text)
    return size


def main(wanted: int = 100_000) -> None:
    """Print the counts, and the times."""
    grid = study_of(3)
    cells, needs = grid.cells(), grid.needs(grid.cells())
    print(f"one task: {len(cells)} cells and {len(needs)} needs of {len(SYSTEMS)} systems, 3 pools, 3 seeds")
    print_on_paper(grid)
    seeds = wanted * 3 // len(cells)
    study = study_of(seeds)
    began = time.perf_counter()
    cells = study.cells()
    needs = study.needs(cells)
    planned = time.perf_counter() - began
    print(f"plan of {len(cells):,} cells and {len(needs):,} needs: {planned:.1f} s, peak {peak_bytes() / 1e6:,.0f} MB")
    with tempfile.TemporaryDirectory() as name:
        folder = StudyFolder(Path(name) / "study")
        folder.path.mkdir()
        write_plan(folder, study, [], b"", b"")
        print(f"study.json: {(folder.path / 'study.json').stat().st_size:,} bytes; a cell: {fill(folder, cells)} bytes")
        for times in ("first", "second"):
            began = time.perf_counter()
            found = collect([folder.path])
            seconds = time.perf_counter() - began
            assert found.done == len(cells)
            print(f"collect, {times}: {seconds:.1f} s, peak {peak_bytes() / 1e6:,.0f} MB")
        began = time.perf_counter()
        collect([folder.path], Path(name) / "copy")
        print(f"collect into another folder: {time.perf_counter() - began:.1f} s, peak {peak_bytes() / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
