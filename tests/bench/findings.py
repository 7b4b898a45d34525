"""The numbers of docs/findings.md from nothing: studies and sequences on two worlds, and a table for each finding.

python -m tests.bench.findings FOLDER [--only STEP | --tables]

`letters` is the world that `lora demo` builds. `stories` is stories260K, a real model of 260,000 parameters, at
LORA_STORIES or beside the repository, with adapters that are trained here; without the model it is left out. The
folder keeps all cells: a killed run goes on, `--only` does one step, and `--tables` prints the tables of what is there.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from lora_cli.world.tasks import STRING_LENGTH, examples, file_name, write_jsonl
from tests.bench.findings_probe import print_probes
from tests.bench.findings_tables import print_sequences, print_studies
from tests.bench.made_stories import prompts, story_examples
from tests.cli import ok
from tests.paths import ROOT

SEEDS, LEARNT, TESTED, TESTED_EACH = 5, 100, 300, 100
STORIES = Path(os.environ.get("LORA_STORIES", ROOT.parent / "shared" / "wild" / "bases" / "stories260K"))
SYSTEMS = "base,single,adaptive,target"
MORE_SYSTEMS = "average,ties,lego,adaptive+target"
NEW_LORA = ("--target-rank", "8", "--target-alpha", "16", "--target-dropout", "0", "--target-lr", "5e-3")
EXACT = ("--metric", "exact", "--max-new-tokens", "8", "--batch-size", "64")
LETTER_TASKS = {
    "descend": ("kestrel/descend", "mossy/sort-descending"),
    "median": (),
    "swap|shift-four": (),
}
"""The tasks of the letters, each with the adapters of the pool that were trained on it.

The base cannot do the first two. It answers a part of the third, whose operations it was trained on.
"""
STORY_ADAPTERS = (
    ("letter", "sea"), ("tale", "sea"), ("backwards", "sea"), ("tale", "farm"), ("letter", "farm"), ("count", "farm"),
)  # fmt: skip
STORY_TASKS = (("letter", "sea"), ("dream", "farm"))
STORY_SEQUENCES = {"forms": (("dream", "farm"), ("letter", "sea"), ("count", "farm"))}
LETTER_SEQUENCES = {
    "related": ("copy|shift-six", "swap|shift-six", "rotate-one|shift-six"),
    "unrelated": ("descend", "cond", "median"),
}
RULES = "average,ties,lego-2,lego-4,lego-8,sequential"


def lora(folder: Path, *words: str) -> None:
    """Run a command of the tool in `folder`, in this process, and print it."""
    print("lora", *words, flush=True)
    os.chdir(folder)
    os.environ["LORA_DB"] = str(folder / "lora.db")
    began = time.monotonic()
    ok(*words)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def letter_task(folder: Path, task: str) -> str:
    """Write training and test data of a task on letters; its name in file names."""
    name = file_name(task)
    found = examples(task, STRING_LENGTH["small"], LEARNT + TESTED, random.Random(f"findings {task}"))
    _write(folder, name, found[:LEARNT], found[LEARNT:])
    return name


def story_task(folder: Path, form: str, theme: str, exclude: Collection[str] = ()) -> str:
    """Write training and test data of a form about a theme; its name in file names."""
    found = story_examples(form, theme, LEARNT + TESTED, "findings", exclude)
    _write(folder, f"{form}-{theme}", found[:LEARNT], found[LEARNT:])
    return f"{form}-{theme}"


def _write(folder: Path, name: str, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    (folder / "findings").mkdir(exist_ok=True)
    write_jsonl(folder / "findings" / f"{name}.jsonl", name, "train", train)
    write_jsonl(folder / "findings" / f"{name}.short.jsonl", name, "test", test[:TESTED_EACH])
    write_jsonl(folder / "findings" / f"{name}.test.jsonl", name, "test", test)


def study_file(folder: Path, name: str, relevant: Collection[str]) -> Path:
    """A study file whose random pools hold no adapter that was trained on the task."""
    where = json.dumps([f"id!={one}" for one in relevant])
    pools = [
        '"relevant"',
        f'{{name = "unrelated", by = "random", where = {where}}}',
        f'{{name = "noise", by = "random", where = {where}, noise = "norm"}}',
    ]
    file = folder / "findings" / f"{name}.toml"
    lines = [f'data = "{name}.jsonl"', f'test = "{name}.test.jsonl"', f"pools = [{', '.join(pools)}]"]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def study(folder: Path, name: str, relevant: Collection[str], systems: str, *words: str) -> None:
    """The study of one task."""
    lora(folder, "study", "--file", str(study_file(folder, name, relevant)), "--systems", systems, "--seeds",
         str(SEEDS), *NEW_LORA, *words, "--jobs", "1", "-o", str(folder / "findings" / f"study-{name}"))  # fmt: skip


def sequence(folder: Path, name: str, tasks: list[str], *words: str) -> None:
    """A sequence of tasks, by LoRAs of rank 4."""
    places = [folder / "findings" / task for task in tasks]
    data, test = (",".join(f"{place}{ending}" for place in places) for ending in (".jsonl", ".short.jsonl"))
    lora(folder, "study", "--sequence", data, "--sequence-test", test, "--rules", RULES, "--seeds", str(SEEDS),
         "--target-rank", "4", "--target-alpha", "8", *NEW_LORA[4:], *words, "--jobs", "1",
         "-o", str(folder / "findings" / f"sequence-{name}"))  # fmt: skip


def letters(folder: Path) -> None:
    """Studies on the world of `lora demo`; more systems on the tasks that the base cannot do."""
    if not (folder / "lora-runs").exists():
        lora(folder.parent, "demo", str(folder))
    for systems, tasks in ((SYSTEMS, [*LETTER_TASKS]), (MORE_SYSTEMS, ["descend", "median"])):
        for task in tasks:
            relevant = [f"pool/{one}" for one in LETTER_TASKS[task]]
            study(folder, letter_task(folder, task), relevant, systems, "-k", "5", "--steps", "100", "--target-steps",
                  "100", *EXACT)  # fmt: skip


def letter_sequences(folder: Path) -> None:
    """Sequences on the world of `lora demo`, after its studies."""
    for name, tasks in LETTER_SEQUENCES.items():
        names = [letter_task(folder, task) for task in tasks]
        sequence(folder, name, names, "--target-steps", "100", "--metric", "nll", "--batch-size", "64")


def longer_study(folder: Path, name: str, steps: int, *words: str) -> None:
    """Fits of more steps for adapters and for noise, on a task on which no adapter was trained."""
    lora(folder, "study", "--file", str(study_file(folder, name, ())), "--systems", "base,adaptive", "--pools",
         "unrelated,noise", "--seeds", str(SEEDS), "--steps", str(steps), *words, "--jobs", "1",
         "-o", str(folder / "findings" / f"study-{name}-{steps}-steps"))  # fmt: skip


def longer_fits(folder: Path) -> None:
    """Three times the steps on a task of the letters that the base cannot do."""
    longer_study(folder, letter_task(folder, "median"), 300, "-k", "5", *EXACT)


def stories(folder: Path) -> None:
    """Adapters of stories260K, and studies on it."""
    folder.mkdir(exist_ok=True)
    (folder / "lora.toml").write_text(f"base = {json.dumps(str(STORIES))}\n", encoding="utf-8")
    tasks = {(form, theme): story_examples(form, theme, LEARNT + TESTED, "findings") for form, theme in STORY_TASKS}
    for form, theme in STORY_ADAPTERS:
        name, out = f"{form}-{theme}", folder / "pool" / "findings" / f"{form}-{theme}"
        seen = story_examples(form, theme, 300, "adapter", prompts(tasks.get((form, theme), [])))
        (folder / "findings").mkdir(exist_ok=True)
        write_jsonl(folder / "findings" / f"{name}.adapter.jsonl", name, "adapter", seen)
        if not out.exists():
            lora(folder, "train", "--data", f"findings/{name}.adapter.jsonl", "--rank", "8", "--dropout", "0",
                 "--steps", "100", "--lr", "5e-3", "-o", str(out))  # fmt: skip
    lora(folder, "pool", "sync", "--from", "pool")
    for form, theme in STORY_TASKS:
        relevant = [f"pool/findings/{form}-{theme}"] if (form, theme) in STORY_ADAPTERS else []
        study(folder, story_task(folder, form, theme), relevant, "average,ties,lego," + SYSTEMS, "-k", "3", "--metric",
              "nll", "--steps", "60", "--target-steps", "60", "--batch-size", "64")  # fmt: skip


def story_sequences(folder: Path) -> None:
    """Sequences on stories260K, after its studies."""
    for name, tasks in STORY_SEQUENCES.items():
        names = [story_task(folder, form, theme) for form, theme in tasks]
        sequence(folder, name, names, "--target-steps", "60", "--metric", "nll", "--batch-size", "64")


def longer_story_fits(folder: Path) -> None:
    """Three times the steps on a form of story on which no adapter was trained."""
    name = story_task(folder, "dream", "farm")
    longer_study(folder, name, 180, "-k", "3", "--metric", "nll", "--batch-size", "64")


PARTS: Mapping[str, tuple[Callable[[Path], None], ...]] = {
    "letters": (letters, letter_sequences, longer_fits),
    "stories": (stories, story_sequences, longer_story_fits),
}
"""What is made in each folder, one after another."""


def main() -> None:
    """Make what is not there, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=[step.__name__ for steps in PARTS.values() for step in steps])
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began = time.monotonic()
    for world, steps in PARTS.items():
        for step in steps:
            if not given.tables and given.only in (None, step.__name__) and (world != "stories" or STORIES.exists()):
                step(folder / world)
    print(f"all of it: {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    if given.only is None:
        print_studies(folder)
        print_sequences(folder)
        print_probes(folder)


if __name__ == "__main__":
    main()
