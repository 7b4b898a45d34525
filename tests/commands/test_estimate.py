"""What --dry-run says about bytes, memory and time, held against real runs."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_cli.models.ref import load_encoder
from lora_cli.task import load_task
from lora_cli.text import about
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.templates import tokenizer
from tests.tiny_bases import tiny_llama

WIDTH = 256
LAYER = {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.up_proj": (2 * WIDTH, WIDTH), "mlp.down_proj": (WIDTH, 2 * WIDTH)}
JOBS = {
    "merge": ["merge", "-m", "linear"],
    "ties": ["merge", "-m", "ties"],
    "fit": ["fit", "--data", "task.jsonl", "--steps", "2"],
    "train": ["train", "--data", "task.jsonl", "--steps", "2", "--rank", "8"],
    "bake": ["bake", "pool/two"],
    "eval": ["eval", "pool/one", "pool/two", "--data", "task.jsonl", "--max-new-tokens", "40"],
}
RUN = (
    "import atexit, sys\nfrom lora_cli.app import main\nfrom lora_cli.formats.run_record import peak_bytes\n"
    "atexit.register(lambda: print('peak', peak_bytes(), file=sys.stderr))\nmain()"
)


@pytest.fixture
def here(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, a task and a catalogued pool of two adapters."""
    made = tokenizer("characters")
    tiny_llama(
        vocab_size=len(made), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        max_position_embeddings=512, eos_token_id=made.eos_token_id,
    ).save_pretrained("base")  # fmt: skip
    made.save_pretrained("base")
    shapes = {f"model.layers.{n}.{name}": shape for n in range(4) for name, shape in LAYER.items()}
    for rank, name in ((8, "one"), (16, "two")):
        write_adapter(Path("pool", name), random_factors(shapes, rank, seed=rank), base="base")
    lines = [json.dumps({"prompt": "ab cd " * 30 + str(n), "completion": "dc ba " * 10}) for n in range(20)]
    Path("task.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("LORA_BASE", "base")
    ok("pool", "sync", "--from", "pool")
    return own_home


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("job", JOBS)
def test_a_dry_run_states_what_a_job_needs_and_makes_nothing(here: Path, job: str) -> None:
    before = files(here)
    document = json.loads(ok(*JOBS[job], "--dry-run", "--json").out)
    assert document["schema"] == f"lora.{JOBS[job][0]}.plan/1"
    needs = document["estimate"]
    parts = needs.pop("parts")
    assert set(needs) == {"read_bytes", "written_bytes", "memory_bytes", "seconds"}
    assert all(value > 0 for value in needs.values())
    if job == "fit":
        assert set(parts) == {"base", "adapters", "values", "gaps", "program"}
        assert sum(parts.values()) == needs["memory_bytes"]
    if job == "eval":
        assert set(parts) == {"base", "adapters", "rows", "program"}
        assert sum(parts.values()) == needs["memory_bytes"]
    lines = dict(line.split("\t")[:2] for line in ok(*JOBS[job], "--dry-run").out.splitlines()[-4:])
    assert list(lines) == ["read", "written", "memory", "time"]
    assert int(lines["read"]) == needs["read_bytes"]
    assert float(lines["time"]) > 0
    assert files(here) == before


def test_bytes_are_those_of_the_files(here: Path) -> None:
    needs = json.loads(ok("merge", "--rank", "sum", "--dry-run", "--json").out)["estimate"]
    weights = [Path("pool", name, "adapter_model.safetensors").stat().st_size for name in ("one", "two")]
    assert needs["read_bytes"] == sum(weights)
    merged = Path(ok("merge", "--rank", "sum").out.strip(), "adapter_model.safetensors").stat().st_size
    assert needs["written_bytes"] == pytest.approx(merged, rel=0.02)
    needs = json.loads(ok("bake", "pool/two", "--dry-run", "--json").out)["estimate"]
    assert needs["written_bytes"] == Path("base", "model.safetensors").stat().st_size


def test_more_work_takes_longer_by_the_estimate(here: Path) -> None:
    def seconds(*words: str) -> float:
        needs: dict[str, Any] = json.loads(ok(*words, "--dry-run", "--json").out)["estimate"]
        return float(needs["seconds"])

    assert seconds("train", "--data", "task.jsonl", "--steps", "4000") > 5 * seconds(*JOBS["train"], "--steps", "4")
    assert seconds(*JOBS["fit"], "--control", "target") > seconds(*JOBS["fit"])


def test_a_dry_run_of_an_evaluation_counts_what_is_asked_and_what_is_there(here: Path) -> None:
    def planned(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ok(*JOBS["eval"], *words, "--dry-run", "--json").out)
        return found

    task = load_task(Path("task.jsonl"))
    read = load_encoder("base").encode_all(task)
    plan = planned()
    assert (plan["systems"], plan["examples"], plan["prompts"], plan["stored"]) == (3, 20, 60, 0)
    assert plan["tokens_read"] == 3 * sum(len(one.ids) for one in read)
    assert plan["tokens_written_at_most"] == 3 * 20 * 40
    assert plan["batches"] == math.ceil(60 / plan["rows_per_batch"])
    assert planned("--batch-size", "7")["batches"] == math.ceil(60 / 7)
    assert planned("--metric", "nll")["tokens_written_at_most"] == 0

    ok(*JOBS["eval"])
    again = planned()
    assert (again["stored"], again["out"]) == (60, plan["out"])
    assert again["estimate"]["written_bytes"] == plan["estimate"]["written_bytes"]
    # These answers end at once, and the estimate is that of answers as long as the expected ones.
    size = Path(plan["out"]).stat().st_size
    assert size <= plan["estimate"]["written_bytes"] <= 3 * size
    lines = Path(plan["out"]).read_text().splitlines(keepends=True)
    Path(plan["out"]).write_text("".join(lines[:13]))
    assert planned()["stored"] == 13
    assert planned("--metric", "nll")["stored"] == 0


def test_a_dry_run_of_an_evaluation_prints_a_plan_alone(here: Path) -> None:
    for words in (("--csv",), ("-q",), ("--columns", "value")):
        assert "--dry-run prints a plan" in refused(2, *JOBS["eval"], "--dry-run", *words)
    assert "--harness goes with" in refused(2, "eval", "pool/one", "--harness", "arc_easy", "--dry-run")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about a second"), (3.4, "about 3 s"), (42, "about 40 s"), (140, "about 2 min"), (3100, "about 50 min"),
     (9000, "about 2 h"), (80000, "about 20 h")],
)  # fmt: skip
def test_an_estimated_time_is_round(seconds: float, words: str) -> None:
    assert about(seconds) == words


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_memory_is_estimated_within_a_factor_of_two(here: Path, job: str) -> None:
    def run(*words: str) -> tuple[str, int]:
        command = [sys.executable, "-c", RUN, *JOBS[job], *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout, int(done.stderr.rpartition("peak ")[2])

    said, _ = run("--dry-run", "--json")
    _, peak = run("-o", "out")
    assert peak / 2 <= json.loads(said)["estimate"]["memory_bytes"] <= 2 * peak
