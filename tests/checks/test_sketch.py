"""Sketches of whole updates: beside the dense sum that they abbreviate, and the error of their cosines."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lora_cli.checks.sketch import ERROR, SIZE, content_of, sketch
from lora_cli.errors import Refused
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from tests.adapters_on_disk import write_adapter

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (24, 40), UP: (64, 24)}
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def drawn(seed: int, rank: int = 4, shapes: dict[str, tuple[int, int]] = SHAPES) -> Pairs:
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(out, rank, generator=g), torch.randn(rank, into, generator=g))
        for name, (out, into) in shapes.items()
    }


def sketched(folder: Path, pairs: Pairs, **config: object) -> NDArray[np.float64]:
    write_adapter(folder, pairs, **config)
    weights = folder / "adapter_model.safetensors"
    facts = parse_config((folder / "adapter_config.json").read_bytes())
    return sketch(weights, read_header(weights), facts).astype(np.float64)


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def words(side: str, module: str, count: int) -> NDArray[np.uint32]:
    return np.frombuffer(hashlib.shake_256(f"lora sketch 1\n{side}\n{module}".encode()).digest(4 * count), "<u4")


def dense_sketch(updates: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Every entry of every update added to its place, one by one, by the definition."""
    total = np.zeros(SIZE)
    for module, update in updates.items():
        rows, columns = words("out", module, update.shape[0]), words("in", module, update.shape[1])
        for i, j in np.ndindex(update.shape):
            sign = (-1.0 if rows[i] >> 31 else 1.0) * (-1.0 if columns[j] >> 31 else 1.0)
            total[(int(rows[i]) + int(columns[j])) % SIZE] += sign * update[i, j]
    return total * SIZE**0.5 / np.linalg.norm(total)


@pytest.mark.parametrize(("r", "config"), [(4, {}), (4, {"lora_alpha": 32}), (4, {"use_rslora": True})])
def test_a_sketch_is_the_signed_sum_of_the_entries_of_the_update(
    tmp_path: Path, r: int, config: dict[str, object]
) -> None:
    pairs = drawn(0, r)
    updates = {name: b.double().numpy() @ a.double().numpy() for name, (b, a) in pairs.items()}
    np.testing.assert_allclose(
        sketched(tmp_path / "one", pairs, r=r, **config), dense_sketch(updates), rtol=2e-3, atol=2e-3
    )


def test_a_rank_pattern_weighs_its_module(tmp_path: Path) -> None:
    pairs = drawn(0)
    updates = {name: b.double().numpy() @ a.double().numpy() for name, (b, a) in pairs.items()}
    updates[UP] *= 5
    found = sketched(tmp_path / "one", pairs, r=4, lora_alpha=4, alpha_pattern={"up_proj": 20})
    np.testing.assert_allclose(found, dense_sketch(updates), rtol=2e-3, atol=2e-3)


def test_equal_updates_have_equal_sketches_whatever_their_factors_and_scale(tmp_path: Path) -> None:
    pairs = drawn(1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))[0]
    turned = {name: (3 * b @ turn, turn.T @ a) for name, (b, a) in pairs.items()}
    one, other = sketched(tmp_path / "one", pairs, r=4), sketched(tmp_path / "other", turned, r=4)
    assert cosine(one, other) > 0.99999
    opposite = {name: (-b, a) for name, (b, a) in pairs.items()}
    assert cosine(one, sketched(tmp_path / "opposite", opposite, r=4)) < -0.99999


def test_the_error_of_a_cosine_is_the_one_that_is_stated(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (48, 48) for layer in range(4)}
    flat, found = [], []
    for seed in range(24):
        pairs = drawn(seed, 8, shapes)
        flat.append(np.concatenate([(b.double() @ a.double()).numpy().ravel() for b, a in pairs.values()]))
        found.append(sketched(tmp_path / str(seed), pairs, r=8))
    errors = [
        cosine(found[i], found[j]) - cosine(flat[i], flat[j]) for i in range(24) for j in range(i)
    ]  # fmt: skip
    assert abs(float(np.mean(errors))) < ERROR / 4
    assert 0.7 * ERROR < float(np.std(errors)) < 1.3 * ERROR


def test_modules_that_only_one_adapter_has_count_as_zero(tmp_path: Path) -> None:
    whole = drawn(3)
    part = {Q: whole[Q]}
    norms = {name: float((b.double() @ a.double()).norm()) for name, (b, a) in whole.items()}
    want = norms[Q] / (norms[Q] ** 2 + norms[UP] ** 2) ** 0.5
    found = cosine(sketched(tmp_path / "whole", whole, r=4), sketched(tmp_path / "part", part, r=4))
    assert abs(found - want) < 4 * ERROR


def test_an_update_of_zero_and_one_that_is_not_finite(tmp_path: Path) -> None:
    zero = {name: (b * 0, a) for name, (b, a) in drawn(4).items()}
    assert not sketched(tmp_path / "zero", zero, r=4).any()
    broken = {name: (b * float("nan"), a) for name, (b, a) in drawn(4).items()}
    with pytest.raises(Refused, match="NaN or Inf"):
        sketched(tmp_path / "broken", broken, r=4)


def test_a_sketch_is_named_by_what_it_was_made_from() -> None:
    names = {content_of("a" * 64, b"{}", None), content_of("b" * 64, b"{}", None), content_of("a" * 64, b"{ }", None)}
    assert len(names) == 3
