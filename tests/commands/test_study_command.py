"""`lora study` as docs/study.md tells it, on the demo's world; and killed at random moments."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.world import World
from tests.cli import ok
from tests.paths import ROOT

DOCS = ROOT / "docs" / "study.md"


@pytest.mark.slow
def test_the_examples_of_the_page_run(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_world.folder)
    monkeypatch.delenv("LORA_DB")
    ok("pool", "sync")
    text = DOCS.read_text(encoding="utf-8")
    [study_file] = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    Path("study.toml").write_text(study_file)
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(lora study --file .*?)`", text)
    reports = [line for line in lines if line.startswith("lora study report")]
    assert (len(lines), len(reports)) == (8, 3)
    for line in lines:
        if line in reports:
            continue
        told = ok(*shlex.split(line)[1:], "--json")
        document = json.loads(told.out)
        assert document["schema"] == "lora.study/1"
        assert document["rows"], line
        assert not document["failed"], line
    page, markdown, numbers = (ok(*shlex.split(line, comments=True)[1:]).out for line in reports)
    assert Path("study.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "study.html" in page
    assert "| adaptive | relevant |" in markdown
    assert json.loads(numbers)["schema"] == "lora.study.report/1"
    both, cells = ok("study", "collect", "both", "--json"), [*Path("both").glob("cells/*/result.json")]
    assert json.loads(both.out)["done"] == len(cells)
    study = {
        (row["system"], row["pool"]): row for row in json.loads(ok("study", "collect", "study", "--json").out)["rows"]
    }
    assert study["adaptive", "relevant"]["base_low"] > 0, "the pool holds an adapter of this task"
    assert study["adaptive", "relevant"]["noise_low"] > 0
    assert study["target", ""]["base_low"] > 0


@pytest.mark.slow
def test_a_killed_study_ends_as_one_in_peace() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak_study", "5", "3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"5 kills of a study, \d+ ends between them, up to \d+ cells there: nothing was lost", said), (
        said
    )
