"""The memory of a fit, counted by a step on tensors without data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_cli.models.counted import most_held, without_data
from lora_cli.models.encode import Encoded
from lora_cli.models.ref import load_encoder
from lora_cli.steps.memory import held_by_fit
from tests.paths import ROOT
from tests.tiny_bases import examples, saved

RANKS = {"model.layers.0.self_attn.q_proj": 12, "model.layers.1.mlp.down_proj": 5, "not.there": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoded(base: Path) -> list[Encoded]:
    return load_encoder(str(base)).encode_all(examples(16))


def held(base: Path, encoded: list[Encoded], **more: object) -> dict[str, int]:
    options = {"batch": 8, "recompute": False, **more}
    found = held_by_fit(base, torch.float32, RANKS, encoded, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_bytes_live_from_the_operation_that_makes_them_until_they_are_freed() -> None:
    weight = torch.empty(100, 50, device="meta")
    x = torch.empty(10, 50, device="meta", requires_grad=True)

    def work() -> None:
        y = x @ weight.T  # 10 × 100
        z = torch.relu(y)  # 10 × 100, while y lives
        del y
        z.exp()  # 10 × 100, while z lives; the graph holds z, and not y

    assert most_held(work) == (2 * 4 * 10 * 100, 2 * 4 * 10 * 100)
    assert most_held(lambda: weight.T[:10]) == (0, 0)


def test_base_and_adapters_are_counted_to_the_byte(base: Path, encoded: list[Encoded]) -> None:
    found = held(base, encoded)
    numbers = sum(parameter.numel() for parameter in without_data(base, torch.float32, named="x").model.parameters())
    assert found["base"] == 4 * numbers
    assert found["adapters"] == 4 * (12 * (32 + 32) + 5 * (32 + 48))


def test_values_grow_with_the_batch_and_fall_where_layers_are_computed_again(
    base: Path, encoded: list[Encoded]
) -> None:
    values = held(base, encoded)["values"]
    assert held(base, encoded, batch=4)["values"] == pytest.approx(values / 2, rel=0.1)
    assert held(base, encoded, recompute=True)["values"] < 0.7 * values


def test_attention_keeps_no_scores(base: Path, encoded: list[Encoded]) -> None:
    def values(length: int) -> int:
        long = [encoded[0]._replace(ids=(5,) * length, start=length - 4)] * 2
        return held(base, long)["values"]

    assert values(60) < 2.2 * values(30)


def test_a_model_that_cannot_be_counted_has_no_count(tmp_path: Path, encoded: list[Encoded]) -> None:
    assert held_by_fit(tmp_path, torch.float32, RANKS, encoded, batch=8, recompute=False) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "environment"),
    [(False, {"MALLOC_MMAP_THRESHOLD_": "131072"}), (True, {})],  # --grad-checkpointing sets that itself
    ids=["memory given back", "--grad-checkpointing"],
)
def test_the_count_is_the_rise_of_a_processs_peak(recompute: bool, environment: dict[str, str]) -> None:
    """A step of hundreds of MB without --grad-checkpointing, in a process of its own; glibc's gaps are left out."""
    case = [128, 12, 2000, 64, 8, 192, 64, "fp32", recompute]
    command = [sys.executable, str(ROOT / "tests" / "bench" / "bench_memory.py"), "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    said, measured = map(int, done.stdout.split())
    assert said > (30e6 if recompute else 200e6)
    assert said == pytest.approx(measured, rel=0.1)
