"""The adapters of a pool on a task: scores that are kept, answers that are not asked twice, adapters that fail."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_cli.algebra.lowrank import LowRank
from lora_cli.catalogue.sql import query
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.store import folder_ref
from lora_cli.models.ref import load
from lora_cli.recipes import EvalOptions, Recipe, TargetRecipe, TrainOptions
from lora_cli.steps.evaluate import groups as grouped
from lora_cli.steps.evaluate.evaluate import System, Updates, evaluate
from lora_cli.steps.fit.fit import Fitting, fit
from lora_cli.steps.select import trial
from lora_cli.steps.train.train import train
from lora_cli.task import load_task
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.tiny_bases import examples, opened, saved

N = 20
SHAPES = {f"model.layers.{layer}.self_attn.o_proj": (32, 32) for layer in range(2)}
NAMES = [f"pool/{name}" for name in ("skilled", "a", "b", "c", "d")]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task of 20 examples, and a pool: an adapter that knows the task, and four of noise."""
    folder = tmp_path_factory.mktemp("place")
    saved(folder / "base")
    lines = [{"id": one.id, "prompt": one.prompt, "completion": one.completion} for one in examples(N)]
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe(steps=60, lr=1e-2)
    (folder / "pool/skilled").mkdir(parents=True)
    train(load(str(folder / "base"), name="acme/tiny"), examples(64), folder / "pool/skilled",
          options=TrainOptions(rank=8, dropout=0.0), recipe=recipe)  # fmt: skip
    for seed, name in enumerate(NAMES[1:]):
        write_adapter(folder / name, random_factors(SHAPES, 2, seed=seed), lora_alpha=1)
    return folder


@pytest.fixture
def home(place: Path, own_home: Path) -> Path:
    """A copy of the place with a catalogue, as the working folder."""
    shutil.copytree(place, own_home, dirs_exist_ok=True)
    Path("lora.toml").write_text('base = "base"\nbase_aliases = ["acme/tiny"]\npool = "pool"\n')
    ok("pool", "sync")
    return own_home


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call asks for."""
    found: list[int] = []
    answers = grouped.answers

    def counted(base: Any, asked: Any, *rest: Any, **options: Any) -> Any:
        found.append(len(asked))
        return answers(base, asked, *rest, **options)

    monkeypatch.setattr(grouped, "answers", counted)
    return found


def stored() -> dict[str, tuple[float, int]]:
    rows = query(Path(os.environ["LORA_DB"]), "select id, value, n from adapter_scores where metric = 'exact'")[1]
    return {id: (value, n) for id, value, n in rows}


EVALUATE = ("pool", "evaluate", "--data", "task.jsonl", "--max-new-tokens", "4")
BY = ("select", "--data", "task.jsonl", "--max-new-tokens", "4", "-q", "--by")


def test_scores_are_those_of_single_evaluations_and_are_kept(home: Path, made: list[int]) -> None:
    told = json.loads(ok(*EVALUATE, "--json").out)
    base, task = load("base", name="acme/tiny"), load_task(Path("task.jsonl"))
    for row in told["rows"]:
        adapter = opened(Path(row["id"]))
        system = System(name=row["id"], updates=Updates(adapter), version=folder_ref(Path(row["id"])).pinned)
        _, alone = evaluate(base, [System(name="base"), system], task, EvalOptions(max_new_tokens=4))
        assert (row["value"], row["low"], row["high"], row["n"]) == (alone.value, alone.low, alone.high, N)
        assert row["log_likelihood"] == pytest.approx(alone.log_likelihood, rel=1e-5)
    assert {row["id"] for row in told["rows"]} == {*NAMES}
    order = [(-row["value"], -row["log_likelihood"]) for row in told["rows"]]
    assert order == sorted(order)
    assert told["rows"][0]["id"] == "pool/skilled"
    assert stored() == {row["id"]: (row["value"], N) for row in told["rows"]}
    assert (told["scored"], told["failed"], told["answers"]) == (5, {}, 5 * N)
    made.clear()
    again = json.loads(ok(*EVALUATE, "--json").out)
    assert (again["rows"], again["base_score"]) == (told["rows"], told["base_score"])
    record = json.loads(ok("runs", "show", json.loads(ok("runs", "list", "--json").out)["rows"][0]["id"], "--json").out)
    assert [name.partition(":")[0] for name in record["record"]["inputs"]] == ["base", "task.jsonl"]
    assert ok(*BY, "evaluation", "-k", "2").out.split() == [row["id"] for row in told["rows"][:2]]
    assert ok(*BY, "race", "-k", "1").out.split() == ["pool/skilled"]  # nothing is left to ask
    assert made == []
    assert "0 of 100 answers needed, 100 % saved · 5 scores in the catalogue already" in ok(*EVALUATE).err
    assert again["answers"] == 0
    [run] = [row["id"] for row in json.loads(ok("runs", "list", "--json").out)["rows"]]
    assert {line.split("\t")[1] for line in ok("runs", "answers", run, "-n", "120").out.splitlines()} >= {
        "base",
        "pool/a",
    }
    ok("runs", "rm", run)
    assert stored() == {}


def test_a_killed_evaluation_goes_on_where_it_was(home: Path, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_TOGETHER", 2)

    class Killed(BaseException):
        pass

    whole = trial._Counted.__call__
    most = 3 * N + 7

    def killed(self: Any, what: str, done: int, total: int) -> None:
        whole(self, what, done, total)
        if self._before + self._now >= most:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trial._Counted, "__call__", killed)
        ok(*EVALUATE)
    assert len(stored()) == 2
    [rows] = Path("lora-runs").glob("pool-evaluate-*.jsonl")
    before = rows.read_bytes()
    # As after a kill without warning: rows still lent, the last one of each file cut off.
    lines = before.splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:-30]) + lines[-30][:20])
    rows.with_name(f"{rows.stem}-lent.jsonl").write_bytes(b"".join(lines[-35:]) + b'{"system": "p')
    made.clear()
    ok(*EVALUATE)
    assert sum(made) == 5 * N - most
    assert len(stored()) == 5
    assert [file.name for file in Path("lora-runs").iterdir()] == [rows.name]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == len({(row["system"], row["id"]) for row in found}) == 6 * N


def test_adapters_that_cannot_be_judged_are_named_and_the_others_go_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pool/b/adapter_model.safetensors").write_bytes(b"changed since the sync")
    read = OpenAdapter.read

    def with_nan(self: OpenAdapter, module: str, *rest: Any) -> LowRank:
        update = read(self, module, *rest)
        return update.scaled(float("nan")) if self.ref.id == "pool/c" else update

    monkeypatch.setattr(OpenAdapter, "read", with_nan)
    told = ok(*EVALUATE, "--json")
    found = json.loads(told.out)
    assert found["rows"][0]["id"] == "pool/skilled"
    sound = {*NAMES} - {"pool/b", "pool/c"}
    assert {row["id"] for row in found["rows"]} == {*stored()} == sound
    assert {*found["failed"]} == {"pool/b", "pool/c"}
    assert "pool/c left out: not finite in fp32 on 20 examples of 20" in told.err
    assert "not a safetensors file" in found["failed"]["pool/b"]
    assert " · 2 failed · " in told.err
    only = ["--where", "id=pool/b"]
    assert "no adapter can be judged" in refused(5, *EVALUATE, *only)
    assert "no candidate can be judged" in refused(3, *BY, "evaluation", *only)
    chosen = json.loads(ok(*BY[:-2], "--json", "--explain", "--by", "race", "-k", "1").out)
    why = {row["id"]: row["why"] for row in chosen["explained"]}
    assert why["pool/c"] == "left out: not finite in fp32 on 5 examples of 5"


def test_eval_goes_on_beside_an_adapter_whose_weights_hold_nan(home: Path) -> None:
    factors = random_factors(SHAPES, 2, seed=9)
    next(iter(factors.values()))[0][0, 0] = float("nan")
    write_adapter(Path("broken"), factors, lora_alpha=1)
    ask = ("--data", "task.jsonl", "--max-new-tokens", "4", "--json")
    told = ok("eval", "broken", "pool/skilled", *ask)
    found = {row["system"]: row for row in json.loads(told.out)["rows"]}
    assert (found["broken"]["value"], found["broken"]["log_likelihood"]) == (0, None)
    assert found["broken"]["details"]["not_finite"] == N
    assert f"broken: numbers of the model are not finite on {N} of {N} prompts, which count as failures" in told.err
    assert "broken changed" not in told.err
    [judged] = [line for line in told.err.splitlines() if "better than base" in line or "difference to base" in line]
    assert "pool/skilled" in judged
    assert "broken" not in judged
    none = lora("eval", "broken", *ask)
    assert none[0] == 5
    assert json.loads(none[1])["rows"][1]["details"]["not_finite"] == N
    assert "no adapter can be judged" in none[2]
    alone = {row["system"]: row["value"] for row in json.loads(ok("eval", "pool/skilled", *ask).out)["rows"]}
    assert {name: found[name]["value"] for name in alone} == alone
    assert alone["pool/skilled"] > 0


def test_answers_are_asked_again_only_without_resume(home: Path, made: list[int]) -> None:
    ask = ("eval", "pool/a", "--data", "task.jsonl", "--max-new-tokens", "4", "-o", "rows.jsonl")
    ok("eval", "pool/b", *ask[2:])
    ok(*ask)
    made.clear()
    ok(*ask)
    ok(*ask, "--resume")
    assert made == []
    ok(*ask, "--no-resume")
    assert sum(made) == 2 * N
    systems = [json.loads(line)["system"] for line in Path("rows.jsonl").read_text().splitlines()]
    assert sorted(systems) == sorted(["base", "pool/a", "pool/b"] * N)


def test_scores_of_another_option_or_base_are_not_taken_and_imported_ones_are(home: Path, made: list[int]) -> None:
    ok(*EVALUATE, "--where", "id~skilled")
    made.clear()
    ok("pool", "evaluate", "--data", "task.jsonl", "--max-new-tokens", "3", "--where", "id~skilled")
    assert sum(made) == 2 * N
    made.clear()
    ok(*EVALUATE, "--where", "id~skilled", "--system", "answer")
    assert sum(made) == 2 * N
    # `lora eval` measures the same: its score counts too.
    made.clear()
    ok("eval", "pool/a", "--data", "task.jsonl", "--max-new-tokens", "4")
    label = query(Path(os.environ["LORA_DB"]), "select distinct task from adapter_scores")[1][0][0]
    Path("s.csv").write_text(f"adapter,{label}\npool/b,0.75\npool/c,0.25\n")
    ok("pool", "import", "s.csv", "--metric", "exact")
    made.clear()
    told = ok(*BY, "evaluation", "-k", "3", "--explain").err
    assert f"evaluation: {N} of {5 * N} answers needed, 80 % saved · 4 scores in the catalogue already" in told
    assert sum(made) == N  # pool/d alone: the base's answers are there
    weights = Path("base/model.safetensors").read_bytes()
    Path("base/model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    assert "2 scores in the catalogue already" in ok(*BY, "evaluation").err


def test_a_race_asks_for_a_part_and_finds_the_best(home: Path, made: list[int]) -> None:
    told = json.loads(ok(*EVALUATE, "--race", "-k", "1", "--json").out)
    assert [row["id"] for row in told["rows"]] == ["pool/skilled"]
    assert told["answers"] == 5 * 10 + 3 * 10 < told["answers_of_all"] == 5 * N
    assert [row["n"] for row in told["rows"]] == [N]
    assert len(stored()) == 3
    assert sum(made) == N + told["answers"]
    made.clear()
    chosen = ok(*BY, "race", "-k", "1", "--explain")
    assert chosen.out.split() == ["pool/skilled"]
    assert "race: 80 of 100 answers needed, 20 % saved" in chosen.err
    assert "out of the race after 10 of 20 examples" in chosen.err
    assert sum(made) == 0  # the answers of the first race are there
    # The others are asked what is missing.
    ok(*EVALUATE)
    assert sum(made) == 2 * 10


def test_a_sample_and_a_selection_choose_what_is_evaluated(home: Path) -> None:
    first = json.loads(ok(*EVALUATE, "--sample", "2", "--json").out)
    assert len(first["rows"]) == 2
    assert json.loads(ok(*EVALUATE, "--sample", "2", "--json").out)["rows"] == first["rows"]
    ok("select", "--by", "random", "-k", "2", "--seed", "3", "--name", "two")
    two = set(ok("select", "--by", "random", "-k", "2", "--seed", "3", "-q").out.split())
    assert {row["id"] for row in json.loads(ok(*EVALUATE, "--selection", "two", "--json").out)["rows"]} == two
    assert "no selection called 'x'" in refused(3, *EVALUATE, "--selection", "x")
    assert "exclude each other" in refused(2, *EVALUATE, "--selection", "two", "--where", "rank=1")


def test_two_evaluations_of_one_task_do_not_write_into_one_file(home: Path) -> None:
    from lora_cli.steps.select.rows import PoolRows

    ok(*EVALUATE, "--where", "id~skilled")
    [rows] = Path("lora-runs").glob("pool-evaluate-*.jsonl")
    with PoolRows(rows):
        assert "another process evaluates the same task" in refused(1, *EVALUATE)
    rows.write_text('{"a": 1}\n')
    assert "not a file of evaluation rows" in refused(1, *EVALUATE)


def test_a_target_is_trained_once_and_must_be_of_the_candidates_base(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.steps.train.request.TargetRecipe", lambda: TargetRecipe(steps=2))
    Path("small.jsonl").write_text("".join(Path("task.jsonl").read_text().splitlines(keepends=True)[:8]))
    by = ["select", "--by", "cosine", "-k", "1", "--data", "small.jsonl"]
    first = ok(*by)
    assert "no --target: a LoRA of rank 64 on small.jsonl" in first.err
    again = ok(*by)
    assert "it was trained before, and is up to date" in again.err
    assert again.out == first.out
    assert [one["command"] for one in json.loads(ok("runs", "list", "--json").out)["rows"]] == ["train", "train"]
    [folder] = Path("lora-runs").glob("train-*")
    assert ok("select", "--by", "cosine", "-k", "1", "--target", str(folder)).out == first.out
    write_adapter(Path("other"), random_factors(SHAPES, 2, seed=1), base="acme/other-model")
    message = refused(5, "select", "--by", "cosine", "--target", "other")
    assert "is for acme/other-model, the candidates are for" in message


@pytest.mark.slow
def test_a_scan_fits_segments_once_and_leaves_out_what_cannot_be_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.steps.select.by_scan.Recipe", lambda seed: Recipe(steps=3, seed=seed))
    Path("pool/b/adapter_model.safetensors").write_bytes(b"changed since the sync")
    by = ["select", "--by", "scan", "--data", "task.jsonl", "-k", "2", "--explain", "--json"]
    told = ok(*by)
    found = json.loads(told.out)
    assert "pool/skilled" in [row["id"] for row in found["rows"]]
    assert len({row["score"] for row in found["rows"]}) == 1
    assert "pool/b left out: not a safetensors file" in told.err
    why = {row["id"]: row["why"] for row in found["explained"]}
    assert why["pool/b"].startswith("left out: not a safetensors file")
    assert found["outside"]["not in the best fit"] == 4 - len(found["rows"])
    # The loss is that of `lora fit` over the same adapters.
    pool = [opened(Path(row["id"]), row["id"]) for row in found["rows"]]
    base, task = load("base", name="acme/tiny"), load_task(Path("task.jsonl"))
    alone = fit(base, pool, task, Fitting(recipe=Recipe(steps=3))).learnt.loss_after
    assert found["rows"][0]["score"] == pytest.approx(alone, rel=1e-5)
    again = ok(*by)
    assert again.out == told.out
    assert "scan: 0 fits over segments by rank" in again.err
    other = ok(*by, "--rank-by", "cosine", "--target", "pool/a")
    assert "fits over segments by cosine" in other.err
    assert "--by scan needs --data" in refused(2, "select", "--by", "scan")
    assert "it ranks nothing by itself" in refused(2, *by, "--rank-by", "scan")
