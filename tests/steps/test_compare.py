"""Comparisons of adapters against dense float64 arithmetic: pairs, whole pools, near copies, clusters; the commands."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.pairs import all_pairs, cosines
from lora_cli.errors import Refused, UsageError
from lora_cli.steps.pool.clusters import in_clusters
from lora_cli.steps.pool.compare import Diff, diff, near_copies, similarity
from tests.adapters_on_disk import Factors, random_factors, write_adapter
from tests.cli import ok, refused
from tests.formats.test_wild import WILD
from tests.steps.test_merge import SHAPES, deltas, opened

Q = {module: shape for module, shape in SHAPES.items() if "q_proj" in module}
FP32 = (torch.float32, torch.float64)
NARROW = ((torch.int8, *FP32), (torch.bfloat16, *FP32), FP32)


def dense(folder: Path) -> np.ndarray:
    """The whole update as one vector, absent modules zero."""
    found = deltas(folder)
    parts = [found[m].numpy() if m in found else np.zeros(shape) for m, shape in SHAPES.items()]
    return np.concatenate([part.ravel() for part in parts])


def dense_cosines(folders: Sequence[Path]) -> np.ndarray:
    vectors = np.stack([dense(folder) for folder in folders])
    lengths = np.linalg.norm(vectors, axis=1)
    return vectors @ vectors.T / np.outer(lengths, lengths)


def nudged(factors: Factors, size: float, seed: int) -> Factors:
    """A near copy: every B moved by noise of a relative size."""
    g = torch.Generator().manual_seed(seed)
    return {m: (b + size * b.std() * torch.randn(b.shape, generator=g), a) for m, (b, a) in factors.items()}


@pytest.fixture
def pool(tmp_path: Path) -> list[Path]:
    """Mixed ranks, scales and modules; the last two are near copies of the first."""
    first = random_factors(SHAPES, 4, seed=1)
    return [
        write_adapter(tmp_path / "first", first, lora_alpha=8),
        write_adapter(tmp_path / "narrow", random_factors(Q, 9, seed=2), lora_alpha=3, use_rslora=True),
        write_adapter(tmp_path / "other", random_factors(SHAPES, 2, seed=3)),
        write_adapter(tmp_path / "copy", nudged(first, 0.1, 4)),
        write_adapter(tmp_path / "weaker", nudged(first, 0.05, 5), lora_alpha=1),
    ]


def test_two_adapters_module_by_module_as_in_dense_arithmetic(pool: list[Path]) -> None:
    one, other = pool[0], pool[1]
    found = diff(opened(one), opened(other))
    first, second = deltas(one), deltas(other)
    assert {m.module for m in found.modules} == {*SHAPES}
    for m in found.modules:
        x = first[m.module].numpy()
        assert m.one.norm == pytest.approx(np.linalg.norm(x), rel=1e-12)
        assert np.allclose(m.one.spectrum, np.linalg.svd(x)[1][:4], rtol=1e-10)
        if m.module not in second:
            assert (m.other.norm, m.other.spectrum, m.cosine, m.outputs, m.inputs) == (0, (), None, (), ())
            assert (m.other.effective_rank, m.other.stable_rank) == (0, 0)
            continue
        y = second[m.module].numpy()
        u, s, vh = np.linalg.svd(y, full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        share = s[:rank] ** 2 / (s[:rank] ** 2).sum()
        assert m.other.rank == rank
        assert m.other.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
        assert m.other.stable_rank == pytest.approx(1 / share[0], rel=1e-9)
        assert m.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
        left, _, right = np.linalg.svd(x)
        expected = np.rad2deg(np.sort(subspace_angles(left[:, :4], u[:, :rank])))
        assert np.allclose(m.outputs, expected, atol=1e-4)
        expected = np.rad2deg(np.sort(subspace_angles(right[:4].T, vh[:rank].T)))
        assert np.allclose(m.inputs, expected, atol=1e-4)
    assert found.norms == pytest.approx([np.linalg.norm(dense(folder)) for folder in (one, other)], rel=1e-12)
    assert found.cosine == pytest.approx(dense_cosines([one, other])[0, 1], abs=1e-12)


def test_a_diff_does_not_see_how_an_update_is_factored(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 4, seed=1, dtype=torch.float64)
    g = torch.Generator().manual_seed(9)
    turns = {m: torch.randn(4, 4, generator=g, dtype=torch.float64) for m in SHAPES}
    same = {m: (b @ turns[m], torch.linalg.solve(turns[m], a)) for m, (b, a) in factors.items()}
    wider = {m: (torch.cat([b, b], 1) / 2, torch.cat([a, a])) for m, (b, a) in factors.items()}
    third = opened(write_adapter(tmp_path / "third", random_factors(SHAPES, 3, seed=2, dtype=torch.float64)))
    forms = [
        diff(opened(write_adapter(tmp_path / name, made)), third)
        for name, made in (("plain", factors), ("same", same), ("wider", wider))
    ]
    for form in forms[1:]:
        for want, have in zip(forms[0].modules, form.modules, strict=True):
            assert have.one.spectrum == pytest.approx(want.one.spectrum, rel=1e-9)
            assert have.outputs + have.inputs == pytest.approx(want.outputs + want.inputs, abs=1e-6)
            assert have.cosine == pytest.approx(want.cosine, abs=1e-10)
    copies = diff(opened(tmp_path / "plain"), opened(tmp_path / "wider"))
    assert copies.cosine == pytest.approx(1)
    assert max(max(m.outputs + m.inputs) for m in copies.modules) < 1e-6


@pytest.mark.parametrize("size", [1e-150, 1e60])
def test_figures_of_a_diff_do_not_depend_on_the_size_of_an_update(size: float, tmp_path: Path) -> None:
    one, other = (random_factors(SHAPES, 3, seed=seed, dtype=torch.float64) for seed in (1, 2))
    plain = [write_adapter(tmp_path / name, factors) for name, factors in (("one", one), ("other", other))]
    sized = {module: (b * size, a) for module, (b, a) in other.items()}
    wanted, found = diff(*map(opened, plain)), diff(opened(plain[0]), opened(write_adapter(tmp_path / "sized", sized)))
    assert found.cosine == pytest.approx(wanted.cosine)
    assert found.chance == pytest.approx(wanted.chance)
    assert found.norms[1] == pytest.approx(wanted.norms[1] * size)
    for here, there in zip(found.modules, wanted.modules, strict=True):
        assert here.other.stable_rank == pytest.approx(there.other.stable_rank)
        assert here.other.effective_rank == pytest.approx(there.other.effective_rank)


def test_an_update_too_large_for_any_figure_is_refused(pool: list[Path], tmp_path: Path) -> None:
    giant = write_adapter(tmp_path / "giant", random_factors(SHAPES, 2, seed=1), lora_alpha=1e120)
    assert "too large to compute with" in refused(5, "diff", str(pool[0]), str(giant))


def test_the_cosine_of_random_directions_spreads_as_said(tmp_path: Path) -> None:
    found: list[Diff] = []
    adapters = [opened(write_adapter(tmp_path / str(i), random_factors(SHAPES, 3, seed=i))) for i in range(12)]
    for i, one in enumerate(adapters):
        found += [diff(one, other) for other in adapters[:i]]
    spread = np.sqrt(np.mean([one.cosine**2 for one in found if one.cosine is not None]))
    assert spread == pytest.approx(np.mean([one.chance for one in found]), rel=0.25)


def test_all_cosines_of_a_pool_whatever_its_order(pool: list[Path]) -> None:
    want = dense_cosines(pool)
    found = similarity([opened(folder) for folder in pool])
    assert np.allclose(found.cosines, want, atol=1e-4)
    assert np.array_equal(found.cosines, found.cosines.T)
    assert np.array_equal(found.cosines.diagonal(), np.ones(5))
    assert found.norms == pytest.approx([np.linalg.norm(dense(folder)) for folder in pool], rel=1e-6)
    backwards = similarity([opened(folder) for folder in reversed(pool)])
    assert np.allclose(backwards.cosines[::-1, ::-1], want, atol=1e-4)


def test_an_adapter_that_changes_nothing_is_like_no_other(pool: list[Path], tmp_path: Path) -> None:
    zero = {m: (torch.zeros_like(b), a) for m, (b, a) in random_factors(SHAPES, 4, seed=8).items()}
    still = write_adapter(tmp_path / "still", zero)
    found = similarity([opened(pool[0]), opened(still)])
    assert found.cosines.tolist() == [[1, 0], [0, 0]]
    assert diff(opened(pool[0]), opened(still)).cosine is None
    assert "still changes nothing" in ok("pool", "similarity", str(pool[0]), str(still)).err
    assert "B changes nothing" in ok("diff", str(pool[0]), str(still)).err


def test_shapes_that_contradict_each_other_are_refused(pool: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "larger", random_factors({next(iter(SHAPES)): (7, 5)}, 2, seed=1))
    for compare in (lambda a, b: diff(a, b), lambda a, b: similarity([a, b])):
        with pytest.raises(Refused, match="7×5"):
            compare(opened(pool[0]), opened(other))


def families(out: int, inn: int) -> dict[str, list[LowRank]]:
    """Updates that are hard on narrow precisions, by what makes them so."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    b, a = normal(out, 4), normal(4, inn)
    near = [LowRank(b + size * normal(out, 4), a) for size in torch.logspace(-4, 1, 24).tolist()]
    signs = [LowRank(1.003e-4 * torch.sign(normal(out, 4)), a) for _ in range(24)]
    one = [LowRank(b[:, :1] + size * normal(out, 1), a[:1]) for size in torch.logspace(0, 2, 24).tolist()]
    cancel = [
        LowRank(torch.cat([b[:, :1] + 0.01 * normal(out, 1), -b[:, :1]], 1), a[:1] + 1e-3 * normal(2, inn))
        for _ in range(24)
    ]
    mixed = [LowRank(normal(out, r), normal(r, inn)) for r in (1, 2, 7, 16, 3, 64, 5, 4) * 3]
    return {"near copies": near, "same A, signs": signs, "rank 1": one, "cancelling": cancel, "mixed ranks": mixed}


@pytest.mark.parametrize("precisions", NARROW, ids=["int8", "bf16", "fp32"])
def test_cosines_are_right_in_whatever_precision_the_first_look_was(precisions: tuple[torch.dtype, ...]) -> None:
    for name, updates in families(200, 300).items():
        flat = torch.stack([(u.B.double() @ u.A.double()).flatten() for u in updates])
        lengths = flat.norm(dim=1)
        products = all_pairs(updates, workers=2, precisions=precisions)
        found = cosines(products)
        assert float((found - flat @ flat.T / lengths[:, None] / lengths).abs().max()) < 1e-4, name
        assert torch.equal(found, found.T), name
        assert torch.equal(found.diag(), torch.ones(24, dtype=torch.float64)), name
        assert torch.allclose(products.diag(), lengths.square(), rtol=1e-9), name


def test_tiles_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.algebra.pairs._ROWS", 8)
    updates = [*families(20, 30)["mixed ranks"], LowRank(torch.zeros(20, 0), torch.zeros(0, 30))]
    flat = torch.stack([u.dense().double().flatten() for u in updates])
    lengths = flat.norm(dim=1)
    error = (all_pairs(updates) - flat @ flat.T).abs()
    assert bool((error <= 1e-4 * lengths[:, None] * lengths).all())
    assert all_pairs([]).shape == (0, 0)


def test_near_copies_are_left_out_once_whatever_their_order(pool: list[Path]) -> None:
    adapters = [opened(folder) for folder in pool]
    alike = {a.ref.id for a in adapters if a.ref.id.rpartition("/")[2] in ("first", "copy", "weaker")}
    found = near_copies(adapters, 0.95)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in near_copies(adapters[::-1], 0.95)]
    kept = min((a for a in adapters if a.ref.id in alike), key=lambda a: (a.ref.commit, a.ref.id))
    assert {one.ref.id for one, _, _ in found} == {kept.ref.id}
    assert {copy.ref.id for _, copy, _ in found} == alike - {kept.ref.id}
    want = dense_cosines(pool)
    places = {a.ref.id: i for i, a in enumerate(adapters)}
    for one, copy, cosine in found:
        assert cosine == pytest.approx(want[places[one.ref.id], places[copy.ref.id]], abs=1e-4)
    assert near_copies(adapters, 0.9999) == []
    for wrong in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(UsageError):
            near_copies(adapters, wrong)


def test_byte_equal_adapters_are_copies_even_at_cosine_one(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 4, seed=1)
    twins = [opened(write_adapter(tmp_path / name, factors)) for name in ("b", "a")]
    ((kept, copy, cosine),) = near_copies(twins, 1.0)
    assert (kept.ref.id.rpartition("/")[2], copy.ref.id.rpartition("/")[2]) == ("a", "b")
    assert cosine == pytest.approx(1)


def test_clusters_hold_what_is_alike(pool: list[Path]) -> None:
    adapters = [opened(folder) for folder in pool]
    names = [ref.id for ref in in_clusters(similarity(adapters), 0.5).similarity.refs]
    for order in (adapters, adapters[::-1]):
        found = in_clusters(similarity(order), 0.5)
        by_cluster: dict[int, set[str]] = {}
        for ref, label in zip(found.similarity.refs, found.labels, strict=True):
            by_cluster.setdefault(label, set()).add(ref.id.rpartition("/")[2])
        assert sorted(map(sorted, by_cluster.values())) == [["copy", "first", "weaker"], ["narrow"], ["other"]]
        assert [ref.id for ref in found.similarity.refs] == names
        assert [*found.labels] == sorted(found.labels)
    assert set(in_clusters(similarity(adapters), -1).labels) == {1}


def test_diff_tells_norms_angles_and_a_verdict(pool: list[Path]) -> None:
    first, other, copy = (str(pool[i]) for i in (0, 2, 3))
    told = ok("diff", first, copy)
    assert len(told.out.splitlines()) == len(SHAPES)
    assert "near copies" in told.err
    document = json.loads(ok("diff", first, other, "--json").out)
    assert document["cosine"] == pytest.approx(dense_cosines([pool[0], pool[2]])[0, 1], abs=1e-9)
    assert {row["module"] for row in document["rows"]} == {*SHAPES}
    assert len(document["rows"][0]["spectrum_a"]) == 4
    assert len(document["rows"][0]["angles_out"]) == 2
    narrow = ok("diff", first, str(pool[1]))
    assert "only A changes" in narrow.err
    assert ok("diff", first, other, "--csv").out.startswith("module,")


def test_similarity_tells_clusters_and_the_nearest(pool: list[Path]) -> None:
    words = [str(folder) for folder in pool]
    document = json.loads(ok("pool", "similarity", *words, "--json").out)
    ids = [row["id"].rpartition("/")[2] for row in document["rows"]]
    order = [[folder.name for folder in pool].index(id) for id in ids]
    assert np.allclose(document["cosines"], dense_cosines(pool)[order][:, order], atol=1e-4)
    nearest = {row["id"].rpartition("/")[2]: row["nearest"].rpartition("/")[2] for row in document["rows"]}
    assert nearest["copy"] == "first"
    assert len(ok("pool", "similarity", *words, "-k", "2", "-q").out.splitlines()) == 2
    assert "at --cut 0.5: 1" in ok("pool", "similarity", *words).err


def test_what_cannot_be_compared_is_said_in_a_line(pool: list[Path], tmp_path: Path) -> None:
    first = str(pool[0])
    stranger = write_adapter(tmp_path / "stranger", random_factors(SHAPES, 2, seed=1), base="acme/other")
    assert "two base models" in refused(5, "diff", first, str(stranger))
    assert ".png or .svg" in refused(2, "diff", first, first, "--plot", "a.jpg")
    assert ".png or .svg" in refused(2, "pool", "similarity", first, first, "--plot", "picture")
    assert "too few" in refused(3, "pool", "similarity", first)
    assert "--cut" in refused(2, "pool", "similarity", first, str(pool[1]), "--cut", "1")
    assert "without =WEIGHT" in refused(2, "pool", "similarity", f"{pool[0].name}=1", "x=2")
    assert "not in the catalogue" in refused(3, "diff", first, "nobody-knows")


@pytest.mark.skipif(not WILD.is_dir(), reason=f"the real adapters are not here: no {WILD}")
@pytest.mark.parametrize(
    ("one", "other", "cosine"),
    [
        ("justbautista__fine-tuning__emotion_lora_model", "justbautista__fine-tuning__therapist_lora_model", 0.051),
        ("ao-wei__gemma3-270m-svg-lora-partb__adapter", "ao-wei__gemma3-270m-svg-lora-partb__adapter_seed123", 0.998),
        ("zouhe0__LLM-Homework__adapter", "ao-wei__gemma3-270m-svg-lora-partb__adapter", 0.123),
    ],
)
def test_real_adapters_are_as_alike_as_known(one: str, other: str, cosine: float) -> None:
    adapters = [opened(WILD / "adapters" / name) for name in (one, other)]
    assert diff(*adapters).cosine == pytest.approx(cosine, abs=5e-4)
    assert float(similarity(adapters).cosines[0, 1]) == pytest.approx(cosine, abs=5e-4)
    assert len(near_copies(adapters, 0.95)) == (cosine > 0.95)
