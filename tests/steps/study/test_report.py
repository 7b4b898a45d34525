"""The report of a small study that was really done: its numbers, what it names, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cli.reports.marks import Mark, cost_chart
from lora_cli.steps.study.table import score_of
from tests.cli import ok, refused
from tests.reports.reading import Read
from tests.reports.test_page import HOSTILE
from tests.small_study import results

pytestmark = pytest.mark.usefixtures("one_thread")


def report(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("study", "report", "calm", *words, "--json").out)
    return found


def values(system: str, pool: str) -> Any:
    """The loss of each test example, in the mean over seeds: (examples,), in float64."""
    found = [json.loads(data) for name, data in results(Path("calm")).items() if name != "table"]
    cells = [one for one in found if (one["system"], one["pool"]) == (system, pool)]
    return np.mean([[answer["value"] for answer in one["answers"]] for one in cells], axis=0)


def test_scores_and_gains_are_those_of_the_cells(place: Path) -> None:
    found = report()
    assert found["schema"] == "lora.study.report/1"
    assert (found["cells"], found["done"], found["n"], found["missing"], found["failed"]) == (15, 15, 12, [], {})
    for row in found["scores"]:
        ours = values(row["system"], row["pool"])
        assert row["value"] == pytest.approx(ours.mean(), rel=1e-12)
        assert row["low"] <= row["value"] <= row["high"]
    places = {"base": ("base", ""), "target": ("target", "")}
    assert [len(found["gains"][control]) for control in ("base", "target", "noise")] == [8, 8, 2]
    for control, rows in found["gains"].items():
        for row in rows:
            pairs = values(*places.get(control, (row["system"], "noise"))) - values(row["system"], row["pool"])
            assert row["gain"] == pytest.approx(pairs.mean(), rel=1e-9), "less loss is a gain"
            assert row["spread"] == pytest.approx(pairs.std(ddof=1), rel=1e-9)
            assert (row["wins"], row["losses"]) == ((pairs > 0).sum(), (pairs < 0).sum())
            assert row["p"] <= row["p_holm"] <= min(1.0, row["p"] * len(rows))
            if pairs.any():
                expected = (1.959964 + 0.841621) ** 2 * pairs.var(ddof=1) / pairs.mean() ** 2
                assert row["needed"] == pytest.approx(max(6, np.ceil(expected)), rel=1e-6)
            else:
                assert row["needed"] is None


@pytest.mark.parametrize(("seeds", "kind"), [([0.0, 1.0, 1.0], "share"), ([0.0, 0.5, 1.0], "mean")])
def test_right_and_wrong_answers_keep_wilsons_interval_while_seeds_agree(seeds: list[float], kind: str) -> None:
    assert score_of("share", dict(zip("abc", seeds, strict=True))) == kind
    assert score_of("mean", {"a": 0.3}) == "mean"


def test_costs_are_those_of_a_cell_with_its_shared_work(place: Path) -> None:
    [row] = [row for row in report()["scores"] if row["system"] == "target"]
    files = [*Path("calm").glob("cells/target-*/cost.json"), *Path("calm").glob("shared/target-*.cost.json")]
    costs = [json.loads(file.read_text()) for file in files]
    assert len(costs) == 4
    assert row["seconds"] == pytest.approx(sum(one["seconds"] for one in costs) / 2)
    assert row["tokens"] == sum(one["tokens"] for one in costs) / 2
    files[0].unlink()
    assert [row["seconds"] for row in report()["scores"] if row["system"] == "target"] == [None]


def test_every_adapter_is_named_at_its_commit_with_its_cells(place: Path) -> None:
    used = {f"{one['id']}@{one['commit']}": one for one in report()["adapters"]}
    made: dict[str, set[str]] = {}
    for name, data in results(Path("calm")).items():
        for pinned in {} if name == "table" else json.loads(data)["adapters"]:
            made.setdefault(pinned, set()).add(name)
    assert {pinned: set(one["cells"]) for pinned, one in used.items()} == made
    assert all(len(one["sha256"]) == 64 for one in used.values())


def test_the_page_is_written_and_the_same_again(place: Path) -> None:
    told = ok("study", "report", "calm", "-o", "study.html")
    assert told.out == "study.html\n"
    first = Path("study.html").read_bytes()
    shutil.copytree("calm", "elsewhere")
    ok("study", "report", "elsewhere", "-o", "study.html")
    assert Path("study.html").read_bytes() == first
    read = Read(first)
    assert report()["verdict"]["summary"] in " ".join(read.texts)
    assert sum((given.get("class") or "") in ("positive", "negative") and tag == "rect" and "fill-opacity" in given
               for tag, given in read.elements) == 3 * 2 * 2  # fmt: skip
    assert ok("study", "report", "calm", "--markdown").out.startswith("**Recycling")
    ok("study", "report", "calm", "--markdown", "-o", "study.md")
    assert Path("study.md").read_text() == ok("study", "report", "calm", "--markdown").out


def test_cells_that_failed_or_are_missing_are_named(place: Path) -> None:
    failed, missing = (next(Path("calm").glob(f"cells/ties-random-s{seed}-*")) for seed in (0, 1))
    for cell in (failed, missing):
        (cell / "result.json").unlink()
    (failed / "failed.json").write_text(json.dumps({"cell": failed.name, "error": "out of memory"}))
    told = ok("study", "report", "calm", "-o", "study.html")
    assert "13 of 15 cells done, 1 failed, 1 not tried" in told.err
    texts = " ".join(Read(Path("study.html").read_bytes()).texts)
    assert f"{failed.name}: out of memory" in texts
    assert missing.name in texts
    found = report()
    assert (found["failed"], found["missing"]) == ({failed.name: "out of memory"}, [missing.name])
    assert "ties" not in {row["system"] for row in found["scores"] if row["pool"] == "random"}


def test_answers_of_strangers_are_text(place: Path) -> None:
    # A result with half a surrogate is no JSON, and is refused.
    texts = [text.encode(errors="replace").decode() for text in (*HOSTILE, "z" * 10_000)]
    for file in Path("calm").glob("cells/*/result.json"):
        found = json.loads(file.read_text())
        for i, answer in enumerate(found["answers"]):
            answer["text"] = texts[i % len(texts)]
        found["licences"] = dict.fromkeys(found["licences"], HOSTILE[0])
        file.write_text(json.dumps(found))
    ok("study", "report", "calm", "-o", "study.html")
    read = Read(Path("study.html").read_bytes())
    assert {tag for tag, _ in read.elements} & {"script", "img", "i", "b"} == set()
    assert read.others == []
    assert HOSTILE[0] in "".join(read.texts)


def test_what_is_no_study_or_has_no_result_is_refused(place: Path) -> None:
    assert "-o FILE.html" in refused(2, "study", "report", "calm")
    assert "exclude each other" in refused(2, "study", "report", "calm", "--markdown", "--json")
    assert "pool" in refused(1, "study", "report", "pool", "--json")
    file = next(Path("calm").glob("cells/base-*/result.json"))
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "answers": [{"id": "1"}]}))
    assert "not the result of this cell" in refused(1, "study", "report", "calm", "-o", "study.html")
    for result in Path("calm").glob("cells/*/result.json"):
        result.unlink()
    assert "no cell of this study is done" in refused(3, "study", "report", "calm", "-o", "study.html")
    assert not Path("study.html").exists()


def test_a_page_takes_no_place_of_the_studys_own_files(place: Path) -> None:
    before = (place / "calm" / "study.json").read_bytes()
    error = refused(1, "study", "report", "calm", "-o", "calm/study.json")
    assert "calm/study.json: in a study's folder a report is called *.html or *.md" in error
    assert (place / "calm" / "study.json").read_bytes() == before
    ok("study", "report", "calm", "-o", "calm/report.html")
    ok("study", "report", "calm", "--markdown", "-o", "calm.txt")
    ok("study", "report", "calm", "-o", "calm.txt")


def test_a_users_own_file_is_not_replaced_by_a_report(place: Path) -> None:
    Path("README.md").write_text("# Mine\n")
    for form in ("--markdown", "--json"):
        assert "README.md exists and is no report" in refused(1, "study", "report", "calm", form, "-o", "README.md")
    assert Path("README.md").read_text() == "# Mine\n"


def test_no_name_lies_on_the_numbers_of_an_axis() -> None:
    marks = [
        Mark("base", 0.0, 0.0, 0.1, is_control=True, cost=1.0),
        Mark("average", 0.0, 0.0, 0.1, is_control=False, cost=1.4),
        Mark("adaptive", 0.8, 0.7, 0.9, is_control=False, cost=10.0),
    ]
    chart = str(cost_chart("costs", marks, "s"))
    names = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="(start|end)">([^<]+)<', chart)
    assert [name for _, _, name in names] == ["average", "adaptive"]
    assert all(float(x) - (len(name) * 6.5 if anchor == "end" else 0) >= 34 for x, anchor, name in names)
