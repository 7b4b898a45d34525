"""A sequence of three tiny tasks: what is planned, refused, trained, merged and scored; a killed one ends alike."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from lora_cli.errors import DataError, LoraError, OutputError, UsageError
from lora_cli.executors.local import local
from lora_cli.formats.reader import OpenAdapter
from lora_cli.recipes import EvalOptions, TargetRecipe, TrainOptions
from lora_cli.settings import Settings, load
from lora_cli.steps.study.sequence.folder import SequenceFolder
from lora_cli.steps.study.sequence.plan import RULES, Plan
from lora_cli.steps.study.sequence.request import SequenceRequest
from lora_cli.steps.study.sequence.table import write_table
from tests.tiny_bases import examples, opened, saved

LORA = TrainOptions(rank=4, alpha=8.0, dropout=0.0)
NAMES = ("first", "second", "third")


def quiet(text: str) -> None:
    """Hear nothing."""


def task_files(folder: Path, n: int = 20) -> list[Path]:
    """Three tasks: to repeat the first, the second or the third letter of a word."""
    files = []
    for place, name in enumerate(NAMES):
        rows = []
        for one in examples(n, task=name):
            word = str(one.prompt)[-3:]
            rows.append({"id": one.id, "prompt": one.prompt, "completion": word[place] * 2})
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sequence") / "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return task_files(tmp_path_factory.mktemp("tasks"))


def settings_for(base: Path) -> Settings:
    return load({"base": str(base), "device": "cpu", "dtype": "fp32"})


def request(files: list[Path], **options: Any) -> SequenceRequest:
    usual: dict[str, Any] = {
        "tasks": files,
        "seeds": 1,
        "lora": LORA,
        "recipe": TargetRecipe(steps=8, every=4, lr=2e-2),
        "evaluation": EvalOptions(metric="nll"),
    }
    return SequenceRequest(**usual | options)


def planned(out: Path, base: Path, files: list[Path], **options: Any) -> Plan:
    found = request(files, **options).planned(settings_for(base), out=out, announce=quiet)
    found.write()
    return found.plan


def run(out: Path) -> list[str]:
    """Do what is left of a sequence in this process, and write its table; the names of the cells that were done."""
    folder = SequenceFolder(out)
    outcomes = [*local(folder, folder.plan.cells(), jobs=1)]
    assert [one.error for one in outcomes if one.error] == []
    write_table(folder)
    return [one.name for one in outcomes]


def plan_in(folder: Path) -> Plan:
    return SequenceFolder(folder).plan


def cell_folder(folder: Path, name: str) -> Path:
    return SequenceFolder(folder).cell(name)


def result(folder: Path, name: str) -> dict[str, Any]:
    found = SequenceFolder(folder).result(name)
    assert found is not None
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must be the same wherever and however often it is made."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "cost.json" and not file.name.endswith(".rows.jsonl")
    }


def test_a_plan_has_a_cell_per_rule_seed_and_later_task(base: Path, files: list[Path], tmp_path: Path) -> None:
    plan = planned(tmp_path / "s", base, files, seeds=2)
    cells = plan.cells()
    assert len(cells) == len({cell.name for cell in cells}) == 1 + 2 * (3 + len(RULES) * 2)
    before: set[str] = set()
    for cell in cells:
        assert {*cell.needs} <= before, cell
        before.add(cell.name)
    for rule in RULES:
        row = plan.row(rule, 1)
        assert row[0] == plan.row("alone", 1)[0]
        assert [cell.step for cell in row] == [1, 2, 3]
        assert row[2].needs[0] == row[1].name
    assert plan_in(tmp_path / "s") == plan


def test_each_half_of_a_task_is_a_file_and_no_example_is_in_both(base: Path, files: list[Path], tmp_path: Path) -> None:
    plan = planned(tmp_path / "s", base, files, held_out=0.25)
    for stage, file in zip(plan.tasks, files, strict=True):
        halves = [
            [json.loads(line) for line in (tmp_path / "s/data" / f"{stage.name}.{part}.jsonl").read_text().splitlines()]
            for part in ("train", "test")
        ]
        assert [len(half) for half in halves] == [15, 5]
        both = sorted([*halves[0], *halves[1]], key=lambda row: int(row["id"]))
        assert both == [json.loads(line) for line in file.read_text().splitlines()]


def test_the_name_of_a_cell_follows_what_decides_it(base: Path, files: list[Path], tmp_path: Path) -> None:
    def names(out: str, **options: Any) -> dict[tuple[str, int], str]:
        plan = planned(tmp_path / out, base, files, **options)
        return {(cell.rule, cell.step): cell.name for cell in plan.cells()}

    usual = names("usual")
    assert names("again") == usual
    ranked = names("ranked", rank="5")
    merges = {(rule, step) for rule in RULES[:-1] for step in (2, 3)}
    assert {key for key in usual if usual[key] != ranked[key]} == merges
    trained = names("trained", recipe=TargetRecipe(steps=9, every=4, lr=2e-2))
    assert {key for key in usual if usual[key] == trained[key]} == {("base", 0)}
    scored = names("scored", evaluation=EvalOptions(metric="exact"))
    assert not {*usual.values()} & {*scored.values()}
    turned = planned(tmp_path / "turned", base, files[::-1])
    assert {cell.name for cell in turned.cells()} & {*usual.values()} == set()


def test_a_folder_takes_more_rules_and_seeds_but_no_other_sequence(
    base: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    first = planned(out, base, files, rules="average")
    both = planned(out, base, files, rules="ties", seeds=3)
    assert (both.rules, both.seeds) == (("average", "ties"), 3)
    assert {cell.name for cell in first.cells()} < {cell.name for cell in both.cells()}
    with pytest.raises(OutputError, match="tasks is first, second, third there and first, second here"):
        planned(out, base, files[:2])
    with pytest.raises(OutputError, match=r"another sequence: recipe.steps is 8 there and 9 here"):
        planned(out, base, files, recipe=TargetRecipe(steps=9, every=4, lr=2e-2))
    with pytest.raises(OutputError, match=r"another sequence: tasks.1.test is sha256 \w{12}… there and sha256"):
        planned(out, base, files, held_out=0.4)
    with pytest.raises(OutputError, match="another sequence: rank is auto there and 3 here"):
        planned(out, base, files, rank="3")
    assert plan_in(out) == both
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is no sequence"):
        planned(tmp_path / "full", base, files)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rules": "averge"}, UsageError, "unknown rule 'averge'"),
        ({"rules": " , "}, UsageError, "needs a rule"),
        ({"rules": "lego-9"}, UsageError, "lego-9: the K of lego-K is a number of clusters, from 1 to 8 here"),
        ({"rules": "lego-0"}, UsageError, "lego-0: the K of lego-K is a number of clusters, from 1 to 8 here"),
        ({"rules": "lego-x"}, UsageError, "lego-x: the K of lego-K is a number of clusters, from 1 to 8 here"),
        ({"rank": "many"}, UsageError, "--rank is a number"),
        ({"held_out": 1.0}, UsageError, "--held-out is a share"),
        ({"held_out": 0.97}, DataError, "leave one to learn from"),
        ({"lora": replace(LORA, start=Path("x"))}, UsageError, "leave out --start"),
        ({"evaluation": EvalOptions(metric="choice")}, DataError, "no choices in 20 of 20 examples"),
    ],
)
def test_what_cannot_be_done_is_named_before_anything_is_written(
    base: Path, files: list[Path], tmp_path: Path, options: dict[str, Any], error: type[LoraError], said: str
) -> None:
    with pytest.raises(error, match=said):
        planned(tmp_path / "s", base, files, **options)
    assert not (tmp_path / "s").exists()


def test_wrong_files_are_named(base: Path, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two tasks or more"):
        planned(tmp_path / "s", base, files[:1])
    with pytest.raises(UsageError, match="1 test file for 3 tasks"):
        planned(tmp_path / "s", base, files, tests=files[:1])
    with pytest.raises(UsageError, match=r"has .* twice"):
        planned(tmp_path / "s", base, [files[0], files[1], files[0]])
    alike = [tmp_path / one / "same" / "first.jsonl" for one in "ab"]
    for file in alike:
        file.parent.mkdir(parents=True)
        file.write_bytes(files[0].read_bytes())
    with pytest.raises(UsageError, match="two tasks are called 'same-first'"):
        planned(tmp_path / "s", base, alike)
    (tmp_path / "small.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(DataError, match="2 examples cannot be split"):
        planned(tmp_path / "s", base, [files[0], tmp_path / "small.jsonl"])
    assert not (tmp_path / "s").exists()


def test_test_data_of_their_own_are_taken_and_what_is_learnt_too_is_said(
    base: Path, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "tests").mkdir()
    tests = [tmp_path / "tests" / file.name for file in files]
    for file, test in zip(files, tests, strict=True):
        test.write_text(file.read_text().replace("a", "h") if file is not files[0] else file.read_text())
    heard: list[str] = []
    plan = request(files, tests=tests).planned(settings_for(base), announce=heard.append).plan
    assert plan.tasks[0].train == plan.tasks[0].test
    assert heard[0] == "warning: 20 of 20 examples of first.jsonl are learnt too"


@pytest.fixture(scope="module")
def finished(base: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sequence by every rule and one seed, run in one go."""
    out = tmp_path_factory.mktemp("done") / "s"
    planned(out, base, files)
    assert len(run(out)) == 14
    return out


def adapter(folder: Path, rule: str, step: int) -> OpenAdapter:
    return opened(cell_folder(folder, plan_in(folder).row(rule, 0)[step - 1].name) / "adapter")


def dense(one: OpenAdapter) -> dict[str, torch.Tensor]:
    return {module: one.read(module).to(torch.float64).dense() for module in one.modules}


@pytest.mark.slow
def test_the_average_gives_every_task_the_same_weight(finished: Path) -> None:
    alone = [dense(adapter(finished, "alone", step)) for step in (1, 2, 3)]
    for module, merged in dense(adapter(finished, "average", 3)).items():
        mean = (alone[0][module] + alone[1][module] + alone[2][module]) / 3
        assert float((merged - mean).norm()) < 1e-5 * float(mean.norm())


@pytest.mark.slow
def test_lego_keeps_the_rank_of_one_lora_and_orthogonal_its_first_directions(finished: Path) -> None:
    for step in (2, 3):
        assert {module.rank for module in adapter(finished, "lego", step).modules.values()} == {LORA.rank}
    first, later = dense(adapter(finished, "alone", 1)), dense(adapter(finished, "orthogonal", 3))
    for module, before in first.items():
        u, _, vt = torch.linalg.svd(before)
        assert float(((later[module] - before) @ vt[0]).norm()) < 1e-5 * float(before.norm())
        assert float((u[:, 0] @ (later[module] - before)).norm()) < 1e-5 * float(before.norm())
        assert float((later[module] - before).norm()) > 0.1 * float(before.norm())


@pytest.mark.slow
def test_lego_takes_another_number_of_clusters(base: Path, files: list[Path], tmp_path: Path) -> None:
    planned(tmp_path / "s", base, files[:2], rules="lego-2,lego-6")
    run(tmp_path / "s")
    for clusters in (2, 6):
        cell = plan_in(tmp_path / "s").row(f"lego-{clusters}", 0)[1]
        merged = opened(cell_folder(tmp_path / "s", cell.name) / "adapter")
        assert {module.rank for module in merged.modules.values()} == {clusters}


@pytest.mark.slow
def test_plain_training_goes_on_from_the_lora_of_the_task_before(finished: Path) -> None:
    plan = plan_in(finished)
    first, second = plan.row("sequential", 0)[:2]
    record = json.loads((cell_folder(finished, second.name) / "adapter/run.json").read_text())
    [start] = [name for name in record["inputs"] if name.startswith(f"{first.name}/adapter@")]
    weights = json.loads((cell_folder(finished, first.name) / "adapter/run.json").read_text())["outputs"]
    assert record["inputs"][start] == weights["adapter_model.safetensors"]
    fresh = result(finished, plan.row("alone", 0)[1].name)
    assert record["results"]["loss_before"] != fresh["results"]["loss_before"]


@pytest.mark.slow
def test_the_table_holds_the_scores_of_the_cells(finished: Path) -> None:
    plan, table = plan_in(finished), json.loads((finished / "table.json").read_text())
    assert table["missing"] == []
    assert (table["tasks"], table["better"]) == ([*NAMES], "lower")
    for rule in RULES:
        of_seed = table["rules"][rule]["seeds"]["0"]
        for i, cell in enumerate(plan.row(rule, 0)):
            tasks = result(finished, cell.name)["tasks"]
            assert of_seed["a"][i] == [tasks[name]["value"] for name in NAMES]
            assert all(len(one["answers"]) == one["n"] == 10 for one in tasks.values())
        assert table["rules"][rule]["mean"] == of_seed
        assert of_seed["final"] == pytest.approx(sum(of_seed["a"][2]) / 3)
    assert (finished / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_is_never_done_twice_and_elsewhere_it_has_the_same_bytes(
    finished: Path, base: Path, files: list[Path], tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    folder = SequenceFolder(finished)
    assert [*local(folder, folder.plan.cells(), jobs=1)] == []
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before
    planned(tmp_path / "there", base, files)
    run(tmp_path / "there")
    assert contents(tmp_path / "there") == contents(finished)


@pytest.mark.slow
def test_data_that_changed_since_and_another_result_are_named(finished: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    cell = plan_in(folder).row("average", 0)[2]
    shutil.rmtree(cell_folder(folder, cell.name))
    with (folder / "data/third.test.jsonl").open("a") as file:
        file.write('{"id": "x", "prompt": "y", "completion": "z"}\n')
    [outcome] = local(SequenceFolder(folder), plan_in(folder).cells(), jobs=1)
    assert outcome.name == cell.name
    assert "third.test.jsonl has changed since the sequence was planned" in outcome.error
    assert write_table(SequenceFolder(folder)).missing == (cell.name,)
    (cell_folder(folder, cell.name) / "result.json").write_text("{}")
    with pytest.raises(DataError, match="not the result of this cell"):
        write_table(SequenceFolder(folder))


def _run(folder: str) -> None:
    run(Path(folder))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_undisturbed_bytes(
    finished: Path, base: Path, files: list[Path], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "peft", "transformers.models.llama.modeling_llama"])
    draw, kills, folder, most = random.Random(0), 0, 0, 1.0
    while kills < 20:  # a folder is usually enough
        out = tmp_path / str(folder)
        planned(out, base, files)
        ended = False
        while not ended:
            process = context.Process(target=_run, args=(str(out),))
            began = time.monotonic()
            process.start()
            process.join(draw.uniform(0.0, most) if kills < 20 else None)
            process.kill()
            process.join()
            ended = process.exitcode == 0
            kills += process.exitcode == -signal.SIGKILL
            assert ended or process.exitcode == -signal.SIGKILL, f"after {time.monotonic() - began:.1f} s"
            most *= 1.1
        assert contents(out) == contents(finished)
        folder, most = folder + 1, most / 2
