"""Another revision of a base is another base: judged, shown, merged only with its like, written, and loaded."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session
from peft import LoraConfig

from lora_cli.catalogue import migrations
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.exports.vllm import vllm
from lora_cli.formats.base_names import at_revision, canonical_base, same_base, split_revision
from lora_cli.formats.config import parse_config
from lora_cli.models.ref import pin
from lora_cli.steps.bake.bake import find_base
from lora_cli.steps.bases import skeleton_here
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files
from tests.hostile.corpus import GOOD_CONFIG
from tests.tiny_bases import examples, saved

PYTHIA, FIRST, LAST = "EleutherAI/pythia-70m", "step1000", "step143000"
SHAPES = {"model.layers.0.mlp.up_proj": (48, 32)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pool(own_home: Path) -> Path:
    """Two adapters of one revision of Pythia, one of another, and one of no revision in particular."""
    revisions = {"first": FIRST, "again": FIRST, "last": LAST, "plain": None}
    for seed, (name, revision) in enumerate(revisions.items()):
        write_adapter(own_home / "pool" / name, random_factors(SHAPES, 3, seed=seed), base=PYTHIA, revision=revision)
    return own_home / "pool"


def rows(*conditions: str, base: str = "") -> dict[str, dict[str, Any]]:
    wanted = [word for condition in conditions for word in ("--where", condition)]
    wanted += ["--base", base] if base else []
    listed = json.loads(ok("pool", "list", "--json", *wanted).out)["rows"]
    return {row["id"].removeprefix("pool/"): row for row in listed}


def usable(base: str = "") -> set[str]:
    return {name for name, row in rows(base=base).items() if row["status"] == "ok"}


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "revision"),
    [(None, ""), ("", ""), ("main", ""), (" main ", ""), (FIRST, FIRST), ("refs/pr/3", "refs/pr/3")],
)
def test_the_configurations_revision_is_none_for_the_main_branch(value: str | None, revision: str) -> None:
    found = parse_config(json.dumps({**GOOD_CONFIG, "revision": value}).encode())
    assert (found.revision, found.pinned_base) == (revision, at_revision("acme/tiny", revision))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (f"{PYTHIA}@{FIRST}", (PYTHIA, FIRST)),
        (f"{PYTHIA}@main", (PYTHIA, "")),
        (PYTHIA, (PYTHIA, "")),
        ("gpt2@v1", ("gpt2", "v1")),
        (f"https://huggingface.co/{PYTHIA}@v1", (f"https://huggingface.co/{PYTHIA}", "v1")),
        ("acme/tiny@refs/pr/3", ("acme/tiny", "refs/pr/3")),
        ("acme/tiny@../../etc", ("acme/tiny", "../../etc")),
        ("/models/a@b", ("/models/a@b", "")),
        ("./a@b", ("./a@b", "")),
        ("D:\\a@b", ("D:\\a@b", "")),
        ("@v1", ("@v1", "")),
        ("acme/tiny@", ("acme/tiny@", "")),
        ("", ("", "")),
    ],
)
def test_a_name_is_split_at_its_revision(name: str, parts: tuple[str, str]) -> None:
    assert split_revision(name) == parts


def test_a_folder_has_no_revision() -> None:
    for folder in ("/models/tiny", "./tiny", "D:\\tiny", "a/b/tiny"):
        assert at_revision(folder, "v1") == folder
    assert at_revision("", "v1") == ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (f"{PYTHIA}@{FIRST}", f"{PYTHIA}@{FIRST}", True),
        (f"{PYTHIA}@{FIRST}", f"eleutherai/Pythia_70M@{FIRST}", True),
        (f"{PYTHIA}@{FIRST}", f"unsloth/pythia-70m-bnb-4bit@{FIRST}", True),
        (f"{PYTHIA}@{FIRST}", f"{PYTHIA}@{LAST}", False),
        (f"{PYTHIA}@{FIRST}", PYTHIA, False),
        (f"{PYTHIA}@main", PYTHIA, True),
        (f"{PYTHIA}@{COMMIT}", f"{PYTHIA}@{COMMIT[:8]}", True),
        (f"{PYTHIA}@{COMMIT}", f"{PYTHIA}@{COMMIT[:4]}", False),
        (f"{PYTHIA}@{COMMIT[:12]}", f"{PYTHIA}@{COMMIT[:8]}", False),
        (f"{PYTHIA}@STEP1000", f"{PYTHIA}@{FIRST}", False),
        ("gpt2@v1", "openai-community/gpt2@v1", True),
        (f"https://huggingface.co/{PYTHIA}@v1", f"{PYTHIA}@v1", True),
        ("acme/tiny@../../canary", "canary", False),
        ("acme/tiny@x/evil/canary", "evil/canary", False),
    ],
)
def test_revisions_belong_to_the_name(one: str, other: str, same: bool) -> None:
    assert same_base(one, other) == same_base(other, one) == same


def test_a_canonical_name_keeps_its_revision() -> None:
    assert canonical_base("gpt2@v1") == "openai-community/gpt2@v1"
    assert canonical_base(f"unsloth/pythia-70m-bnb-4bit@{FIRST}") == f"unsloth/pythia-70m@{FIRST}"


# The catalogue -------------------------------------------------------------------------------------------------------


def test_a_sync_accepts_the_revision_that_was_asked_for(pool: Path) -> None:
    ok("pool", "sync", PYTHIA, "--from", "pool")
    assert usable() == {"plain"}
    assert rows()["first"]["reason"] == f"for revision {FIRST} of {PYTHIA}"
    first = f"{PYTHIA}@{FIRST}"
    ok("pool", "sync", first, "--from", "pool")
    assert usable(first) == {"first", "again"}
    assert rows(base=first)["last"]["reason"] == f"for revision {LAST} of {PYTHIA}, asked for {FIRST}"
    assert rows(base=first)["plain"]["reason"] == f"for {PYTHIA} without a revision, asked for revision {FIRST}"
    ok("pool", "sync", f"{PYTHIA}@main", "--from", "pool")
    assert usable(PYTHIA) == {"plain"}
    assert rows()["plain"]["base"] == PYTHIA


def test_a_revision_is_shown_and_a_condition(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    assert (
        rows()["first"] | {"revision": FIRST, "base": f"{PYTHIA}@{FIRST}", "base_declared": PYTHIA} == rows()["first"]
    )
    assert rows(f"revision={FIRST}").keys() == {"first", "again"}
    assert rows("revision=none").keys() == {"plain"}
    listed = {line.split("\t")[0]: line.split("\t")[7] for line in ok("pool", "list").out.splitlines()}
    assert (listed["pool/first"], listed["pool/plain"]) == (f"pythia-70m@{FIRST}", "pythia-70m")
    assert f"revision\t{FIRST}\n" in ok("pool", "show", "pool/first").out


def test_aliases_have_revisions_too(pool: Path) -> None:
    ok("pool", "sync", "acme/mirror", "--from", "pool", "--alias", f"{PYTHIA}@{LAST}")
    assert usable() == {"last"}
    ok("pool", "sync", "acme/mirror", "--from", "pool", "--no-alias", f"{PYTHIA}@{LAST}")
    assert usable() == set()


def test_a_catalogue_of_before_learns_the_revisions_at_the_next_sync(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("pool", "sync", PYTHIA, "--from", "pool")
    database = Path(os.environ["LORA_DB"])
    connection = sqlite3.connect(database)
    for view in ("usable", "selected_adapters", "adapter_scores", "run_inputs", "adapter_modules"):
        connection.execute(f"DROP VIEW {view}")
    connection.execute("DROP INDEX adapters_hashes")
    for column in ("revision", "notes", "datasets", "hub_sha256"):
        connection.execute(f"ALTER TABLE adapters DROP COLUMN {column}")
    for table in ("spreads", "home", "verdicts", "listings", "sketches"):
        connection.execute(f"DROP TABLE {table}")
    connection.executescript(
        "DROP INDEX adapters_judged_for; ALTER TABLE adapters DROP COLUMN judged_for; "
        "DROP TRIGGER scores_forgotten; DROP INDEX scores_imported; DROP INDEX scores_adapter; DROP INDEX scores_task; "
        "DROP INDEX adapters_repo"
    )
    for column in ("adapter", '"commit"', "task", "imported"):
        connection.execute(f"ALTER TABLE scores DROP COLUMN {column}")
    connection.execute("DELETE FROM _sqlite_migrations WHERE name != 'm001_adapters_selections_runs'")
    connection.execute("UPDATE adapters SET status = 'ok', base = ?, stamp = substr(stamp, 1, 33)", [PYTHIA])
    connection.commit()
    connection.close()
    assert usable() == {"first", "again", "last", "plain"}
    ok("pool", "sync", PYTHIA, "--from", "pool")
    assert usable() == {"plain"}
    assert rows()["last"]["revision"] == LAST
    assert len(list(database.parent.glob("*.backup"))) == 1
    assert [step.__name__ for step in migrations.STEPS][1] == "m002_revision_and_notes"


@pytest.fixture
def fake(fake: FakeHub) -> FakeHub:
    fake.add("alice/first", lora_files(revision=FIRST))
    fake.add("bob/plain", lora_files())
    return fake


def test_the_hub_lists_by_name_and_each_adapter_is_judged_by_its_revision(fake: FakeHub) -> None:
    ok("pool", "sync", f"{BASE}@{FIRST}", "--no-copies")
    listings = fake.paths("/api/models?")
    assert len(listings) == 1
    assert f"base_model%3Aadapter%3A{BASE.replace('/', '%2F')}&" in listings[0]
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        assert [row.id for row in catalogue.find(status="ok")] == ["alice/first"]
        ok("pool", "sync", BASE, "--no-copies")
        assert [row.id for row in catalogue.find(status="ok", base=BASE)] == ["bob/plain"]
        assert [row.id for row in catalogue.find(status="ok", base=f"{BASE}@{FIRST}")] == ["alice/first"]
    fake.forget()
    ok("pool", "sync", BASE, "--no-copies", "--alias", "acme/other-name")
    assert len(fake.asked) == 2 + 4, "an alias is no reason to read again what names the base itself"
    assert {path.split("/resolve/")[0] for path in fake.paths("/resolve/")} == {"/alice/first"}


def test_an_adapter_of_another_revision_is_not_taken_from_the_hub(fake: FakeHub) -> None:
    message = refused(5, "merge", "alice/first", "bob/plain", "--base", BASE, "-o", "out")
    assert f"alice/first: for revision {FIRST} of {BASE}" in message
    ok("merge", "alice/first", "--base", f"{BASE}@{FIRST}", "-o", "out")


# Merges --------------------------------------------------------------------------------------------------------------


def test_two_revisions_are_not_merged(pool: Path) -> None:
    for words in (("merge", "-o", "out"), ("diff",), ("pool", "similarity")):
        message = refused(5, *words, str(pool / "first"), str(pool / "last"))
        assert f"is for {PYTHIA}@{FIRST}" in message
        assert f"for {PYTHIA}@{LAST}" in message
        assert "two revisions of a model are two bases" in message
    message = refused(5, "merge", str(pool / "first"), str(pool / "again"), "--base", PYTHIA, "-o", "out")
    assert f"is for {PYTHIA}@{FIRST}, not for {PYTHIA}" in message


def test_a_merge_of_one_revision_names_it(pool: Path) -> None:
    ok("merge", str(pool / "first"), str(pool / "again"), "-o", "out")
    written = LoraConfig.from_pretrained("out")
    assert (written.base_model_name_or_path, written.revision) == (PYTHIA, FIRST)
    assert json.loads(Path("out/run.json").read_text())["settings"]["base"] == f"{PYTHIA}@{FIRST}"
    card = Path("out/README.md").read_text()
    assert f'base_model: "{PYTHIA}"\n' in card
    assert f'"base_model:adapter:{PYTHIA}"' in card
    assert f"2 adapters of `{PYTHIA}` at revision `{FIRST}` merged" in card
    ok("merge", "out", str(pool / "first"), "--base", f"{PYTHIA}@{FIRST}", "-o", "again")
    assert "two base models" in refused(5, "merge", "out", str(pool / "plain"), "-o", "mixed")
    ok("merge", str(pool / "plain"), "-o", "plain")
    assert "revision" not in json.loads(Path("plain/adapter_config.json").read_text())


def test_the_line_that_serves_names_the_revision(tmp_path: Path) -> None:
    line = vllm.serve_line(f"{PYTHIA}@{FIRST}", tmp_path, 8)
    assert line.startswith(f"vllm serve {PYTHIA} --revision {FIRST} --enable-lora")
    assert "--revision" not in vllm.serve_line(PYTHIA, tmp_path, 8)


# Bases ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached() -> dict[str, str]:
    """The base acme/grown in the Hub client's cache at two revisions of different depth; revision → commit."""
    commits = {"main": "a" * 40, FIRST: "b" * 40}
    repo = Path(os.environ["HF_HOME"], "hub", "models--acme--grown")
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    for layers, (revision, commit) in enumerate(commits.items(), start=1):
        saved(repo / "snapshots" / commit, num_hidden_layers=layers)
        (repo / "refs" / revision).write_text(commit)
    return commits


def test_a_base_is_loaded_at_its_revision(cached: dict[str, str]) -> None:
    for name, revision, layers in (("acme/grown", "main", 1), (f"acme/grown@{FIRST}", FIRST, 2)):
        ref = pin(name)
        assert (ref.place, ref.name, ref.version) == ("acme/grown", name, cached[revision])
        assert len(ref.load().model.model.layers) == layers
        made_of = skeleton_here(name)
        assert made_of is not None
        assert ("model.layers.1.mlp.up_proj" in made_of.matrices) == (layers == 2)


@pytest.mark.parametrize("revision", ["../main", "a/../../b", " ", "-x", "a b", "x" * 300])
def test_a_revision_that_can_be_none_is_refused_before_anything_is_asked(revision: str) -> None:
    with pytest.raises(NothingMatched, match="has no revision"):
        pin(f"acme/grown@{revision}")


def test_every_command_takes_a_base_at_its_revision(cached: dict[str, str], own_home: Path) -> None:
    deep = {f"model.layers.{layer}.mlp.down_proj": (32, 48) for layer in (0, 1)}
    for seed, name in enumerate(("one", "two")):
        folder = own_home / "pool" / name
        write_adapter(folder, random_factors(deep, 8, seed=seed), base="acme/grown", revision=FIRST)
    Path("lora.toml").write_text(f'base = "acme/grown@{FIRST}"\n')
    task = [{"prompt": example.prompt, "completion": example.completion} for example in examples(20)]
    Path("task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in task))
    ok("pool", "sync", "--from", "pool")
    assert usable() == {"one", "two"}
    assert "\t1\t" in ok("pool", "verify", "pool/one").out
    ok("eval", "pool/one", "--data", "task.jsonl", "--metric", "nll")
    ok("fit", "pool/one", "pool/two", "--data", "task.jsonl", "--steps", "20", "--granularity", "rank", "-o", "fitted")
    ok("train", "--data", "task.jsonl", "--rank", "2", "--steps", "2", "-o", "trained")
    for folder in ("fitted", "trained"):
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("acme/grown", FIRST)
        assert f"at revision `{FIRST}`" in Path(folder, "README.md").read_text()
        assert any(cached[FIRST] in name for name in json.loads(Path(folder, "run.json").read_text())["inputs"])
    ok("bake", "fitted", "-o", "baked")
    assert json.loads(Path("baked/config.json").read_text())["num_hidden_layers"] == 2


def test_a_base_is_downloaded_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    files = {file.name: file.read_bytes() for file in saved(tmp_path / "base").iterdir()}
    adapter = write_adapter(tmp_path / "x", random_factors(SHAPES, 2, seed=1), base="acme/remote", revision="v1")
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        repo = hub.add("acme/remote", files)
        repo.names = {"v1": repo.sha}
        repo.commit(config__json=b"{}")
        ok("bake", str(adapter), "--base", "acme/remote@v1", "-o", "baked")
        hub.forget()
        ok("bake", str(adapter), "--base", "acme/remote@v1", "-o", "again")
        assert hub.asked == []
        with pytest.raises(NothingMatched, match="no such commit, branch or tag"):
            find_base("acme/remote@v2", announce=str)
        close_session()
