"""Any ADAPTER argument may be a Hub id that no sync has seen: what is asked for, what is stored, and what is said."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.catalogue.adapters import Catalogue
from tests.cli import lora, ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def fake(fake: FakeHub) -> FakeHub:
    """A Hub with two adapters whose updates are 8·value² everywhere, and a catalogue that knows nothing."""
    fake.add("alice/sql", lora_files(value=0.5))
    fake.add("bob/math", lora_files(value=0.25, rank=2))
    return fake


def known() -> dict[str, str]:
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        return {row.id: row.commit for row in catalogue.find()}


def update(folder: str) -> torch.Tensor:
    """The dense update of one module of a merged folder."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = load_file(Path(folder, WEIGHTS))
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    scale = float(config["lora_alpha"]) / config["r"]
    delta: torch.Tensor = scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    return delta


def everywhere(value: float) -> torch.Tensor:
    return torch.full((8, 8), value)


def test_two_hub_ids_are_merged_from_nothing(fake: FakeHub) -> None:
    told = ok("merge", "alice/sql", "bob/math", "-o", "out")
    assert f"alice/sql: taken from the Hub at {fake.repos['alice/sql'].sha[:12]}" in told.err
    assert "fetching 2 adapters" in told.err
    torch.testing.assert_close(update("out"), everywhere((8 * 0.25 + 8 * 0.0625) / 2))
    commits = {id: repo.sha for id, repo in fake.repos.items()}
    assert set(json.loads(Path("out/run.json").read_text())["inputs"]) == {f"{i}@{c}" for i, c in commits.items()}
    assert known() == commits
    api = fake.paths("/api/models/", "hub")
    assert [path.partition("?")[0] for path in api] == ["/api/models/alice/sql", "/api/models/bob/math"]
    assert "expand=siblings" in api[0]

    fake.forget()
    ok("merge", "alice/sql=1", "bob/math=2", "-o", "again")
    assert fake.asked == []
    torch.testing.assert_close(update("again"), everywhere(8 * 0.25 + 2 * 8 * 0.0625))


def test_a_dry_run_says_what_it_would_download_and_downloads_nothing(fake: FakeHub, tmp_path: Path) -> None:
    plan = json.loads(ok("merge", "alice/sql", "bob/math", "--dry-run", "--json").out)
    assert plan["schema"] == "lora.merge.plan/1"
    assert plan["out"] is None
    assert plan["fetch"] == [f"{id}@{fake.repos[id].sha}" for id in ("alice/sql", "bob/math")]
    assert plan["fetch_bytes"] == sum(len(fake.repos[id].files[WEIGHTS]) for id in ("alice/sql", "bob/math"))
    Path("task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    plan = json.loads(ok("fit", "alice/sql", "--data", "task.jsonl", "--base", BASE, "--dry-run", "--json").out)
    assert (plan["schema"], len(plan["fetch"])) == ("lora.fit.plan/1", 1)
    plan = json.loads(ok("eval", "alice/sql", "--data", "task.jsonl", "--base", BASE, "--dry-run", "--json").out)
    assert (plan["schema"], plan["out"], len(plan["fetch"])) == ("lora.eval.plan/1", None, 1)
    assert list(tmp_path.rglob(WEIGHTS)) == []
    ok("merge", "alice/sql", "bob/math", "-o", "out")
    assert json.loads(ok("merge", "alice/sql", "bob/math", "--dry-run", "--json").out)["modules"] > 0


def test_a_branch_or_tag_is_pinned_to_its_commit(fake: FakeHub) -> None:
    repo = fake.repos["alice/sql"]
    old = repo.sha
    repo.names = {"v1.0": old, "pr/7": old}
    repo.commit(**{WEIGHTS.replace(".", "__"): lora_files(value=1.0)[WEIGHTS]})
    for revision in ("v1.0", "pr/7", old):
        ok("merge", f"alice/sql@{revision}", "-o", "old", "--force")
        assert list(json.loads(Path("old/run.json").read_text())["inputs"]) == [f"alice/sql@{old}"]
        torch.testing.assert_close(update("old"), everywhere(2.0))
    assert len(fake.paths("/api/models/alice/sql")) == 2, "the commit is known by then"
    ok("merge", "alice/sql@main=1", "-o", "new")
    torch.testing.assert_close(update("new"), everywhere(8.0))
    assert known() == {"alice/sql": repo.sha}


def test_a_version_that_is_known_is_used_and_another_replaces_it_only_if_it_can(fake: FakeHub) -> None:
    repo = fake.repos["alice/sql"]
    first = repo.sha
    ok("pool", "fetch", f"alice/sql@{first}")
    repo.commit(adapter_config__json=lora_files(use_dora=True)["adapter_config.json"])
    fake.forget()
    ok("merge", f"alice/sql@{first[:7]}", "-o", "out")
    ok("merge", "alice/sql", "-o", "out")
    assert fake.paths("/") == [f"/{BASE}/resolve/main/config.json"], "what the base is made of, once"
    message = refused(3, "merge", "alice/sql@" + "0" * 40)
    assert f"alice/sql is at commit {first[:12]} in the catalogue; commit 000" in message
    assert "no such commit, branch or tag on the Hub" in message
    assert "DoRA" in refused(5, "merge", f"alice/sql@{repo.sha}")
    assert "DoRA" in refused(5, "pool", "fetch", f"alice/sql@{repo.sha}")
    assert known() == {"alice/sql": first}
    repo.commit(adapter_config__json=lora_files(alpha=16)["adapter_config.json"])
    ok("merge", f"alice/sql@{repo.sha}", "-o", "newest")
    torch.testing.assert_close(update("newest"), everywhere(4.0))
    assert known() == {"alice/sql": repo.sha}


def test_one_subfolder_of_a_repository(fake: FakeHub) -> None:
    parts = {"sql": 0.5, "math": 1.0, "checkpoint-9": 0.25}
    files = {f"{part}/{file}": data for part, v in parts.items() for file, data in lora_files(value=v).items()}
    repo = fake.add("carol/two", files)
    repo.names = {"v1": repo.sha}
    message = refused(3, "merge", "carol/two")
    assert "holds 2 adapters" in message
    assert "name carol/two:math or carol/two:sql" in message
    assert "no adapter in its folder nosuch" in refused(3, "merge", "carol/two:nosuch")
    assert known() == {}
    ok("merge", "carol/two@v1:math", "carol/two:checkpoint-9", "-o", "out")
    torch.testing.assert_close(update("out"), everywhere((8 + 0.5) / 2))
    assert known() == dict.fromkeys(("carol/two:math", "carol/two:checkpoint-9"), repo.sha)
    fake.forget()
    ok("merge", f"carol/two:math@{repo.sha}", "-o", "same")
    assert fake.asked == []


def test_an_id_that_nobody_knows(fake: FakeHub) -> None:
    ok("pool", "fetch", "alice/sql")
    message = refused(3, "merge", "alice/sqll")
    assert "alice/sqll: not in the catalogue, and no such repository on the Hub" in message
    assert "did you mean alice/sql?" in message
    assert refused(3, "pool", "verify", "alice/sqll") == message
    assert "no such commit, branch or tag" in refused(3, "pool", "fetch", "bob/math@nobranch")


def test_a_gated_adapter_can_be_used_as_soon_as_its_owner_lets_one_in(fake: FakeHub) -> None:
    repo = fake.add("dora/locked", gated="manual")
    for words in (("merge",), ("pool", "fetch"), ("pool", "verify")):
        message = refused(4, *words, "dora/locked")
        assert "gated" in message
        assert "hf auth login" in message
    repo.gated = False
    ok("merge", "dora/locked", "-o", "out")


@pytest.mark.slow
def test_without_a_network_the_message_says_both_what_is_unknown_and_why_it_stays_so(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("pool", "fetch", "alice/sql")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ok("merge", "alice/sql", "-o", "out")
    message = refused(7, "merge", "alice/sqll")
    assert "alice/sqll: not in the catalogue, and the Hub cannot be reached" in message
    assert "did you mean alice/sql?" in message
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
    fake.fail("/bob/math/resolve", times=9, status=401, headers={"X-Error-Code": "GatedRepo"})
    assert "gated" in refused(4, "merge", "bob/math")
    assert known().keys() == {"alice/sql"}


def test_what_cannot_be_a_hub_id_sends_nothing(fake: FakeHub) -> None:
    Path("data").mkdir()
    Path("data/notes").write_text("")
    for name in ("foo", "a/b/c", "./no/such", "../up", "a/..", "~/x", "data/notes", "a b/c", "a/b:../../etc", "a/b@"):
        assert "not in the catalogue" in refused(3, "merge", name), name
    assert fake.asked == []


def test_a_folder_of_the_catalogue_is_never_replaced_by_a_repository_of_its_name(fake: FakeHub, own_home: Path) -> None:
    folder = own_home / "trees" / "pool" / "mine"
    folder.mkdir(parents=True)
    for file, data in lora_files().items():
        (folder / file).write_bytes(data)
    ok("pool", "sync", "--from", str(folder.parent))
    fake.add("pool/mine")
    fake.forget()
    assert "commit 12345678 is not available here" in refused(3, "merge", "pool/mine@12345678")
    assert fake.asked == []


def test_an_adapter_for_another_base_is_refused_and_not_kept(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("erin/other", lora_files(base="acme/another"))
    monkeypatch.setenv("LORA_BASE", BASE)
    message = refused(5, "merge", "alice/sql", "erin/other")
    assert "erin/other: wrong base: declares acme/another" in message
    assert known().keys() == {"alice/sql"}
    monkeypatch.setenv("LORA_BASE_ALIASES", "acme/another")
    ok("merge", "alice/sql", "erin/other", "-o", "out")


def test_verify_looks_at_a_hub_id_without_storing_it(fake: FakeHub) -> None:
    fake.add("frank/dora", lora_files(use_dora=True))
    told = lora("pool", "verify", "alice/sql", "frank/dora", "--json")
    assert told.code == 5
    rows = json.loads(told.out)["rows"]
    assert [(row["id"], row["status"]) for row in rows] == [("alice/sql", "ok"), ("frank/dora", "unusable")]
    assert rows[0]["commit"] == fake.repos["alice/sql"].sha
    assert not [path for path in fake.paths("", "cdn") if "frank" in path and "resolve" in path]
    assert known() == {}
    assert json.loads(ok("pool", "verify", "alice/sql", "--deep", "--json").out)["rows"][0]["norm"] > 0


@pytest.mark.parametrize("words", ["--lambda 0", "--rank x", "--energy 2", "--dense --compact", "-m ties --density 2"])
def test_wrong_options_are_refused_before_the_hub_is_asked(fake: FakeHub, words: str) -> None:
    refused(2, "merge", "alice/sql", *words.split())
    assert fake.asked == []


def test_a_fit_with_wrong_options_is_refused_before_the_hub_is_asked(fake: FakeHub) -> None:
    Path("task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    for words in (("--rank", "x"), ("--control", "nobody"), ("--l1", "-1")):
        refused(2, "fit", "alice/sql", "--data", "task.jsonl", "--base", "acme/tiny", *words)
    assert fake.asked == []


def typed(*folders: str) -> None:
    for folder in folders:
        Path(folder).mkdir(parents=True)


def test_a_mistyped_folder_is_said_and_the_hub_is_not_asked(fake: FakeHub) -> None:
    typed("runs/merge-1", "runs/fit-2", "adapters/sql", "merged")
    near = {
        "runs/mrege-1": "runs/merge-1",
        "./adapterz/sql": "adapters/sql",
        "./adapterz/sqll": "adapters/sql",
        "mreged": "merged",
        "adapters/deep/sql": "",
        "runs/none/": "",
    }
    for name, like in near.items():
        message = refused(3, "merge", name)
        assert f"{name}: no such folder and not in the catalogue" in message
        assert not like or f"did you mean {like}?" in message
        assert refused(3, "pool", "fetch", name) == message
    assert "a repository of the Hub is runs/mrege-1@main" in refused(3, "merge", "runs/mrege-1")
    assert "did you mean adapters/sql?" in refused(3, "pool", "verify", "./adapterz/sql")
    assert fake.asked == []


def test_a_repository_whose_owner_has_the_name_of_a_folder_is_found_by_its_branch(fake: FakeHub) -> None:
    typed("alice/other")
    assert "alice/sql@main" in refused(3, "merge", "alice/sql")
    ok("merge", "alice/sql@main", "-o", "out")
    ok("merge", "alice/sql", "-o", "again")


@pytest.mark.parametrize("folder", [False, True])
def test_offline_a_name_that_may_be_a_folder_comes_with_folders_like_it(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    if folder:
        typed("runs/merge-1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(7, "merge", "rnus/merge-1")
    assert "offline mode is on" in message
    assert ("did you mean runs/merge-1?" in message) == folder
    assert ("no such folder" in message) == folder
    assert fake.asked == []


def test_a_mistyped_folder_of_a_base_model_is_said_and_the_hub_is_not_asked(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("bases/llama", "base")
    Path("task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    for name, like in (("bases/lama", "bases/llama"), ("./bsae", "base"), ("../x/y", ""), ("bases/llama/x", "")):
        for words in (
            ("fit", "alice/sql", "--data"),
            ("train", "--data"),
            ("eval", "alice/sql", "--data"),
            ("task", "show"),
        ):
            message = refused(3, *words, "task.jsonl", "--base", name)
            assert f"no base model at {name}: no such folder" in message
            assert (f"did you mean {like}" if like else "a Hub id or an existing folder") in message
    assert "run hf download bases/lama" in refused(3, "train", "--data", "task.jsonl", "--base", "bases/lama")
    assert fake.asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(7, "train", "--data", "task.jsonl", "--base", "bse")
    assert "did you mean the folder base" in message
