"""Factors of eight bits are floats: the numbers that torch reads, in PEFT's model, and the norm of the catalogue."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_cli.checks.weights import scan_weights
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from lora_cli.formats.numbers import float8_values
from lora_cli.precision import FLOATS8
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.tiny_bases import opened, tiny_llama

TORCH = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
Q, V = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj"))
SHAPES = {Q: (32, 32), V: (16, 32)}


def adapter(folder: Path, dtype: str, seed: int = 0) -> Path:
    return write_adapter(folder, random_factors(SHAPES, 4, seed=seed, dtype=TORCH[dtype]), lora_alpha=8)


@pytest.mark.parametrize("dtype", TORCH)
def test_every_byte_is_the_number_that_torch_reads(dtype: str) -> None:
    wanted = torch.frombuffer(bytearray(range(256)), dtype=TORCH[dtype]).double().numpy()
    found = float8_values(dtype)
    assert np.array_equal(np.isfinite(found), np.isfinite(wanted))
    assert np.array_equal(found[np.isfinite(wanted)], wanted[np.isfinite(wanted)])


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_update_is_the_one_that_peft_applies(dtype: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "x", dtype)
    adapted = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder)
    read = opened(folder)
    for module in SHAPES:
        layer = adapted.get_submodule(f"base_model.model.{module}")
        assert layer.lora_A["default"].weight.dtype == torch.float32
        torch.testing.assert_close(read.read(module).dense(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TORCH)
def test_the_norm_is_that_of_the_numbers(dtype: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "x", dtype)
    weights = folder / "adapter_model.safetensors"
    found = scan_weights(weights, read_header(weights), parse_config((folder / "adapter_config.json").read_bytes()))
    stored = {name: tensor.double() for name, tensor in load_file(weights).items()}
    prefix = "base_model.model."
    products = [stored[f"{prefix}{m}.lora_B.weight"] @ stored[f"{prefix}{m}.lora_A.weight"] for m in SHAPES]
    assert found.norm == pytest.approx(2 * sum(float((p * p).sum()) for p in products) ** 0.5, rel=1e-9)


def test_merging_them_gives_fp32(tmp_path: Path) -> None:
    for number, dtype in enumerate(TORCH):
        adapter(tmp_path / "pool" / dtype.lower(), dtype, number)
    ok("pool", "sync", "acme/tiny", "--from", str(tmp_path / "pool"))
    assert set(ok("pool", "sql", "select dtype from adapters").out.split()) == set(FLOATS8)
    ok("merge", "pool/f8_e4m3", "pool/f8_e5m2fnuz", "-m", "linear", "-o", "out")
    assert {tensor.dtype for tensor in load_file("out/adapter_model.safetensors").values()} == {torch.float32}


def test_nan_in_eight_bits_is_found(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 4, seed=0)
    factors[V][0][2, 1] = float("nan")
    write_adapter(tmp_path / "pool" / "x", {m: (b.to(torch.float8_e4m3fn), a) for m, (b, a) in factors.items()})
    ok("pool", "sync", "acme/tiny", "--from", str(tmp_path / "pool"))
    assert f"NaN or Inf in {V}" in ok("pool", "list").out
