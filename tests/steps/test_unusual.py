"""The pool of one base beside a planted spike, as a user sees it: verify --deep, quarantine, select, merge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.spreads import Spreads
from lora_cli.checks.unusual import FEWEST
from lora_cli.errors import OutputError
from tests.adapters_on_disk import write_adapter
from tests.cli import Told, lora, ok, refused
from tests.ordinary import Factors, ordinary, spiked

BASE = "acme/tiny"
SPIKED, MODULE = "pool/dave/spiked", "model.layers.2.mlp.up_proj"
Z = "8"


def write(folder: Path, factors: Factors) -> Path:
    return write_adapter(folder, {name: (torch.tensor(b), torch.tensor(a)) for name, (b, a) in factors.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 25 ordinary adapters, and one with a spike in one module."""
    tree = tmp_path_factory.mktemp("made") / "pool"
    chosen = [seed for seed in range(80) if MODULE in ordinary(seed) and len(ordinary(seed)[MODULE][1]) > 2][:26]
    for seed in chosen[1:]:
        write(tree / "alice" / f"a{seed}", ordinary(seed))
    write(tree / "dave" / "spiked", spiked(ordinary(chosen[0]), [MODULE], 100, seed=0))
    return tree


@pytest.fixture
def pool(made: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_BASE", BASE)
    shutil.copytree(made, own_home / "pool")
    ok("pool", "sync", "--from", "pool")
    return own_home / "pool"


def ids(*more: str) -> str:
    return ok("pool", "list", "-q", *more).out


def deep(*words: str, stdin: str | None = None) -> Told:
    return lora("pool", "verify", "-", "--deep", *words, stdin=ids() if stdin is None else stdin)


def rows(told: Told) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(told.out)["rows"]
    return found


def test_the_spike_comes_first_with_its_module_value_usual_range_and_z(pool: Path) -> None:
    told = deep("--json")
    first = rows(told)[0]
    assert (told.code, first["id"], first["module"], first["status"]) == (0, SPIKED, MODULE, "ok")
    assert abs(first["z"]) > float(Z)
    assert first["pool"] == 26
    assert not first["usual_low"] <= first["value"] <= first["usual_high"]
    scores = [abs(row["z"]) for row in rows(told)]
    assert scores == sorted(scores, reverse=True)
    assert scores[1] < float(Z)
    words = f"{first['statistic']} {first['value']:.3g} in {MODULE}, usual {first['usual_low']:.3g} to "
    assert words in deep().out.splitlines()[0]
    assert "safe" not in (told.out + told.err + ok("pool", "verify", "--help").out).lower()


def test_one_adapter_is_compared_with_what_the_catalogue_has_measured(pool: Path) -> None:
    before = {row["id"]: row["z"] for row in rows(deep("--json"))}
    alone = rows(lora("pool", "verify", SPIKED, "--deep", "--json"))
    assert alone[0]["z"] == pytest.approx(before[SPIKED], rel=1e-4)
    # A folder that no sync has seen is compared and not stored.
    shutil.copytree(pool / "dave" / "spiked", pool.parent / "other")
    told = lora("pool", "verify", "./other", "--deep", "--json", "--quarantine-z", Z)
    assert (told.code, rows(told)[0]["status"], rows(told)[0]["pool"]) == (5, "quarantined", 27)
    assert rows(lora("pool", "verify", SPIKED, "--json"))[0]["status"] == "ok"


def test_a_pool_that_is_too_small_is_said_to_be(pool: Path) -> None:
    few = "".join(f"{line}\n" for line in ids().splitlines()[: FEWEST - 1])
    told = deep("--json", "--quarantine-z", "0", stdin=few)
    assert (told.code, {row["z"] for row in rows(told)}) == (0, {None})
    line = f"too few adapters of {BASE} to compare: {FEWEST - 1} measured, {FEWEST} needed; "
    more = "lora pool list --where status=ok -q | lora pool verify - --deep measures all"
    assert line + more in told.err
    ok("pool", "rm", *ids().splitlines()[FEWEST - 1 :])
    told = deep(stdin=few)
    assert line + "the catalogue has no other usable ones" in told.err


def test_quarantine_keeps_an_adapter_out_of_select_until_a_verify_lifts_it(pool: Path) -> None:
    told = deep("--json", "--quarantine-z", Z)
    assert told.code == 5
    assert f"1 of 26 quarantined: {SPIKED}: z " in told.err
    assert rows(told)[0]["status"] == "quarantined"
    assert ids("--where", "status=quarantined").split() == [SPIKED]
    assert SPIKED not in ok("select", "--by", "random", "-k", "26").out.split()
    # It stays through other checks of the same files.
    ok("pool", "sync", "--from", "pool", "--force")
    ok("pool", "fetch", SPIKED, "--force")
    told = lora("pool", "verify", SPIKED, "--json")
    assert (told.code, rows(told)[0]["status"]) == (5, "quarantined")
    # Who names it gets it, and is told.
    told = ok("merge", SPIKED, ids("--where", "status=ok", "-n", "1").strip(), "-o", "merged")
    assert f"{SPIKED} is quarantined: z " in told.err
    told = lora("pool", "verify", SPIKED, "--deep", "--quarantine-z", "1000", "--json")
    assert (told.code, rows(told)[0]["status"]) == (0, "ok")
    assert SPIKED in ok("select", "--by", "random", "-k", "26").out.split()


def test_infinity_lifts_a_quarantine_when_the_pool_has_become_too_small(pool: Path) -> None:
    assert deep("--quarantine-z", Z).code == 5
    ok("pool", "rm", "-", stdin="\n".join(ids().splitlines()[: 27 - FEWEST]))
    assert lora("pool", "verify", SPIKED, "--deep", "--quarantine-z", Z).code == 5
    ok("pool", "verify", SPIKED, "--deep", "--quarantine-z", "inf")
    assert SPIKED in ids("--where", "status=ok")


def test_a_selection_is_used_without_the_adapters_that_were_quarantined_since(pool: Path) -> None:
    names = ids().splitlines()
    ok("select", "--by", "random", "-k", str(len(names)))
    deep("--quarantine-z", Z)
    plan = ok("merge", "-m", "linear", "--dry-run", "--json")
    assert f"left out, quarantined since: {SPIKED}" in plan.err
    assert len(json.loads(plan.out)["weights"]) == len(names) - 1


def test_of_many_measured_adapters_some_are_drawn_and_the_named_ones_are_there(pool: Path) -> None:
    deep()
    with Catalogue(Path(ok("pool", "path").out.strip())) as catalogue:
        every = catalogue.spreads.of(BASE)
        drawn = catalogue.spreads.of(BASE, most=5)
        missing = next(id for id in every if id not in drawn)
        assert len(drawn) == 5
        assert drawn == catalogue.spreads.of(BASE, most=5)
        assert catalogue.spreads.of(BASE, most=5, with_=[missing]) == {**drawn, missing: every[missing]}


def test_a_damaged_measure_counts_as_none(pool: Path) -> None:
    deep()
    with Catalogue(Path(ok("pool", "path").out.strip())) as catalogue:
        assert len(catalogue.spreads.of(BASE)) == 26
        with catalogue._db.writing() as db:
            db.execute("UPDATE spreads SET modules = x'00' WHERE rowid = (SELECT min(rowid) FROM spreads)")
        assert len(catalogue.spreads.of(BASE)) == 25


def test_a_new_version_is_out_of_quarantine_and_not_measured(pool: Path) -> None:
    deep("--quarantine-z", Z)
    shutil.rmtree(pool / "dave" / "spiked")
    write(pool / "dave" / "spiked", ordinary(0))
    ok("pool", "sync", "--from", "pool")
    with Catalogue(Path(ok("pool", "path").out.strip())) as catalogue:
        assert catalogue.get(SPIKED).status == "ok"
        assert SPIKED not in catalogue.spreads.of(BASE)
        catalogue.remove([id for id in catalogue.known() if id != SPIKED])
        assert catalogue.spreads.of(BASE) == {}


def test_a_merge_says_what_is_unusual_of_its_result_and_its_adapters(pool: Path) -> None:
    other = ids("-n", "1").strip()
    assert "unusual" not in ok("merge", SPIKED, other, "-o", "before").err
    score = rows(deep("--json"))[0]["z"]
    told = ok("merge", SPIKED, other, "-o", "after", "--json")
    found = {row["id"]: row for row in json.loads(told.out)["unusual"]}
    assert set(found) == {SPIKED, other, ""}
    assert found[SPIKED]["module"] == found[""]["module"] == MODULE
    assert found[SPIKED]["z"] == pytest.approx(score, rel=0.2)
    assert abs(found[""]["z"]) > 3
    lines = [line for line in told.err.splitlines() if "most unusual of" in line]
    assert [line.split(" beside 27 measured: ")[0] for line in lines] == [
        "  most unusual of the result",
        f"  most unusual of {SPIKED}",
    ]
    assert all(f"in {MODULE}, usual " in line for line in lines)
    # The files of the result do not depend on the pool.
    assert Path("before/adapter_model.safetensors").read_bytes() == Path("after/adapter_model.safetensors").read_bytes()
    assert Path("before/run.json").read_bytes() == Path("after/run.json").read_bytes()


def test_a_folder_is_verified_without_a_catalogue_being_made(made: Path, own_home: Path) -> None:
    told = lora("pool", "verify", str(made / "dave" / "spiked"), "--deep", "--json", "--db", "none.db")
    assert (told.code, rows(told)[0]["pool"]) == (0, 1)
    assert not Path("none.db").exists()


def test_a_catalogue_that_cannot_be_written_is_compared_with(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = rows(deep("--json"))[0]["z"]

    def full(*_: object) -> None:
        raise OutputError("no space left on the disk")

    monkeypatch.setattr(Spreads, "remember", full)
    assert rows(lora("pool", "verify", SPIKED, "--deep", "--json"))[0]["z"] == pytest.approx(score, rel=1e-4)


def test_quarantine_needs_deep(pool: Path) -> None:
    assert "--quarantine-z needs --deep" in refused(2, "pool", "verify", SPIKED, "--quarantine-z", Z)
