"""`lora select --by race` with --max-per-author and --dedupe, from a folder of adapters to a fit over those chosen."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lora_cli.models.ref import load
from lora_cli.recipes import Recipe, TrainOptions
from lora_cli.steps.train.train import train
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.tiny_bases import examples, opened, saved

pytestmark = pytest.mark.usefixtures("one_thread")
N = 24
SHAPES = {f"model.layers.{layer}.self_attn.o_proj": (32, 32) for layer in range(2)}


def learnt(name: str, seed: int) -> None:
    """A LoRA trained on the task."""
    folder = Path("pool", name)
    folder.mkdir(parents=True)
    base, recipe = load("base", name="acme/tiny"), Recipe(steps=60, lr=1e-2, seed=seed)
    train(base, examples(64), folder, options=TrainOptions(rank=8, dropout=0.0), recipe=recipe)


def copied(name: str, of: str, noise: float = 0.0) -> None:
    """The same adapter again, of the same bytes or with a little noise on B."""
    if not noise:
        shutil.copytree(Path("pool", of), Path("pool", name))
        return
    adapter, generator = opened(Path("pool", of)), torch.Generator().manual_seed(0)
    read = {module: adapter.read(module) for module in adapter.modules}
    factors = {
        module: (one.B + noise * one.B.std() * torch.randn(one.B.shape, generator=generator), one.A)
        for module, one in read.items()
    }
    write_adapter(Path("pool", name), factors, lora_alpha=8)


def synced() -> None:
    """Catalogue the pool, with sketches."""
    ok("pool", "sync")
    ok("pool", "verify", "--deep", *ok("pool", "list", "-q").out.split())


@pytest.fixture
def pool(own_home: Path) -> list[str]:
    """Two adapters of one author that know the task, copies of the first by others, and noise; synced and sketched."""
    saved(own_home / "base")
    rows = [{"id": one.id, "prompt": one.prompt, "completion": one.completion} for one in examples(N)]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learnt("ann/first", 0)
    learnt("ann/second", 1)
    copied("bob/same", "ann/first")
    copied("cat/near", "ann/first", noise=0.01)
    for seed, name in enumerate(("ann/noise", *(f"author{number}/noise" for number in range(16)))):
        write_adapter(Path("pool", name), random_factors(SHAPES, 2, seed=seed), lora_alpha=1)
    Path("lora.toml").write_text('base = "base"\nbase_aliases = ["acme/tiny"]\npool = "pool"\n')
    synced()
    return sorted(f"pool/{config.parent.relative_to('pool')}" for config in Path("pool").rglob("adapter_config.json"))


def dense(name: str) -> torch.Tensor:
    """The whole update of an adapter as one vector, over all modules that any of these has."""
    base, adapter = load("base"), opened(Path(name))
    parts = [
        adapter.read(module).dense().flatten() if module in adapter.modules else torch.zeros(out * into)
        for module, (out, into) in sorted(base.shapes.items())
    ]
    return torch.cat(parts)


def by_hand(ranked: list[str], k: int, most: int, cosine: float) -> list[str]:
    """The first k of a ranking that are no copies of better ones, and no more than `most` of an author."""
    taken: list[str] = []
    updates = {name: dense(name) for name in ranked}
    for name in ranked:
        author = name.split("/")[1]
        near = [float(torch.cosine_similarity(updates[name], updates[one], dim=0)) for one in taken]
        if sum(one.split("/")[1] == author for one in taken) < most and max(near, default=0) < cosine:
            taken.append(name)
    return taken[:k]


@pytest.mark.slow
def test_a_race_with_a_limit_per_author_and_without_copies_chooses_what_a_full_evaluation_does(
    pool: list[str],
) -> None:
    every = ("select", "--data", "task.jsonl", "--metric", "nll", "--json", "--by")
    ranked = [row["id"] for row in json.loads(ok(*every, "evaluation", "-k", "99").out)["rows"]]
    assert sorted(ranked) == pool
    assert {*ranked[:4]} == {"pool/ann/first", "pool/ann/second", "pool/bob/same", "pool/cat/near"}
    shutil.rmtree("lora-runs")
    Path(os.environ["LORA_DB"]).unlink()
    synced()

    limited = ("-k", "2", "--max-per-author", "1", "--dedupe", "0.98", "--explain", "--name", "raced")
    told = ok(*every, "race", *limited)
    found = json.loads(told.out)
    chosen = [row["id"] for row in found["rows"]]
    assert chosen == by_hand(ranked, 2, 1, 0.98)
    assert len({one.split("/")[1] for one in chosen}) == 2
    assert sum(one in {"pool/ann/first", "pool/bob/same", "pool/cat/near"} for one in chosen) == 1
    why = {row["id"]: row["why"] for row in found["explained"]}
    passed = {id: reason.split(":")[0] for id, reason in why.items() if reason.startswith("--")}
    assert {*passed.values()} <= {"--dedupe 0.98", "--max-per-author 1"}
    assert "--dedupe 0.98" in passed.values()
    assert "race: " in told.err
    assert "% saved" in told.err
    # It depends on which of the three is the best.
    left_out = ("left out 1 near copy and 1 of the same weights", "left out 2 near copies")
    assert any(words in told.err for words in left_out)

    # Without the limits the copies are among the first.
    freely = json.loads(ok(*every, "race", "-k", "4").out)["rows"]
    assert [row["id"] for row in freely] == ranked[:4]

    folder = ok("fit", "--selection", "raced", "--data", "task.jsonl", "--steps", "5", "--init", "average").out.strip()
    adapters = json.loads(Path(folder, "coefficients.json").read_text())["adapters"]
    assert sorted(one.partition("@")[0] for one in adapters) == sorted(chosen)
