"""Many adapters evaluated together give what each gives alone: token by token, and their likelihoods to 1e-5."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.models import answering, room
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import stream
from lora_cli.models.kept import can_keep
from lora_cli.models.together import NotByRow, Together, blocks
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example
from lora_cli.steps.evaluate import groups as grouped
from lora_cli.steps.evaluate.evaluate import Row, System, evaluate, read_rows
from lora_cli.steps.evaluate.groups import MOST_TOGETHER, groups
from tests import architectures
from tests.tiny_bases import characters, gpt2, llama

BASE = System(name="base")
NEW = 6
TASK = [
    Example(id=f"{number}", prompt=f"shift: {word}", completion=answer)
    for number, (word, answer) in enumerate(
        [("abc", "cb"), ("abcdefgh", "hg"), ("b", "b"), ("bca", "acb"), ("cabbages", "g"), ("aa", "aaa"), ("h", "")]
    )
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def update(shape: tuple[int, int], rank: int, seed: int, size: float = 0.3) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    b, a = torch.randn(out_features, rank, generator=generator), torch.randn(rank, in_features, generator=generator)
    return LowRank(b * size / rank**0.5, a * size)


def adapter(base: BaseModel, name: str, modules: Sequence[str], rank: int, seed: int) -> System:
    """An adapter with random updates of the linear layers whose names end so, or of other matrices by full names."""
    found = {full for full in base.shapes if full.endswith(tuple(modules))} | set(
        modules
    ) & base.skeleton.matrices.keys()
    matrices = {full: base.skeleton.matrices[full] for full in sorted(found)}
    updates = {full: update(one.shape, rank, seed + place) for place, (full, one) in enumerate(matrices.items())}
    return System(name=name, updates=updates, version=f"{name}@{seed}")


def several(base: BaseModel) -> list[System]:
    """Adapters of several ranks, and of modules that all, some and none of them share."""
    suffixes = ("c_attn", "c_proj") if "transformer.h.0.attn.c_attn" in base.shapes else ("q_proj", "v_proj")
    down = ("c_fc",) if suffixes[0] == "c_attn" else ("down_proj", "o_proj")
    embedding = next(name for name, one in base.skeleton.matrices.items() if one.kind == "embedding")
    return [
        adapter(base, "one", suffixes, 3, 10),
        adapter(base, "two", [*suffixes, *down], 7, 20),
        adapter(base, "three", down, 1, 30),
        adapter(base, "first layer", [next(iter(base.shapes))], 2, 40),
        adapter(base, "head", ["lm_head"], 2, 50),
        adapter(base, "embedding", [embedding], 2, 60),
        System(name="nothing", updates={}, version="nothing"),
        System(
            name="twice one", updates={m: u.scaled(2.0) for m, u in (several_one(base, suffixes)).items()}, version="2"
        ),
    ]


def several_one(base: BaseModel, suffixes: Sequence[str]) -> Mapping[str, LowRank]:
    updates = adapter(base, "one", suffixes, 3, 10).updates
    assert updates is not None
    return updates


def rows_of(base: BaseModel, systems: Sequence[System], folder: Path, **options: Any) -> dict[tuple[str, str], Row]:
    file = folder / "rows.jsonl"
    file.unlink(missing_ok=True)
    evaluate(base, systems, TASK, EvalOptions(**{"max_new_tokens": NEW, **options}), rows_path=file)
    return {(row.system, row.id): row for row in read_rows(file)}


def alone(base: BaseModel, system: System) -> dict[str, tuple[str, int, float]]:
    """(text, tokens, likelihood) of each example: one system on the base, transformers' own generation."""
    encoded = base.encode_all(TASK)
    with base.applied(system.updates):
        likelihoods = base.mean_log_likelihoods(encoded, batch_size=2)
        made = dict(stream(base, [one.opening for one in encoded], max_new_tokens=NEW, batch_size=2))
    return {one.id: (made[place].text, made[place].tokens, likelihoods[place]) for place, one in enumerate(encoded)}


def demand_same(base: BaseModel, systems: Sequence[System], rows: Mapping[tuple[str, str], Row]) -> None:
    assert len(rows) == len(systems) * len(TASK)
    for system in systems:
        for id, (text, tokens, likelihood) in alone(base, system).items():
            row = rows[system.name, id]
            assert (row.text, row.tokens) == (text, tokens), (system.name, id)
            assert row.log_likelihood == pytest.approx(likelihood, rel=1e-5), (system.name, id)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_together_answer_as_each_alone(make: Any, tmp_path: Path) -> None:
    base = make()
    systems = [BASE, *several(base)]
    assert len(groups(base, systems, generates=True)) == 1
    rows = rows_of(base, systems, tmp_path)
    demand_same(base, systems, rows)
    assert len({row.text for row in rows.values()}) > len(TASK)
    assert max(row.tokens for row in rows.values()) == NEW


def test_neither_the_room_nor_a_shared_beginning_changes_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama()
    systems = [BASE, *several(base)]
    wanted = rows_of(base, systems, tmp_path)
    monkeypatch.setattr(answering, "_FEWEST_SHARED", 1 << 20)
    monkeypatch.setattr(answering, "_SPARE", 1)
    for limit in (5, 20):
        rows = rows_of(base, systems, tmp_path, batch_size=limit)
        assert {key: (row.text, row.tokens, row.key) for key, row in rows.items()} == {
            key: (row.text, row.tokens, row.key) for key, row in wanted.items()
        }


@pytest.mark.parametrize("metric", ["nll", "choice"])
def test_likelihoods_together_are_those_alone(metric: str, tmp_path: Path) -> None:
    base = llama()
    systems = [BASE, *several(base)]
    task = [
        Example(id=e.id, prompt=e.prompt, completion=e.completion, choices=(e.completion, "zz", "ba b")) for e in TASK
    ]
    together = evaluate(base, systems, task, EvalOptions(metric=metric), rows_path=tmp_path / "together.jsonl")
    for system in systems[1:]:
        evaluate(base, [BASE, system], task, EvalOptions(metric=metric), rows_path=tmp_path / f"{system.name}.jsonl")
        for one, other in zip(
            [
                row
                for row in sorted(read_rows(tmp_path / "together.jsonl"), key=lambda row: row.id)
                if row.system == system.name
            ],
            [
                row
                for row in sorted(read_rows(tmp_path / f"{system.name}.jsonl"), key=lambda row: row.id)
                if row.system == system.name
            ],
            strict=True,
        ):
            assert (one.id, one.text, one.key) == (other.id, other.text, other.key)
            assert (one.value, one.log_likelihood) == pytest.approx((other.value, other.log_likelihood), rel=1e-5)
    by_name = {score.system: score for score in together}
    assert (by_name["nothing"].details["moved"], by_name["nothing"].changed) == (0, 0)
    assert by_name["two"].details["moved"] == len(task)


class OutOfMemory:
    """A model that fails for more than `most` rows, as a device does or as the CPU does."""

    def __init__(self, base: BaseModel, most: int, error: RuntimeError) -> None:
        self.failures, self._most, self._error, self._real = 0, most, error, base.logits

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        found = self._real(tokens, positions, **options)
        if len(tokens) > self._most:
            self.failures += 1
            raise self._error
        return found


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_when_memory_runs_out_fewer_rows_go_at_once_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    base = llama()
    systems = [BASE, *several(base)]
    wanted = rows_of(base, systems, tmp_path)
    for most in (11, 40):
        failing = OutOfMemory(base, most, error)
        monkeypatch.setattr(base, "logits", failing)
        rows = rows_of(base, systems, tmp_path)
        assert failing.failures
        assert {key: (row.text, row.tokens) for key, row in rows.items()} == {
            key: (row.text, row.tokens) for key, row in wanted.items()
        }
        monkeypatch.undo()
    monkeypatch.setattr(base, "logits", OutOfMemory(base, 0, error))
    with pytest.raises(RuntimeError, match="memory"):
        rows_of(base, systems, tmp_path)


@pytest.mark.parametrize(("metric", "value"), [("exact", 0.0), ("nll", 103.2789), ("choice", 0.0)])
def test_an_adapter_whose_numbers_are_not_finite_fails_alone(metric: str, value: float, tmp_path: Path) -> None:
    base = llama()
    broken = adapter(base, "broken", ["q_proj"], 2, 5)
    assert broken.updates is not None
    next(iter(broken.updates.values())).A[0, 0] = torch.nan
    sound = several(base)[:2]
    task = [
        Example(id=e.id, prompt=e.prompt, completion=e.completion or "x", choices=(e.completion or "x", "zz"))
        for e in TASK
    ]
    options, file = EvalOptions(metric=metric, max_new_tokens=NEW), tmp_path / "rows.jsonl"
    scores = {
        score.system: score
        for score in evaluate(base, [BASE, sound[0], broken, sound[1]], task, options, rows_path=file)
    }
    apart = {score.system: score for score in evaluate(base, [BASE, *sound], task, options)}
    for system in sound:
        assert scores[system.name].value == pytest.approx(apart[system.name].value, rel=1e-5)
        assert "not_finite" not in scores[system.name].details
    failed = scores["broken"]
    assert failed.value == pytest.approx(value, rel=1e-6)
    assert (failed.log_likelihood, failed.details["not_finite"], failed.details["moved"]) == (
        None,
        len(task),
        len(task),
    )
    for line in file.read_text().splitlines():
        assert "NaN" not in line
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert evaluate(base, [BASE, sound[0], broken, sound[1]], task, options, rows_path=file) == [*scores.values()]


def test_a_base_whose_own_numbers_are_not_finite_is_refused() -> None:
    base = llama()
    base.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(Refused, match="the likelihood of example 0 is not finite in fp32"):
        evaluate(base, [BASE, *several(base)[:1]], TASK[:1], EvalOptions(max_new_tokens=NEW))


def test_a_base_that_mixes_rows_is_asked_one_adapter_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama()
    systems = [BASE, *several(base)]
    wanted = rows_of(base, systems, tmp_path)
    real = base.model.model.layers[1].mlp.forward
    monkeypatch.setattr(
        base.model.model.layers[1].mlp, "forward", lambda x: real(x.flatten(0, 1)[1:]).new_zeros(x.shape) + real(x)
    )
    together = Together(base, [None, systems[2].updates])
    together.arrange((0, 1), 2, 3)
    with together.applied(), pytest.raises(NotByRow):
        base.model(input_ids=torch.ones(2, 3, dtype=torch.long))
    rows = rows_of(base, systems, tmp_path)
    assert {key: row.text for key, row in rows.items()} == {key: row.text for key, row in wanted.items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_blocks_hold_every_row_once_with_its_owner_and_little_beside(owners: list[int]) -> None:
    found = blocks(owners)
    size = len(found.places) // len(found.owners)
    assert size * len(found.owners) == len(found.places)
    assert sorted(found.places[slot] for slot in found.live) == list(range(len(owners)))
    assert all(owners[place] == found.owners[slot // size] for slot, place in enumerate(found.places))
    assert len(found.owners) <= 2 * len(set(owners))
    assert len(found.places) <= 2 * len(owners) + len(set(owners))


def test_groups_hold_32_adapters_of_like_ranks_as_far_as_memory_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    systems = [adapter(base, f"a{seed}", ["q_proj"], 1 + seed % 3, seed) for seed in range(70)]
    found = groups(base, [*systems, BASE], generates=True)
    assert [len(group) for group in found] == [1 + MOST_TOGETHER, MOST_TOGETHER, 6]
    assert found[0][0] is BASE
    ranks = [max(system.ranks.values()) for group in found for system in group[0 if group is not found[0] else 1 :]]
    assert ranks == sorted(ranks, reverse=True)
    monkeypatch.setattr(grouped, "free_memory", lambda device: 1)
    assert [len(group) for group in groups(base, systems, generates=True)] == [1] * 70


def test_keys_of_rows_are_what_they_were(tmp_path: Path) -> None:
    base = llama()
    one = several(base)[0]
    rows = rows_of(base, [BASE, one], tmp_path)
    for system in (BASE, one):
        for example in TASK:
            deciding = [base.pinned, str(base.dtype), base.encoder.prompting.settings, system.version]
            deciding += [system.updates is None, "exact", NEW, asdict(example)]
            wanted = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
            assert rows[system.name, example.id].key == wanted


def test_the_rows_that_fit_follow_from_the_sizes_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    kept = room.row_bytes(base.model.config, 4, longest=1, judged=0).writing
    assert kept == 2 * 2 * 2 * 2 * 8 * 4  # twice keys and values, layers, heads, their size, bytes
    monkeypatch.setattr(room, "free_memory", lambda device: 100_000_000)
    free = room.Room(base, longest=20, judged=4)
    assert free.writing == 1024
    assert free.reading(20, 33) == 4096 // 20 // 33 * 33
    assert free.reading(2000, 33) == 2
    monkeypatch.setattr(room, "free_memory", lambda device: 2_000_000)
    little = room.Room(base, longest=20, judged=4)
    assert little.writing == 500_000 // (2 * 20 * 256)
    assert room.Room(base, longest=20, judged=4, limit=3).writing == 3
    while little.halve():
        pass
    assert (little.writing, little.reading(20, 33)) == (1, 1)


KINDS = (
    *("qwen3", "falcon", "phi3", "gemma3_text", "llama4_text", "qwen3_5_text", "nemotron_h", "phimoe", "qwen3_moe"),
    *("qwen2_moe", "deepseek_v3", "mixtral", "gpt_oss"),
)
WITHOUT_ROWS = ("llama4_text", "qwen3_5_text", "nemotron_h")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_together_answer_as_each_alone_on_every_architecture(kind: str, tmp_path: Path) -> None:
    base = BaseModel("acme/any", architectures.model(kind), characters())
    assert can_keep(base) == (kind not in WITHOUT_ROWS)
    layers = sorted(base.shapes)
    systems = [BASE] + [
        System(
            name=f"adapter {number}",
            updates={name: update(base.shapes[name], 2 + number, number, 0.2) for name in layers[number::3]},
            version=f"{number}",
        )
        for number in range(3)
    ]
    assert len(groups(base, systems, generates=False)) == 1
    demand_same(base, systems, rows_of(base, systems, tmp_path))
