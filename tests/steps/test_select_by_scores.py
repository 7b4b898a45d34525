"""Selections by stored scores: the lists that the numbers themselves give, whatever a file holds."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import Adapter, Score
from tests.cli import ok, refused

N, TASKS, K = 960, 62, 30


def adapter(id: str, number: int) -> Adapter:
    return Adapter(
        id=id, commit=f"{number:040x}", source="hub", repo=id, author=id.partition("/")[0], base="acme/tiny", rank=4
    )


def known(ids: list[str]) -> dict[str, Adapter]:
    rows = {id: adapter(id, number) for number, id in enumerate(ids)}
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        catalogue.add(rows.values())
    return rows


def hashed(row: Adapter) -> str:
    return hashlib.sha256(row.ref.pinned.encode()).hexdigest()


@pytest.fixture(scope="module")
def table() -> tuple[list[str], list[str], list[list[str]]]:
    """Ids, names of columns and cells as a wide file of the paper has them: few distinct scores, 2 % without one, a
    column given twice with other values, rows that are all empty."""
    rng = random.Random(7)
    ids = [f"author{rng.randrange(200)}/lora-{number}" for number in range(N)]
    names = [f"task{number}" for number in range(TASKS - 1)] + ["task5"]
    cells = [
        ["" if rng.random() < 0.01 else "NaN" if rng.random() < 0.01 else f"{rng.randrange(101) / 100}" for _ in names]
        for _ in ids
    ]
    cells[3] = cells[500] = [""] * len(names)
    return ids, names, cells


def test_a_wide_table_gives_the_lists_that_its_numbers_give(
    table: tuple[list[str], list[str], list[list[str]]],
) -> None:
    ids, names, cells = table
    rows = known(ids)
    lines = [",".join(["", "lora", *names])]
    lines += [",".join([str(place), id, *row]) for place, (id, row) in enumerate(zip(ids, cells, strict=True))]
    Path("wide.csv").write_text("\n".join(lines) + "\n")
    told = ok("pool", "import", "wide.csv", "--id-column", "lora").err
    assert "'task5' comes again and is the task 'task5.1'" in told
    for place, name in [*[*enumerate(names)][2:-1:12], (TASKS - 1, "task5.1")]:
        scored = {id: float(row[place]) for id, row in zip(ids, cells, strict=True) if row[place] not in ("", "NaN")}
        expected = sorted(scored, key=lambda id: (-scored[id], hashed(rows[id])))[:K]
        chosen = ok("select", "--by", "evaluation", "--task", name, "-k", str(K), "-q")
        assert chosen.out.split() == expected
        assert f"{len(scored)} scores by score, higher is better" in chosen.err
        assert f"{N - len(scored)} adapters without one left out" in chosen.err
    assert (name, place) == ("task5.1", TASKS - 1)
    by_file = sorted(scored, key=lambda id: -scored[id])[:K]  # a stable sort of the file's order
    assert ok("select", "--by", "evaluation", "--task", name, "-q", "--ties", "file").out.split() == by_file
    by_id = sorted(scored, key=lambda id: (-scored[id], id))[:K]
    assert ok("select", "--by", "evaluation", "--task", name, "-q", "--ties", "id").out.split() == by_id


def imported(*lines: str, metric: str = "") -> None:
    Path("s.csv").write_text("\n".join(lines) + "\n")
    ok("pool", "import", "s.csv", *(["--metric", metric] if metric else []))


def test_restrictions_and_explanations_hold() -> None:
    known([f"{author}/{n}" for author in ("ann", "bob") for n in range(3)])
    imported("adapter,x", "ann/0,.9", "ann/1,.8", "ann/2,.7", "bob/0,.6", "bob/1,.6")
    of_x = ["select", "--by", "evaluation", "--task", "x"]
    assert ok(*of_x, "-k", "2", "--max-per-author", "1", "-q").out.split()[0] == "ann/0"
    assert ok(*of_x, "-k", "2", "--where", "author=bob", "-q").out.split() != ["ann/0", "ann/1"]
    told = json.loads(ok(*of_x, "-k", "2", "--max-per-author", "1", "--explain", "--json").out)
    why = {row["id"]: row["why"] for row in told["explained"]}
    assert why["ann/0"] == "number 1 of 5 by evaluation"
    assert why["ann/1"] == "--max-per-author 1: better ones of this author were taken"
    loser = ({"bob/0", "bob/1"} - {row["id"] for row in told["rows"]}).pop()
    assert why[loser] == "the score of the last one taken; a hash of the names decided"
    assert told["outside"] == {"without a score on x": 1}
    assert (told["task"], told["by"], told["rows"][0]["score"]) == ("x", "evaluation", 0.9)


def test_the_lowest_surprise_is_the_best_and_several_metrics_must_be_told_apart() -> None:
    known(["ann/a", "bob/b", "cy/c"])
    imported("adapter,x", "ann/a,2", "bob/b,.5", "cy/c,1", metric="nll")
    assert ok("select", "--by", "evaluation", "--task", "x", "-k", "2", "-q").out.split() == ["bob/b", "cy/c"]
    imported("adapter,x", "ann/a,1", metric="exact")
    assert "x has scores by nll and exact" in refused(2, "select", "--by", "evaluation", "--task", "x")
    by = ["select", "--by", "evaluation", "--task", "x", "-q"]
    assert ok(*by, "--metric", "exact").out.split() == ["ann/a"]
    assert "x has no scores by score" in refused(2, *by, "--metric", "score")
    imported("adapter,gsm8k", "ann/a,1")
    assert "did you mean 'gsm8k'" in refused(3, "select", "--by", "evaluation", "--task", "gsm8")
    known(["eve/e"])
    assert "no candidate has a score" in refused(3, *by, "--metric", "nll", "--where", "author=eve")


def test_likelihoods_decide_between_equal_scores_and_the_newest_score_counts() -> None:
    rows = known(["ann/a", "bob/b", "cy/c", "dan/d"])
    db = Path(os.environ["LORA_DB"])

    def measured(id: str, value: float, likelihood: float, commit: str = "") -> None:
        pinned = f"{id}@{commit or rows[id].commit}"
        score = Score(system=id, metric="exact", value=value, low=0, high=1, n=4, log_likelihood=likelihood)
        with runs.recorded(db, "eval", {"data": "t.jsonl"}, {}, None) as run:
            runs.add_scores(db, run, [score], {id: [pinned]}, "f" * 64)

    measured("ann/a", 0.5, -2.0)
    measured("bob/b", 0.5, -1.0)
    measured("cy/c", 0.1, -1.0)
    measured("cy/c", 0.5, -1.5)
    measured("cy/c", 0.9, -0.1, commit="e" * 40)
    imported("adapter,t.jsonl@ffffffff", "dan/d,.5", metric="exact")
    of_t = ["select", "--by", "evaluation", "--task", "t.jsonl@ffffffff"]
    assert ok(*of_t, "-q").out.split() == ["bob/b", "cy/c", "ann/a", "dan/d"]
    told = ok(*of_t, "-k", "1", "--explain").err
    assert "the score of the last one taken; --ties likelihood decided" in told


def test_options_that_a_method_does_not_take_are_named() -> None:
    known(["ann/a"])
    assert "--by random takes no --task" in refused(2, "select", "--by", "random", "--task", "x")
    assert "--by rank takes no --metric" in refused(2, "select", "--by", "rank", "--metric", "nll")
    assert "--by rank takes no --ties" in refused(2, "select", "--by", "rank", "--ties", "id")
    assert "--by rank takes no --rank-by" in refused(2, "select", "--by", "rank", "--rank-by", "downloads")
    assert "--by evaluation takes no --target" in refused(2, "select", "--by", "evaluation", "--target", "x")
    assert "--by race needs --data or --task" in refused(2, "select", "--by", "race")
    assert "--by cosine needs --target or --data" in refused(2, "select", "--by", "cosine")
    both = ["select", "--by", "cosine", "--target", "x", "--data", "y"]
    assert "--target and --data exclude each other" in refused(2, *both)
    file = ["select", "--by", "evaluation", "--data", "t.jsonl", "--ties", "file"]
    assert "--ties file is for stored scores" in refused(2, *file)
