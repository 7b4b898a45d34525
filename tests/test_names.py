"""What names mean: the layer of a module, an adapter's id with its commit, and the names that the Hub can have."""

import pytest

from lora_cli.names import (
    Layer,
    id_and_revision,
    ids_and_commits,
    in_repo,
    is_commit,
    is_folder,
    is_model,
    is_repo,
    is_revision,
    layer_of,
    leaf,
    parent,
    repo_and_folder,
)

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("module", "stack", "number", "place", "name"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers", "3", "mlp.up_proj", "model.layers.3"),
        ("transformer.h.11.attn.c_attn", "transformer.h", "11", "attn.c_attn", "transformer.h.11"),
        ("model.layers.2.mlp.experts.7.w1", "model.layers", "2", "mlp.experts.7.w1", "model.layers.2"),
        ("encoder.block.0.layer.1.wi", "encoder.block", "0", "layer.1.wi", "encoder.block.0"),
        ("0.q_proj", "", "0", "q_proj", "0"),
        ("score.0", "score", "0", "", "score.0"),
        ("12", "", "12", "", "12"),
        ("h.007.q", "h", "007", "q", "h.007"),
    ],
)  # fmt: skip
def test_the_layer_is_the_first_number_of_a_name(module: str, stack: str, number: str, place: str, name: str) -> None:
    layer = layer_of(module)
    assert layer == Layer(stack, number, place)
    assert layer is not None
    assert layer.name == name


@pytest.mark.parametrize(
    "module", ["lm_head", "model.embed_tokens", "", "h2.conv1.q", "layers.², q", "layers.٣.q", "a.-1.b"]
)
def test_a_name_without_a_part_of_ascii_digits_is_in_no_layer(module: str) -> None:
    assert layer_of(module) is None


@pytest.mark.parametrize(
    ("module", "above", "last"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn", "q_proj"),
        ("lm_head", "", "lm_head"),
        ("a.", "a", ""),
        ("", "", ""),
    ],
)
def test_a_module_has_a_last_part_and_a_parent(module: str, above: str, last: str) -> None:
    assert (parent(module), leaf(module)) == (above, last)


def test_a_repository_has_an_owner_and_only_an_old_model_has_none() -> None:
    for name in ("acme/sql", "A1/b_c.d-e", "acme/_x", "a/" + "b" * 96):
        assert is_repo(name)
        assert is_model(name)
    for name in ("gpt2", "bert-base-uncased", "t5_v1.1"):
        assert not is_repo(name)
        assert is_model(name)
    for name in (
        "", "a/b/c", "/a/b", "./a", "../a", "~/a", ".hidden", "-a/b", "_a/b", "a/", "/b", "a b/c", "acme/sql@main",
        "acme/sql:x", "ácme/sql", "a/-b", "a" * 97 + "/b", "a/" + "b" * 97, "acme/sql\n", "https://huggingface.co/a/b",
    ):  # fmt: skip
        assert not is_repo(name), name
        assert not is_model(name), name


def test_a_commit_is_forty_small_hex_digits() -> None:
    assert is_commit(SHA)
    for text in ("", SHA[:39], SHA + "0", SHA.upper(), "g" * 40, f"{SHA}\n", "main"):
        assert not is_commit(text), text


def test_a_revision_never_leads_out_of_the_cache() -> None:
    for text in ("main", "v1.0", "refs/pr/3", "feature/x-y_z", SHA, SHA[:7], "a" * 200):
        assert is_revision(text), text
    for text in ("", "..", "a/../b", "a..b", "/etc", "-x", ".hidden", "a b", "a:b", "a@b", "a" * 201, "né", "main\n"):
        assert not is_revision(text), text


@pytest.mark.parametrize(
    ("text", "id", "revision"),
    [
        ("acme/sql", "acme/sql", ""),
        ("acme/sql@main", "acme/sql", "main"),
        ("acme/sql@refs/pr/3", "acme/sql", "refs/pr/3"),
        ("acme/sql@v1.0:a/b", "acme/sql:a/b", "v1.0"),
        ("acme/sql@main:a..b", "acme/sql:a..b", "main"),
        ("acme/sql@a..b", "acme/sql@a..b", ""),
        ("acme/sql@", "acme/sql@", ""),
        (f"acme/sql@{SHA}", "acme/sql", SHA),
        ("@", "@", ""),
        ("", "", ""),
    ],
)
def test_a_text_for_the_hub_may_hold_any_revision(text: str, id: str, revision: str) -> None:
    assert id_and_revision(text) == (id, revision)


@pytest.mark.parametrize(
    ("text", "id", "commit"),
    [
        ("acme/sql@0123", "acme/sql", "0123"),
        (f"acme/sql@{SHA}:a/b", "acme/sql:a/b", SHA),
        ("acme/sql@012", "acme/sql@012", ""),
        ("acme/sql@main", "acme/sql@main", ""),
        ("me@work/sql", "me@work/sql", ""),
        ("me@work/sql@0123", "me@work/sql", "0123"),
        (f"acme/sql@{SHA}0", f"acme/sql@{SHA}0", ""),
        ("acme/sql@ABCD", "acme/sql@ABCD", ""),
    ],
)
def test_a_text_for_the_catalogue_may_hold_a_commit_and_no_other_revision(text: str, id: str, commit: str) -> None:
    first, *_, last = [*ids_and_commits(text), (text, "")]
    assert (first, last) == ((id, commit), (text, ""))


def test_a_text_with_several_commits_is_read_by_the_longest_first() -> None:
    assert ids_and_commits(f"a@1234:b@{SHA}") == [("a@1234:b", SHA), (f"a:b@{SHA}", "1234"), (f"a@1234:b@{SHA}", "")]


def test_the_id_of_a_folder_in_a_repository_is_taken_apart_again() -> None:
    for repo, folder in (("acme/sql", ""), ("acme/sql", "a"), ("acme/sql", "a/b-c/d.e")):
        assert repo_and_folder(in_repo(repo, folder)) == (repo, folder)
    for id in ("sql", "acme/sql:", "acme/sql:/a", "acme/sql:../a", "acme/sql:a//b", "acme/sql:a:b", "a/b/c", "/tmp/x"):
        assert repo_and_folder(id) is None, id


def test_a_folder_that_can_be_named_has_no_hidden_part() -> None:
    assert is_folder("a/b-c/d.e")
    for name in ("", ".git", "a/.b", "a/", "/a", "a b", "a:b", "x" * 101):
        assert not is_folder(name), name
