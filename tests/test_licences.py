"""Licences: what the table says, what a policy does with it, and what the card of a result carries."""

import json
from pathlib import Path

import pytest

from lora_cli import licences
from lora_cli.errors import Refused
from lora_cli.formats.card import datasets_of, licence_of, read_card
from lora_cli.licences import Policy, conflict, restrictions_of, terms_of, together
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.paths import ROOT

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 16)}
ALL = ("PERMISSIVE", "SHARE_ALIKE", "NON_COMMERCIAL", "NO_DERIVATIVES", "CUSTOM")


def put(folder: Path, licence: str, *, seed: int, datasets: str = "") -> str:
    """An adapter whose card states this; returns its path."""
    write_adapter(folder, random_factors(SHAPES, 2, seed=seed))
    front = f"license: {licence}\n" if licence else ""
    (folder / "README.md").write_text(f"---\n{front}{datasets}---\nA card.\n", "utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("licence", "kinds", "commercial"),
    [
        ("Apache-2.0", (), True),
        ("cc-by-sa-4.0", ("share-alike",), True),
        ("cc-by-nc-sa-4.0", ("share-alike", "non-commercial"), False),
        ("cc-by-nc-nd-4.0", ("non-commercial", "no-derivatives"), False),
        ("cc-by-nd-4.0", ("no-derivatives",), True),
        ("llama3.1", ("custom",), True),
        ("gemma", ("custom",), True),
        ("my-own-terms", ("unknown",), False),
        ("", ("unknown",), False),
        ("other", ("unknown",), False),
        ("mit AND cc-by-nc-4.0", ("non-commercial",), False),
        ("apache-2.0-and-mit", (), True),
    ],
)
def test_a_licence_has_its_terms_and_unknown_is_not_permissive(
    licence: str, kinds: tuple[str, ...], commercial: bool
) -> None:
    assert (terms_of(licence).restrictions, terms_of(licence).commercial) == (kinds, commercial)


@pytest.mark.parametrize(
    ("parts", "conflicting"),
    [
        (("mit", "cc-by-nc-4.0", "llama3"), False),
        (("gpl-3.0", "mit"), False),
        (("gpl-3.0", "lgpl-3.0"), False),
        (("cc-by-sa-4.0", "gpl-3.0"), False),
        (("cc-by-sa-4.0", "agpl-3.0"), True),
        (("gpl-2.0", "gpl-3.0"), True),
        (("cc-by-sa-4.0", "cc-by-nc-4.0"), True),
        (("cc-by-nc-sa-4.0", "cc-by-nc-4.0"), False),
        (("cc-by-nc-sa-4.0", "cc-by-sa-4.0"), True),
        (("gpl-3.0", "llama3"), True),
        (("cc-by-sa-4.0", ""), True),
    ],
)
def test_share_alike_terms_conflict_where_no_one_licence_serves_all(parts: tuple[str, ...], conflicting: bool) -> None:
    assert conflict(parts) is conflicting


def test_the_name_of_several_licences_keeps_every_part() -> None:
    assert together(["mit", "MIT"]) == "mit"
    assert together(["", ""]) == ""
    assert together(["mit", "", "cc-by-nc-4.0 AND llama3"]) == "cc-by-nc-4.0-and-llama3-and-mit-and-unknown"
    assert terms_of(together(["mit", "$(rm) \x1b"])).restrictions == ("unknown",)


def test_a_policy_says_warns_or_refuses() -> None:
    mixed = {"a/nc": "cc-by-nc-4.0", "b/mit": "mit", "c/none": ""}
    assert restrictions_of("off", mixed) == ""
    assert restrictions_of("warn", {"b/mit": "mit"}, ("base", "")) == ""
    assert restrictions_of("warn", mixed) == "licences: a/nc cc-by-nc-4.0 (non-commercial); c/none (not stated)"
    with pytest.raises(Refused, match=r"a/nc cc-by-nc-4\.0 \(non-commercial\); c/none \(not stated\)"):
        restrictions_of("commercial", mixed)
    with pytest.raises(Refused, match=r"base acme/b \(not stated\)"):
        restrictions_of("commercial", {"b/mit": "mit"}, ("acme/b", ""))
    assert "custom" in restrictions_of("commercial", {"b/mit": "mit"}, ("acme/b", "llama3"))
    with pytest.raises(Refused, match="share-alike terms conflict"):
        restrictions_of("share-alike", {"a": "cc-by-sa-4.0", "b": "gpl-2.0"})
    many = {f"a/{n}": "" for n in range(9)}
    assert restrictions_of("warn", many).endswith("; and 6 more")


@pytest.mark.parametrize(
    ("front", "licence", "datasets"),
    [
        ("license: mit\ndatasets: acme/one", "mit", ("acme/one",)),
        ("license: [mit, cc-by-nc-4.0]\ndatasets:\n- acme/one\n- 'acme/two'\ntags:\n- x", "mit AND cc-by-nc-4.0",
         ("acme/one", "acme/two")),
        ("license: other\nlicense_name: llama3 # terms", "llama3", ()),
        ('license: "other"\nlicense_name: "mit-and-unknown"\ndatasets: ["a/b"]', "mit-and-unknown", ("a/b",)),
        ("tags: [lora]", "", ()),
    ],
)  # fmt: skip
def test_a_card_is_read_in_every_form(front: str, licence: str, datasets: tuple[str, ...]) -> None:
    card = f"---\n{front}\n---\nlicense: gpl-3.0\n"
    assert (licence_of(card), datasets_of(card)) == (licence, datasets)


def test_a_merge_carries_the_licences_and_data_sets_of_its_parents(own_home: Path) -> None:
    one = put(own_home / "pool" / "one", "apache-2.0", seed=0, datasets="datasets: [acme/questions]\n")
    two = put(own_home / "pool" / "two", "cc-by-nc-4.0", seed=1, datasets="datasets:\n- acme/answers\n")
    told = ok("merge", one, two, "-o", "mixed")
    assert "licences: pool/two cc-by-nc-4.0 (non-commercial)" in told.err
    card = read_card(own_home / "mixed")
    assert licence_of(card) == "apache-2.0-and-cc-by-nc-4.0"
    assert datasets_of(card) == ("acme/answers", "acme/questions")
    assert "| `apache-2.0` |" in card
    assert "Licence of the base: not stated." in card
    record = json.loads((own_home / "mixed" / "run.json").read_text())
    assert {id.partition("@")[0]: licence for id, licence in record["results"]["licences"].items()} == {
        "pool/one": "apache-2.0", "pool/two": "cc-by-nc-4.0",
    }  # fmt: skip
    assert "licences" not in ok("merge", one, two, "-o", "quiet", "--license-policy", "off").err
    assert "mixed cc" not in (said := refused(5, "merge", "mixed", one, "-o", "x", "--license-policy", "commercial"))
    assert "apache-2.0-and-cc-by-nc-4.0 (non-commercial)" in said
    assert not (own_home / "x").exists()


def test_the_policy_is_a_setting_too(own_home: Path) -> None:
    one, two = (put(own_home / "pool" / name, "", seed=n) for n, name in enumerate(("one", "two")))
    (own_home / "lora.toml").write_text('license_policy = "commercial"\n')
    assert "(not stated)" in refused(5, "merge", one, two, "-o", "x")
    ok("merge", one, two, "-o", "x", "--license-policy", "warn")
    (own_home / "lora.toml").write_text('license_policy = "some"\n')
    assert "must be one of warn, commercial, share-alike, off" in refused(2, "merge", one, two, "-o", "y")


def test_the_page_of_licences_names_every_one() -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    for names in ALL:
        for name in getattr(licences, names):
            assert f"`{name}`" in page, name
    policies: tuple[Policy, ...] = licences.POLICIES
    assert all(f"`{policy}`" in page for policy in policies)
