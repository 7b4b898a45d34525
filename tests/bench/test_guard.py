"""The guard of speed fails on a collapse, and only on one that lasts."""

import json
from pathlib import Path

import pytest

from tests.bench import guard


def test_only_a_collapse_that_lasts_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured = iter([1.9, 2.1, 1.2, 2.1, 2.5, 0.3])
    monkeypatch.setattr(guard, "ratio", lambda ours, peer: next(measured))
    names = ("slower", "once", "gone", "new")
    ways = {name: (lambda: None, lambda: None) for name in names}
    found, collapsed = guard.compared(ways, {"slower": 1.0, "once": 1.0, "gone": 1.0})
    assert found == {"slower": 1.9, "once": 1.2, "gone": 2.1, "new": 0.3}
    assert collapsed == ["gone"]
    assert capsys.readouterr().out.count("collapsed") == 1


def test_every_case_of_the_guard_has_a_stored_ratio(tmp_path: Path) -> None:
    assert set(json.loads(guard.TABLE.read_text())) == set(guard.cases(tmp_path))
