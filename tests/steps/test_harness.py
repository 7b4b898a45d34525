"""Tasks of lm-evaluation-harness: its numbers, on one loaded base, for the base and for adapters."""

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_cli.errors import NetworkError
from lora_cli.harness_options import HarnessOptions
from lora_cli.models.harness import _named, load_tasks
from lora_cli.models.ref import BaseRef
from lora_cli.scores import paired_difference, wilson
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.tiny_bases import characters, saved, tiny_llama

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]
SHAPES = {"model.layers.0.mlp.up_proj": (48, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
DOCUMENTS = [
    {"q": f"{one}{two}", "options": ["xy", f"z{two}", one * 3], "gold": place % 3, "answer": one}
    for place, (one, two) in enumerate(zip("abcdefgh", "stuvwxyz", strict=True))
]
CHOICE = """
output_type: multiple_choice
doc_to_text: "Q: {{q}} A:"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: answer
generation_kwargs: {until: ["z"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} is {{answer}}"
metric_list:
  - {metric: word_perplexity}
"""
KINDS = {"pick": CHOICE, "write": WRITTEN, "read": PERPLEXITY}


@pytest.fixture
def here(own_home: Path) -> Path:
    """A working folder with a base, two adapters and three task files."""
    saved(own_home / "base")
    for seed, name in enumerate(("one", "two")):
        write_adapter(own_home / name, random_factors(SHAPES, 4, seed=seed), base="base")
    Path("lora.toml").write_text('base = "base"\n')
    data = own_home / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in DOCUMENTS))
    for name, body in KINDS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        Path(f"{name}.yaml").write_text(f"{head}test_split: test\nfewshot_split: test\n{body}")
    return own_home


def by_the_harness_itself(task: str, model: Any, fewshot: int | None = None) -> Mapping[str, Any]:
    """The results of `lm_eval` for a task file and a model that it loads or is given, without our classes."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    given = {} if isinstance(model, str) else {"tokenizer": characters()}
    loaded = HFLM(pretrained=model, device="cpu", batch_size=3, **given)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(loaded, tasks=[f"{task}.yaml"], task_manager=manager, num_fewshot=fewshot)
    return dict(found["results"][task])


@pytest.mark.parametrize(
    ("task", "fewshot"), [("pick", 2), ("read", None), pytest.param("write", None, marks=pytest.mark.slow)]
)
def test_the_numbers_are_those_of_the_harness(here: Path, task: str, fewshot: int | None) -> None:
    words = [] if fewshot is None else ["--fewshot", str(fewshot)]
    told = ok("eval", "one", "--harness", f"{task}.yaml", "--trust-task", "--batch-size", "3", "--json", *words)
    rows = json.loads(told.out)["rows"]
    assert "it/s" not in told.err
    theirs = {"base": by_the_harness_itself(task, str(here / "base"), fewshot)}
    merged = tiny_llama()
    for name, (b, a) in random_factors(SHAPES, 4, seed=0).items():
        merged.get_submodule(name).weight.data += b @ a
    theirs["one"] = by_the_harness_itself(task, merged, fewshot)
    assert {row["system"] for row in rows} == {"base", "one"}
    for row in rows:
        expected = theirs[row["system"]]
        assert row["value"] == pytest.approx(expected[f"{row['metric']},none"], rel=1e-4)
        stderr = expected[f"{row['metric']}_stderr,none"]
        assert row["stderr"] == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-3))
        assert (row["n"], row["task"]) == (len(DOCUMENTS), task)
    if task == "read":
        assert theirs["one"]["word_perplexity,none"] != pytest.approx(theirs["base"]["word_perplexity,none"], rel=0.01)
        assert {row["delta"] for row in rows} == {None}


@pytest.mark.slow
def test_generated_text_is_greedy_whatever_penalty_the_base_suggests(here: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    def written() -> list[str]:
        kwargs = {"until": ["z"], "max_gen_toks": 12, "do_sample": False}
        asked = [SimpleNamespace(args=(line["q"], kwargs)) for line in DOCUMENTS]
        return list(HFLM(pretrained=str(here / "base"), device="cpu").generate_until(asked, disable_tqdm=True))

    greedy = written()
    config = here / "base" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 5.0}))
    assert all(penalised != text for penalised, text in zip(written(), greedy, strict=True))
    lines = [line | {"answer": text} for line, text in zip(DOCUMENTS, greedy, strict=True)]
    (here / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = here / "write.yaml"
    task.write_text(task.read_text().replace("max_gen_toks: 4", "max_gen_toks: 12"))
    told = ok("eval", "one", "--harness", "write.yaml", "--trust-task", "--json")
    assert [row["value"] for row in json.loads(told.out)["rows"] if row["system"] == "base"] == [1.0]


def test_scores_are_paired_stored_and_not_computed_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval", "one", "two", "--harness", "pick.yaml,write.yaml", "--trust-task", "-o", "rows.jsonl", "--json")
    told = ok(*words)
    document = json.loads(told.out)
    stored = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    values = {(row["system"], one["task"], one["metric"]): one["values"] for row in stored for one in row["measured"]}
    assert len(stored) == 6
    for row in document["rows"]:
        each = values[row["system"], row["task"], row["metric"]]
        assert row["value"] == pytest.approx(sum(each) / len(DOCUMENTS))
        assert (row["low"], row["high"]) == wilson(round(sum(each)), len(each))
        if row["system"] != "base":
            expected = paired_difference(each, values["base", row["task"], row["metric"]])
            assert (row["delta"], row["p"]) == (expected.delta, expected.p)
            assert row["p_holm"] >= row["p"]
    with closing(sqlite3.connect(os.environ["LORA_DB"])) as db:
        found = db.execute("SELECT system, task, metric, value, n, details FROM scores").fetchall()
        [(command, record)] = db.execute("SELECT command, record FROM runs").fetchall()
    assert {tuple(one[:5]) for one in found} == {
        (row["system"], row["task"], row["metric"], row["value"], row["n"]) for row in document["rows"]
    }
    assert {json.loads(one[5])["stderr"] for one in found} == {row["stderr"] for row in document["rows"]}
    assert (command, json.loads(record)["results"]["scores"]) == ("harness", document["rows"])

    # What is there is taken: no base is loaded.
    monkeypatch.setattr(BaseRef, "load", None)
    assert json.loads(ok(*words).out)["rows"] == document["rows"]
    with pytest.raises(TypeError, match="not callable"):
        ok(*words, "--no-resume")
    Path("rows.jsonl").write_text("mine\n")
    refused(1, *words, "--no-resume")
    assert Path("rows.jsonl").read_text() == "mine\n"


def test_other_data_is_another_task(here: Path) -> None:
    options = HarnessOptions(harness="pick.yaml", trust_task=True)
    [first], [again] = load_tasks(options), load_tasks(options)
    [fewer] = load_tasks(HarnessOptions(harness="pick.yaml", trust_task=True, limit=3))
    with Path("data.jsonl").open("a") as file:
        file.write(json.dumps(DOCUMENTS[0]) + "\n")
    [more] = load_tasks(options)
    assert first.sha256 == again.sha256
    assert len({first.sha256, fewer.sha256, more.sha256}) == 3


def test_the_first_examples_and_those_in_front(here: Path) -> None:
    quick = ("eval", "one", "--harness", "pick.yaml", "--trust-task", "--json")
    first = json.loads(ok(*quick, "--limit", "3").out)["rows"]
    assert {row["n"] for row in first} == {3}
    with closing(sqlite3.connect(os.environ["LORA_DB"])) as db:
        assert db.execute("SELECT DISTINCT task FROM scores").fetchall() == [("pick[:3]",)]
    [task] = load_tasks(HarnessOptions(harness="pick.yaml", trust_task=True, fewshot=2))
    assert task.loaded["tasks"]["pick"].config.num_fewshot == 2


def test_an_adapter_without_effect_is_a_warning(here: Path) -> None:
    factors = {"model.layers.0.mlp.up_proj": (torch.zeros(48, 2), torch.ones(2, 32))}
    write_adapter(here / "idle", factors, base="base")
    told = ok("eval", "idle", "one", "--harness", "read.yaml", "--trust-task")
    assert "warning: idle gives the base's values in every metric" in told.err
    assert "warning: one" not in told.err


def test_a_task_file_is_code_and_runs_only_if_it_is_trusted(here: Path) -> None:
    Path("mark.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef text(doc):\n    return doc['q']\n")
    body = Path("pick.yaml").read_text().replace('"Q: {{q}} A:"', "!function mark.text")
    Path("code.yml").write_text(body)
    told = refused(2, "eval", "one", "--harness", "code.yml")
    assert "code.yml is a task file, and a task file is code" in told
    assert "--trust-task" in told
    assert not Path("ran").exists()
    ok("eval", "one", "--harness", "code.yml", "--trust-task")
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--harness", "absent.yaml", "--trust-task"], 1, "no such file: absent.yaml"),
        (["--harness", "bad.yaml", "--trust-task"], 5, "lm-evaluation-harness fails on bad.yaml: "),
        (["--harness", "pick.yaml,same.yaml", "--trust-task"], 2, "the task 'pick' is named twice"),
        (["--harness", "pick.yaml,pick.yaml", "--trust-task"], 2, "names 'pick.yaml' twice"),
        (["--harness", "pick.yaml", "--metric", "nll"], 2, "--harness goes with --limit, --fewshot"),
        (["--harness", "pick.yaml", "--data", "data.jsonl"], 2, "--harness goes with --limit, --fewshot"),
        (["--harness", "pick.yaml", "--system", "Be brief."], 2, "--harness goes with --limit, --fewshot"),
        (["--limit", "3"], 2, "are for --harness"),
        (["--harness", ","], 2, "--harness names no task"),
        (["--harness", "pick.yaml", "--trust-task", "--baseline", "two"], 3, "no system 'two'"),
        (["--harness", "pick.yaml", "--trust-task", "-o", "lora.toml"], 1, "not a file of rows"),
    ],
)
def test_what_cannot_be_scored_is_a_line(here: Path, words: list[str], code: int, said: str) -> None:
    shutil.copy("pick.yaml", "same.yaml")
    Path("bad.yaml").write_text(Path("pick.yaml").read_text().replace("data.jsonl", "gone.jsonl"))
    told = refused(code, "eval", "one", *words)
    assert said in told
    assert Path("lora.toml").read_text() == 'base = "base"\n'


def test_without_the_harness_the_extra_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = refused(2, "eval", "one", "--harness", "pick.yaml", "--trust-task")
    assert "--harness needs lm-evaluation-harness" in told
    assert "pip install 'lora-cli[harness]'" in told


@pytest.mark.slow
def test_a_name_that_the_harness_does_not_know(here: Path) -> None:
    told = refused(3, "eval", "one", "--harness", "helaswag")
    assert "lm-evaluation-harness has no task 'helaswag'\n  did you mean 'hellaswag'?" in told


def test_data_that_cannot_be_downloaded_is_a_matter_of_the_network() -> None:
    with pytest.raises(NetworkError, match=r"^the data of hellaswag: Couldn't reach it$"), _named("hellaswag"):
        raise ConnectionError("Couldn't reach it")
