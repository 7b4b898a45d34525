"""`lora pool similarity` from the sketches in the catalogue: right without any weights, and only where they count."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from lora_cli.checks.sketch import ERROR
from lora_cli.records import AdapterRef
from lora_cli.steps.pool.clusters import Similarity, average_linkage, cut_at, in_clusters
from tests.adapters_on_disk import Factors, random_factors, write_adapter
from tests.cli import lora, ok, refused

SHAPES = {f"model.layers.{layer}.self_attn.{kind}_proj": (32, 24) for layer in range(3) for kind in "qk"}
PART = {module: shape for module, shape in SHAPES.items() if "q_proj" in module}


def made() -> dict[str, tuple[Factors, float]]:
    """Factors and alpha/rank by name: two of their own, one of some modules, and copies of the first, near and far."""
    first, other = (random_factors(SHAPES, 4, seed=seed) for seed in (0, 1))
    near = {module: (b + 0.1 * other[module][0], a) for module, (b, a) in first.items()}
    far = {module: (b + other[module][0], a) for module, (b, a) in first.items()}
    part = {module: first[module] for module in PART}
    of = {
        "first": first,
        "near": near,
        "far": far,
        "part": part,
        "second": other,
        "third": random_factors(SHAPES, 8, seed=2),
    }
    return {name: (factors, scale) for (name, factors), scale in zip(of.items(), (1, 2, 0.5, 1, 3, 1), strict=True)}


def dense() -> dict[str, NDArray[np.float64]]:
    """Each whole update as one vector; a module that an adapter lacks is zero."""
    found = {}
    for name, (factors, scale) in made().items():
        updates = [
            scale * f[0].double().numpy() @ f[1].double().numpy() if (f := factors.get(m)) else np.zeros(shape)
            for m, shape in SHAPES.items()
        ]
        found[name] = np.concatenate([update.ravel() for update in updates])
    return found


@pytest.fixture
def pool(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """These adapters, catalogued and sketched."""
    monkeypatch.setenv("LORA_BASE", "acme/tiny")
    for name, (factors, scale) in made().items():
        rank = len(next(iter(factors.values()))[1])
        write_adapter(own_home / "pool" / name, factors, lora_alpha=scale * rank)
    ok("pool", "sync", "--from", "pool")
    ok("pool", "verify", *(f"pool/{name}" for name in made()), "--deep")
    return own_home / "pool"


def alike(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("pool", "similarity", *words, "--json").out)
    return found


def named(found: dict[str, Any]) -> list[str]:
    return [row["id"].removeprefix("pool/") for row in found["rows"]]


def clusters(found: dict[str, Any]) -> set[tuple[str, ...]]:
    labels: dict[int, list[str]] = {}
    for row in found["rows"]:
        labels.setdefault(row["cluster"], []).append(row["id"].removeprefix("pool/"))
    return {tuple(sorted(names)) for names in labels.values()}


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/adapter_model.safetensors"))


def test_cosines_norms_and_clusters_need_no_weights(pool: Path) -> None:
    exact = alike("--exact")
    for file in weights(pool):
        file.unlink()
    found = alike("--plot", "pool.svg")
    assert (found["from"], found["standard_error"], exact["from"], exact["standard_error"]) == (
        "sketches", ERROR, "weights", None,
    )  # fmt: skip
    vectors = dense()
    flat = np.stack([vectors[name] for name in named(found)])
    lengths = np.linalg.norm(flat, axis=1)
    want, have = flat @ flat.T / np.outer(lengths, lengths), np.array(found["cosines"])
    # Of a copy that is near the error is smaller: (1 − c²) of that of unrelated ones.
    assert (np.abs(have - want) <= 4 * ERROR * (1 - want**2) + 1e-3).all()
    assert np.array_equal(have.diagonal(), np.ones(6))
    assert [row["norm"] for row in found["rows"]] == pytest.approx(lengths.tolist(), rel=1e-6)
    nearest = {row["id"]: row["nearest"] for row in found["rows"]}
    assert (nearest["pool/near"], nearest["pool/first"]) == ("pool/first", "pool/near")
    for key in ("base", "modules", "cut"):
        assert found[key] == exact[key], key
    assert clusters(found) == clusters(exact) == {("far", "first", "near", "part"), ("second",), ("third",)}
    assert Path("pool.svg").read_text().count("<svg") == 1
    assert "its folder is gone" in refused(5, "pool", "similarity", "--exact")


def test_every_form_of_a_name_means_its_adapter(pool: Path) -> None:
    pinned = {row["id"]: f"{row['id']}@{row['commit']}" for row in alike()["rows"]}
    want = alike("pool/first", "pool/second")
    for first in (pinned["pool/first"], pinned["pool/first"][:-30], str(pool / "first")):
        assert alike(first, pinned["pool/second"]) == want
    assert "commit 0000000 is not available here" in refused(
        3, "pool", "similarity", "pool/first@0000000", "pool/second"
    )


def test_torch_is_not_imported(pool: Path) -> None:
    ask = "from lora_cli.app import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    script = f"import sys\n{ask}print('torch' in sys.modules, file=sys.stderr)"
    words = [sys.executable, "-c", script, "pool", "similarity", "-q"]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    assert len(told.stdout.split()) == 6
    assert told.stderr.endswith("False\n")


def test_the_screen_says_where_cosines_come_from(pool: Path) -> None:
    told = lora("pool", "similarity").err
    assert "cosines estimated from sketches: standard error 0.022 for unrelated adapters" in told
    assert "acme/tiny: its config.json was not here when they were sketched" in told
    assert "cosines computed from the weights\n" in lora("pool", "similarity", "--exact").err
    write_adapter(pool / "new", random_factors(SHAPES, 2, seed=7))
    ok("pool", "sync", "--from", "pool")
    why = (
        "1 of 3 adapters has no sketch of the files as they are, pool/new: lora pool sync, then lora pool verify --deep"
    )
    assert why in lora("pool", "similarity", "pool/first", "pool/new", "pool/far").err
    assert alike("pool/first", "pool/far")["from"] == "sketches"
    ok("pool", "verify", "pool/new", "--deep")
    assert alike("pool/first", "pool/new")["from"] == "sketches"


def test_a_sketch_of_other_weights_does_not_count(pool: Path) -> None:
    file = pool / "third" / "adapter_model.safetensors"
    file.write_bytes((pool / "first" / "adapter_model.safetensors").read_bytes())
    (pool / "third" / "adapter_config.json").write_bytes((pool / "first" / "adapter_config.json").read_bytes())
    for _ in ("before the sync", "after it"):
        found = alike("pool/first", "pool/third")
        assert (found["from"], found["cosines"][0][1]) == ("weights", pytest.approx(1, abs=1e-6))
        ok("pool", "sync", "--from", "pool")
    ok("pool", "verify", "pool/third", "--deep")
    found = alike("pool/first", str(pool / "third"))
    assert (found["from"], found["cosines"][0][1]) == ("sketches", pytest.approx(1, abs=1e-6))
    os.utime(file, (0, 0))
    assert alike("pool/first", "pool/third")["from"] == "weights", "nobody knows whether it was written to"
    ok("pool", "sync", "--from", "pool")
    assert alike("pool/first", "pool/third")["from"] == "sketches", "the same bytes have the same commit"


def test_sketches_with_the_names_of_the_base_are_not_mixed_with_others(pool: Path) -> None:
    base = pool.parent / "base"
    base.mkdir()
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ok("pool", "sync", "base", "--from", "pool", "--alias", "acme/tiny")
    ok("pool", "verify", "pool/first", "--deep", "--base", "base")
    both = ("pool", "similarity", "pool/first", "pool/near", "--base", "base")
    assert "some were sketched before the base's config.json was here" in ok(*both).err
    ok("pool", "verify", "pool/near", "--deep", "--base", "base")
    told = ok(*both).err
    assert "estimated from sketches" in told
    assert "not checked" not in told


def test_sketches_of_other_bases_or_names_are_not_compared(pool: Path) -> None:
    renamed = {module.replace("model.", "model.decoder."): pair for module, pair in made()["first"][0].items()}
    write_adapter(pool / "renamed", renamed)
    write_adapter(pool / "stranger", random_factors(SHAPES, 2, seed=3), base="acme/other")
    ok("pool", "sync", "--from", "pool")
    ok("pool", "sync", "acme/other", "--from", "pool")
    ok("pool", "verify", "pool/renamed", "--deep")
    ok("pool", "verify", "pool/stranger", "--deep", "--base", "acme/other")
    assert "name their modules differently" in refused(5, "pool", "similarity", "pool/first", "pool/renamed")
    assert "is for acme/other, not for acme/tiny" in refused(5, "pool", "similarity", "pool/first", "pool/stranger")


def test_many_adapters_are_in_the_order_of_their_clusters() -> None:
    rng, n = np.random.default_rng(0), 601
    families = rng.integers(40, size=n)
    directions = rng.standard_normal((40, 64))[families] + 0.1 * rng.standard_normal((n, 64))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    refs = [AdapterRef(id=f"a{i}", commit=f"{i:040x}", source="folder", repo=f"/a{i}") for i in range(n)]

    def clustered(order: NDArray[np.int64]) -> list[tuple[str, int]]:
        rows = directions[order]
        cosines = rows @ rows.T
        np.fill_diagonal(cosines, 1)
        pool = Similarity(refs=tuple(refs[i] for i in order), cosines=cosines, norms=(1.0,) * n, modules=1)
        found = in_clusters(pool, 0.7)
        places = [int(ref.id[1:]) for ref in found.similarity.refs]
        at = np.argsort(order)[places]
        np.testing.assert_array_equal(found.similarity.cosines, cosines[np.ix_(at, at)])
        return [*zip((ref.id for ref in found.similarity.refs), found.labels, strict=True)]

    first = clustered(np.arange(n))
    assert clustered(rng.permutation(n)) == first
    assert [label for _, label in first] == sorted(label for _, label in first)
    assert len({(families[int(id[1:])], label) for id, label in first}) == len({*families}) == first[-1][1]


@pytest.mark.parametrize("seed", range(12))
def test_the_tree_and_its_clusters_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((int(rng.integers(2, 60)), 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    distances = (1 - points @ points.T).clip(0)
    np.fill_diagonal(distances, 0)
    tree = average_linkage(distances)
    np.testing.assert_allclose(tree, hierarchy.linkage(squareform(distances, checks=False), "average"), atol=1e-12)
    for cut in (0.2, 0.5, 0.9, 2.0):
        leaves, labels = cut_at(tree, cut)
        assert leaves == hierarchy.leaves_list(tree).tolist()
        theirs = hierarchy.fcluster(tree, cut, "distance")[leaves].tolist()
        assert len(set(zip(labels, theirs, strict=True))) == len(set(labels)) == len(set(theirs))
        assert labels == sorted(labels)


def test_copies_join_at_once_whatever_their_number() -> None:
    leaves, labels = cut_at(average_linkage(np.zeros((40, 40))), 0.0)
    assert sorted(leaves) == list(range(40))
    assert set(labels) == {1}
