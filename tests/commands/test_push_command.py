"""`lora push`, with the real client against the stand-in Hub: what arrives there, what is refused, what is said."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.catalogue.runs import add_scores, recorded
from lora_cli.escapes import safe
from lora_cli.formats.base_names import public_base
from lora_cli.formats.store import folder_ref
from lora_cli.hashes import sha256_of
from lora_cli.records import Score
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import Told, lora, ok, refused
from tests.fake_hub import FakeHub
from tests.fake_uploads import READER, TOKEN
from tests.imports.kinds import SAMPLES

SHAPES = {f"model.layers.{n}.self_attn.q_proj": (24, 16) for n in range(2)}
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and a merge of them, made by the command."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("LORA_DB", str(place / "own.db"))
        for seed, name in enumerate(("one", "two")):
            write_adapter(place / name, random_factors(SHAPES, 4, seed=seed))
            card = "---\nlicense: mit\ndatasets:\n- acme/rows\n- '../etc'\n---\n"
            (place / name / "README.md").write_text(card)
        ok("merge", "one", "two", "-m", "ties", "-o", "merged")
    return place


@pytest.fixture
def merged(made: Path, own_home: Path) -> Path:
    """A copy of the merge in the working folder, of which a test may do as it likes."""
    return Path(shutil.copytree(made / "merged", own_home / "merged"))


@pytest.fixture
def writer(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The stand-in Hub, with a login that may write to me and to acme."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield fake
    assert len(fake.uploads.commits) == len({parent for _, parent, _ in fake.uploads.commits})


def edit(record: dict[str, Any], merged: Path) -> None:
    """Put a record, with the key of its settings and inputs, in the place of a result's own."""
    deciding = [record[name] for name in ("command", "settings", "inputs", "versions")]
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    (merged / "run.json").write_text(json.dumps(record | {"key": key}))


def asked(fake: FakeHub) -> list[str]:
    return [f"{one.method} {one.path.partition('?')[0]}" for one in fake.asked]


def test_a_result_arrives_as_one_commit_with_its_card(writer: FakeHub, merged: Path) -> None:
    told = ok("push", "merged", "me/mixed", "--private", "--json")
    found = json.loads(told.out)
    repo = writer.repos["me/mixed"]
    assert (found["schema"], found["status"], found["repo"]) == ("lora.push/1", "pushed", "me/mixed")
    assert (found["commit"], found["url"], found["private"]) == (repo.sha, f"{writer.endpoint}/me/mixed", True)
    assert {one["path"]: one["bytes"] for one in found["files"]} == {name: len(repo.files[name]) for name in FILES}
    assert len(writer.uploads.commits) == 1
    assert writer.uploads.made == [("me/mixed", "private")]
    for name in FILES - {"README.md"}:
        assert repo.files[name] == (merged / name).read_bytes()
    assert repo.files.keys() == FILES | {".gitattributes"}
    assert "me/mixed@" in told.err


def test_the_card_tells_where_a_result_comes_from_and_how_to_load_it(merged: Path) -> None:
    card = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)["card"]
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "tags": ["lora", "merge", "base_model:adapter:acme/tiny"],
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "datasets": ["acme/rows"],
    }
    record = json.loads((merged / "run.json").read_text())
    for pinned in record["inputs"]:
        id, _, commit = pinned.rpartition("@")
        assert f"| `{id}` | `{commit}` | 0.5 | `mit` |" in text
    assert "| `method` | `ties` |" in text
    assert "arXiv 2306.01708" in text
    assert 'PeftModel.from_pretrained(model, "me/mixed")' in text
    assert 'model.load_adapter("me/mixed")' in text
    assert "vllm serve acme/tiny --enable-lora --max-lora-rank 16 --lora-modules mixed=me/mixed" in text


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, {"PEFT", "transformers", "vLLM", "llama.cpp"}),
        ({"r": 1024}, {"PEFT", "transformers", "llama.cpp"}),
        ({"fan_in_fan_out": True}, {"PEFT", "transformers", "llama.cpp"}),
        ({"modules_to_save": ["lm_head"]}, {"PEFT", "transformers"}),
        ({"task_type": "SEQ_CLS"}, {"PEFT", "transformers"}),
    ],
)
def test_only_programs_that_take_a_result_are_named(config: dict[str, object], named: set[str], merged: Path) -> None:
    file, record = merged / "adapter_config.json", merged / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    outputs = {"outputs": json.loads(record.read_text())["outputs"] | {file.name: sha256_of(file)}}
    edit(json.loads(record.read_text()) | outputs, merged)
    card = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)["card"]
    ways = card.partition("## How to load it")[2]
    assert {
        line[:-1] for line in ways.splitlines() if line in ("PEFT:", "transformers:", "vLLM:", "llama.cpp:")
    } == named
    assert ("lora export gguf me/mixed --base acme/tiny -o gguf" in card) == ("llama.cpp" in named)
    loader = "AutoModelForSequenceClassification" if "task_type" in config else "AutoModelForCausalLM"
    assert f'{loader}.from_pretrained("acme/tiny")' in card


def test_the_card_of_a_training_tells_examples_and_loss(merged: Path) -> None:
    record = json.loads((merged / "run.json").read_text())
    record |= {"command": "train", "inputs": {f"base:acme/tiny@{'c' * 40}": "c" * 40, "sums.jsonl": "0" * 64}}
    record["results"] = {"n_train": 80, "n_validation": 20, "loss": 0.0632, "card": record["results"]["card"]}
    edit(record, merged)
    told = ok("push", "merged", "me/mixed", "--dry-run", "--json")
    card = json.loads(told.out)["card"]
    assert "made by `lora train`. It was trained on 80 examples. Validation loss on 20 examples: 0.063." in card
    assert "license" not in yaml.safe_load(card.split("---\n", 2)[1])
    assert yaml.safe_load(card.split("---\n", 2)[1])["tags"] == ["lora", "base_model:adapter:acme/tiny"]
    assert "## Parents" not in card


def test_the_card_of_an_extract_names_a_model_and_no_merge(merged: Path) -> None:
    record = json.loads((merged / "run.json").read_text())
    inputs = {f"base:acme/tiny@{'c' * 40}": "c" * 40, f"tuned:acme/tuned@{'d' * 40}": "d" * 40}
    record |= {"command": "extract", "settings": {"rank": 4, "tuned": "acme/tuned"}, "inputs": inputs}
    edit(record, merged)
    card = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)["card"]
    assert "It is the low-rank part of the difference between a fine-tuned model and the base." in card
    assert "| model | commit | licence |" in card
    assert f"| `acme/tuned` | `{'d' * 40}` | not stated |" in card
    assert "adapter." not in card.partition("## How to load it")[0]
    assert yaml.safe_load(card.split("---\n", 2)[1])["tags"] == ["lora", "base_model:adapter:acme/tiny"]


def test_a_dry_run_needs_no_login_sends_nothing_and_leaves_no_trace(
    fake: FakeHub, merged: Path, own_home: Path
) -> None:
    before = sorted(own_home.rglob("*"))
    plan = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)
    assert plan["schema"] == "lora.push.plan/1"
    assert {one["path"] for one in plan["files"]} == FILES
    assert plan["bytes"] == sum(one["bytes"] for one in plan["files"])
    assert (fake.asked, sorted(own_home.rglob("*"))) == ([], before)
    assert ok("runs", "list", "-q").out == ""


def test_what_is_there_already_is_not_pushed_again(writer: FakeHub, merged: Path) -> None:
    ok("push", "merged", "me/mixed", "--private")
    writer.forget()
    told = ok("push", "merged", "me/mixed", "--json")
    found = json.loads(told.out)
    assert (found["status"], found["commit"]) == ("up to date", writer.repos["me/mixed"].sha)
    assert "up to date" in told.err
    assert asked(writer) == ["GET /api/models/me/mixed/revision/main"]


def test_a_push_replaces_files_and_says_so_and_takes_stale_coefficients_away(writer: FakeHub, merged: Path) -> None:
    repo = writer.add("me/mixed", {"README.md": b"old", "coefficients.json": b"{}", "notes.txt": b"mine"})
    old = repo.sha
    told = ok("push", "merged", "me/mixed")
    assert repo.files.keys() == FILES | {"notes.txt"}
    assert f"replacing README.md of me/mixed@{old[:8]}" in told.err


def test_weights_in_parts_and_as_one(writer: FakeHub, merged: Path) -> None:
    writer.uploads.part_size = 1000
    ok("push", "merged", "me/mixed", "--private")
    weights = "adapter_model.safetensors"
    assert writer.repos["me/mixed"].files[weights] == (merged / weights).read_bytes()
    assert len(writer.paths("?part=")) > 2


def test_a_run_is_recorded_and_the_catalogue_knows_the_place(writer: FakeHub, merged: Path, own_home: Path) -> None:
    ok("push", "merged", "me/mixed", "--private")
    [run] = json.loads(ok("runs", "list", "--command", "push", "--json").out)["rows"]
    record = json.loads(ok("runs", "show", run["id"], "--json").out)["record"]
    repo = writer.repos["me/mixed"]
    assert (record["results"]["repo"], record["results"]["commit"]) == ("me/mixed", repo.sha)
    assert set(record["outputs"]) == FILES
    ok("pool", "sync", "acme/tiny", "--from", ".")
    shown = json.loads(ok("pool", "show", f"{own_home.name}/merged", "--json").out)
    assert shown["pushed"] == [f"me/mixed@{repo.sha}"]


def test_a_parent_that_was_pushed_is_named_by_its_place(writer: FakeHub, merged: Path) -> None:
    ok("push", "merged", "me/first", "--private")
    ok("merge", "merged=0.5", "-m", "linear", "-o", "again")
    card = json.loads(ok("push", "again", "me/second", "--dry-run", "--json").out)["card"]
    sha = writer.repos["me/first"].sha
    assert f"[`me/first`](https://huggingface.co/me/first/tree/{sha}) | `{sha}` | 0.5 |" in card


def test_without_a_terminal_a_public_repository_needs_yes(writer: FakeHub, merged: Path) -> None:
    for words in ([], ["--public"]):
        told = refused(2, "push", "merged", "me/mixed", *words)
        assert "me/mixed does not exist, and would be public" in told
        assert "--private, or --yes" in told
    assert "me/mixed" not in writer.repos
    ok("push", "merged", "me/mixed", "--yes")
    assert writer.uploads.made == [("me/mixed", "public")]


@pytest.mark.parametrize(
    ("answer", "agreed"), [("y\n", True), ("yes\n", True), ("\n", False), ("", False), ("n\n", False)]
)
def test_at_a_terminal_the_user_is_asked(
    answer: str, agreed: bool, writer: FakeHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.commands.push.at_a_terminal", lambda: True)
    told = lora("push", "merged", "me/mixed", stdin=answer)
    assert "make it, public for everybody? [y/N]" in told.err
    assert (told.code, "me/mixed" in writer.repos) == ((0, True) if agreed else (2, False))


def test_a_private_push_never_goes_to_a_public_repository(writer: FakeHub, merged: Path) -> None:
    repo = writer.add("me/mixed", {"README.md": b"old"})
    assert "me/mixed is public already" in refused(2, "push", "merged", "me/mixed", "--private")
    assert repo.files == {"README.md": b"old"}


def test_without_a_login_nothing_is_asked(fake: FakeHub, merged: Path) -> None:
    assert "hf auth login" in refused(4, "push", "merged", "me/mixed", "--yes")
    assert fake.asked == []


@pytest.mark.parametrize(("token", "status"), [(READER, 403), ("hf_" + "unknown0" * 4, 401)])
def test_a_login_that_may_not_write_is_told_the_remedy(
    token: str, status: int, fake: FakeHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    fake.add("acme/there", {"README.md": b"old"})
    for repo in ("acme/new", "acme/there"):
        told = refused(4, "push", "merged", repo, "--yes")
        assert f"{repo}: the Hub refuses the login ({status})" in told
        assert "a token that may write to acme: hf auth login" in told
        assert token not in told
    assert fake.uploads.commits == []


@pytest.mark.parametrize(
    "repo",
    ["mixed", "me/mixed@main", "https://huggingface.co/me/mixed", "me/a/b", "me/--x", "me/x..y", "me/x.git", "../up",
     "me/" + "x" * 200, "me/\x1b[2J", "me/ü", "", "-m/x"],
)  # fmt: skip
def test_names_that_the_hub_does_not_take(repo: str, writer: FakeHub, merged: Path) -> None:
    told = lora("push", "--yes", "--", "merged", repo)
    assert (told.code, told.out) == (2, "")
    assert "\x1b" not in told.err
    assert writer.asked == []


def edited(merged: Path, name: str) -> None:
    data = bytearray((merged / name).read_bytes())
    data[-3] ^= 1
    (merged / name).write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_result_that_was_changed_is_refused(name: str, writer: FakeHub, merged: Path) -> None:
    edited(merged, name)
    assert f"{name} has changed since lora wrote it" in refused(5, "push", "merged", "me/mixed", "--yes")
    assert writer.asked == []


def test_only_a_folders_own_files_go(writer: FakeHub, merged: Path, tmp_path: Path) -> None:
    (merged / "secret.txt").write_text("stray")
    (merged / "trace.jsonl").write_text("{}")
    ok("push", "merged", "me/mixed", "--private")
    assert writer.repos["me/mixed"].files.keys() == FILES | {".gitattributes"}
    shutil.move(merged / "adapter_model.safetensors", tmp_path / "elsewhere")
    (merged / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "a link; only a folder's own files" in refused(5, "push", "merged", "me/other", "--private")
    assert "me/other" not in writer.repos


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run.json", "no run.json"),
        ("adapter_config.json", "no adapter_config.json"),
        ("adapter_model.safetensors", "no adapter_model.safetensors"),
    ],
)
def test_what_is_no_result_is_refused(name: str, said: str, merged: Path) -> None:
    (merged / name).unlink()
    assert said in refused(5, "push", "merged", "me/mixed", "--dry-run")
    (merged / "router.json").write_text("{}")
    assert "a router; lora push uploads adapters" in refused(5, "push", "merged", "me/mixed", "--dry-run")
    assert "merge: no such folder" in refused(3, "push", "merge", "me/mixed", "--dry-run")


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"unfinished": "step 3"}, 5, "not finished"),
        ({"outputs": {}}, 5, "not the record of this adapter"),
        ({"command": "rm -rf"}, 1, "a damaged record"),
        ({"command": None}, 1, "a damaged record"),
        ({"schema": "other"}, 1, "not a record of lora"),
        ({"settings": {"token": "hf_" + "aB3" * 8}}, 5, "holds what looks like a token"),
    ],
)
def test_records_that_cannot_be_pushed(change: dict[str, object], code: int, said: str, merged: Path) -> None:
    edit(json.loads((merged / "run.json").read_text()) | change, merged)
    told = refused(code, "push", "merged", "me/mixed", "--dry-run")
    assert said in told
    assert "aB3aB3" not in told


@pytest.mark.parametrize("what", ["command", "settings", "inputs"])
def test_an_edited_record_is_refused(what: str, merged: Path) -> None:
    file = merged / "run.json"
    record = json.loads(file.read_text())
    record[what] = "train" if what == "command" else {**record[what], "b@" + "1" * 40: "2" * 64}
    file.write_text(json.dumps(record))
    assert "run.json has changed since lora wrote it" in refused(5, "push", "merged", "me/mixed", "--dry-run")


def test_a_file_whose_hash_is_not_recorded_is_named(merged: Path) -> None:
    file = merged / "run.json"
    record = json.loads(file.read_text())
    del record["outputs"]["adapter_config.json"]
    file.write_text(json.dumps(record))
    told = ok("push", "merged", "me/mixed", "--dry-run")
    assert "not compared, for run.json has no hash of it: adapter_config.json" in told.err
    del record["outputs"]
    file.write_text(json.dumps(record))
    assert "a damaged record" in refused(1, "push", "merged", "me/mixed", "--dry-run")


def test_a_readme_of_ones_own_goes_as_it_is(writer: FakeHub, merged: Path) -> None:
    own = "---\nlicense: mit\n---\nMy words, ünchanged.\n"
    (merged / "README.md").write_text(own, encoding="utf-8")
    told = ok("push", "merged", "me/mixed", "--private")
    assert "README.md is your own and goes as it is" in told.err
    assert writer.repos["me/mixed"].files["README.md"] == own.encode()
    assert (merged / "README.md").read_text(encoding="utf-8") == own
    (merged / "README.md").unlink()
    ok("push", "merged", "me/mixed")
    assert b"## How to load it" in writer.repos["me/mixed"].files["README.md"]


def test_no_file_of_a_result_that_holds_a_token_is_pushed(merged: Path) -> None:
    (merged / "coefficients.json").write_text(json.dumps({"task": "hf_" + "aB3" * 8}))
    assert "coefficients.json holds what looks like a token" in refused(5, "push", "merged", "me/mixed", "--dry-run")


@pytest.mark.parametrize(
    ("card", "code", "said"),
    [
        (b"---\nlicense: [\n---\n", 5, "does not take the front matter of README.md"),
        (b"\xff\xfe", 1, "not UTF-8 text"),
        (b"x" * 1_000_001, 5, "are no model card"),
        (b"---\nlicense: mit\n---\ntoken hf_" + b"aB3" * 8, 5, "holds what looks like a token"),
    ],
    ids=["yaml", "bytes", "long", "token"],
)
def test_readmes_that_cannot_go(card: bytes, code: int, said: str, writer: FakeHub, merged: Path) -> None:
    (merged / "README.md").write_bytes(card)
    assert said in refused(code, "push", "merged", "me/mixed", "--private")
    assert writer.uploads.commits == []


def test_what_the_hub_remarks_on_a_card_is_told(writer: FakeHub, merged: Path) -> None:
    (merged / "README.md").write_text("No front matter.")
    told = ok("push", "merged", "me/mixed", "--private")
    assert "the Hub remarks on README.md: empty or missing yaml metadata" in told.err


def with_licences(merged: Path, *licences: str) -> None:
    record = json.loads((merged / "run.json").read_text())
    record["results"]["licences"] |= dict(zip(record["inputs"], licences, strict=True))
    edit(record, merged)


@pytest.mark.parametrize(
    ("licences", "policy", "code", "said"),
    [
        (("mit", "cc-by-nc-4.0"), "warn", 0, "cc-by-nc-4.0 (non-commercial)"),
        (("mit", "cc-by-nc-4.0"), "commercial", 5, "licence without commercial use"),
        (("cc-by-sa-4.0", "cc-by-nc-4.0"), "share-alike", 5, "share-alike terms conflict"),
        (("mit", "cc-by-nd-4.0"), "warn", 5, "licence without derivatives"),
        (("mit", "cc-by-nd-4.0"), "off", 0, ""),
    ],
)
def test_licences_hold(licences: tuple[str, str], policy: str, code: int, said: str, merged: Path) -> None:
    with_licences(merged, *licences)
    told = lora("push", "merged", "me/mixed", "--dry-run", "--json", "--license-policy", policy)
    assert told.code == code
    assert said in told.err
    if code == 0:
        assert 'license_name: "' in json.loads(told.out)["card"]


def test_a_policy_asks_the_hub_for_the_licence_of_the_base(writer: FakeHub, merged: Path) -> None:
    writer.add("acme/tiny", {}, licence="cc-by-nc-4.0")
    words = ("push", "merged", "me/mixed", "--private", "--license-policy", "commercial")
    assert "base acme/tiny cc-by-nc-4.0 (non-commercial)" in refused(5, *words)
    assert asked(writer) == ["GET /api/models/acme/tiny"]
    writer.repos["acme/tiny"].licence = "llama3.1"
    ok(*words)
    text = writer.repos["me/mixed"].files["README.md"].decode()
    assert "Licence of the base `acme/tiny`: `llama3.1`. Built with Llama." in text


def test_parents_from_the_hub_are_linked_at_their_commits(merged: Path) -> None:
    record = json.loads((merged / "run.json").read_text())
    commit = "a" * 40
    record["inputs"] = {f"ann/sql:low@{commit}": "0" * 64}
    record["merge.lock"]["parents"] = {f"ann/sql:low@{commit}": {"source": "hub", "sha256": "0" * 64}}
    edit(record, merged)
    card = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)["card"]
    assert f"[`ann/sql:low`](https://huggingface.co/ann/sql/tree/{commit}/low) | `{commit}` |" in card


def test_scores_stand_in_the_card_with_their_intervals(made: Path, merged: Path) -> None:
    commit = folder_ref(merged).commit
    db = Path(os.environ["LORA_DB"])
    for value in (0.5, 0.75):  # of two scores on one task the newer one counts
        score = Score(
            system="mine", metric="exact", value=value, low=0.6, high=0.9, n=1200, baseline="base", delta=0.25,
            delta_low=0.1, delta_high=0.4, p=0.01,
        )  # fmt: skip
        with recorded(db, "eval", {"data": "sums|.jsonl"}, {}, None) as run:
            add_scores(db, run, [score], {"mine": [f"else/where@{commit}"]}, "c0ffee" + "0" * 58)
            add_scores(db, run, [score], {"mine": [f"else/where@{'1' * 40}"]}, "1" * 64)
    card = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)["card"]
    row = "| `sums/.jsonl@c0ffee00` | `c0ffee000000` | `exact` | 1,200 | 0.750 [0.600, 0.900] | "
    assert f"{row}+0.250 [+0.100, +0.400] to `base` |" in card
    assert card.count("`exact`") == 1


def test_text_of_strangers_stays_text_in_the_card(merged: Path) -> None:
    record = json.loads((merged / "run.json").read_text())
    evil = "a`b|c\n# <script>\u202e[x](y)"
    commit = "0" * 40
    record["inputs"] = {f"{evil}@{commit}": "0" * 64}
    record["results"]["licences"] = {f"{evil}@{commit}": evil}
    record["settings"] |= {"method": evil, evil: evil, "weights": {f"{evil}@{commit}": 10**400}}
    edit(record, merged)
    card = json.loads(ok("push", "merged", "me/mixed", "--dry-run", "--json").out)["card"]
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "unknown"
    assert "\u202e" not in card
    assert "<script>" not in front
    shown = r"`a'b/c\x0a# <script>\u202e[x](y)`"
    assert f"| {shown} | `{commit}` | see run.json | {shown} |" in text
    assert f"| {shown} | {shown} |" in text
    assert not [line for line in text.splitlines() if line.startswith("# ") and line != "# mixed"]


@pytest.mark.parametrize("base", ["/home/me/models/base", "base", "x`y\n```", "a/b\n---"])
def test_a_base_that_is_no_id_of_the_hub_is_named_in_words_alone(base: str, own_home: Path) -> None:
    write_adapter(own_home / "one", random_factors(SHAPES, 4, seed=1), base=base)
    write_adapter(own_home / "two", random_factors(SHAPES, 4, seed=2), base=base)
    ok("merge", "one", "two", "-o", "merged")
    told = ok("push", "merged", "me/mixed", "--dry-run", "--json")
    assert f"names the base {safe(public_base(base))}, which is no id of the Hub: others cannot load it" in told.err
    card = json.loads(told.out)["card"]
    assert "/home/me" not in card
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert "base_model" not in front
    assert front["tags"] == ["lora", "merge"]
    assert "vllm serve BASE-MODEL --enable-lora" in card
    assert card.count("```") == 8


def test_the_place_of_a_bases_folder_is_told_here_and_not_in_the_card(own_home: Path) -> None:
    sample = next(one for one in SAMPLES if one.title == "Olive")
    Path("theirs").mkdir()
    sample.write(Path("theirs"))
    base = own_home / "models" / "mine"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    ok("convert", str(Path("theirs", sample.source)), "--base", str(base), "-o", "converted")
    assert json.loads(Path("converted/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    told = ok("push", "converted", "me/mixed", "--dry-run", "--json")
    assert f"names the base {base}, which is no id of the Hub" in told.err
    card = json.loads(told.out)["card"]
    assert str(own_home) not in card
    assert "LoRA of `mine`" in card


def test_folders_of_strange_names(writer: FakeHub, merged: Path) -> None:
    shutil.move(merged, "-x `$(y)` é")
    ok("push", "--private", "--", "-x `$(y)` é", "me/mixed")
    assert writer.repos["me/mixed"].files.keys() == FILES | {".gitattributes"}
    assert "$(y)" not in writer.repos["me/mixed"].files["README.md"].decode()


def test_the_token_is_in_nothing_that_is_said_or_written(
    writer: FakeHub, merged: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEBUG", "1")
    writer.answer_headers = {"X-Error-Message": f"Bearer {TOKEN}", "X-Request-Id": TOKEN}
    said: list[Told] = []
    for place in ("/api/repos", "/revision", "/validate-yaml", "/preupload", "/batch", "cdn:", "/verify", "/commit"):
        for status in (400, 401, 403, 409, 412, 422):
            writer.fail(place, status=status, body=f'{{"error": "Bearer {TOKEN}"}}'.encode(), times=9)
            said.append(lora("push", "merged", "me/mixed", "--yes"))
            writer.heal()
    assert {told.code for told in said} <= {1, 2, 4, 5, 7, 0}
    assert [
        told for told in said if TOKEN in told.out + told.err or ("raceback (most" not in told.err and told.code)
    ] == []
    files = [file for folder in (own_home, tmp_path) for file in folder.rglob("*") if file.is_file()]
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []
    to_cdn = [one for one in writer.asked if one.server == "cdn"]
    assert to_cdn
    assert not any("authorization" in one.headers for one in to_cdn)
