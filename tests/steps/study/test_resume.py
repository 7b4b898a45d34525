"""What lets a killed study end with the same bits: answers in parts, and one load of the base for all cells."""

from pathlib import Path

import pytest

from lora_cli.models.ref import loaded_once, pin
from lora_cli.recipes import EvalOptions
from lora_cli.steps.evaluate.evaluate import System, answered
from lora_cli.task import load_task

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_interrupted_part_is_asked_again_whole_and_whole_parts_are_kept(calm: Path, tmp_path: Path) -> None:
    base, examples = pin(str(calm / "base"), device="cpu").load(), load_task(calm / "task.jsonl")
    rows, options = tmp_path / "rows.jsonl", EvalOptions(metric="exact", max_new_tokens=4, batch_size=3)
    systems = [System(name="cell")]
    first = answered(base, systems, examples, options, rows_path=rows, part=8)["cell"]
    assert [row.id for row in first] == [one.id for one in examples]
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:11]) + lines[11][:-20])
    again = answered(base, systems, examples, options, rows_path=rows, part=8)["cell"]
    assert [(row.value, row.log_likelihood, row.text) for row in again] == [
        (row.value, row.log_likelihood, row.text) for row in first
    ]
    kept = [old.seconds == new.seconds for old, new in zip(first, again, strict=True)]
    assert kept[:8] == [True] * 8
    assert not any(kept[8:])


def test_a_base_is_lent_to_every_load_of_its_version(calm: Path) -> None:
    ref = pin(str(calm / "base"), device="cpu")
    with loaded_once():
        one, other = ref.load(), pin(str(calm / "base"), name="another", device="cpu").load()
        assert one.model is other.model
        assert (one.name, other.name) == (ref.name, "another")
    assert ref.load().model is not one.model
