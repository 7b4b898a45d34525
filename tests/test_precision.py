"""One table of precisions: the names in files, in torch and for users agree, and asking for a name needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.precision import (
    BITS,
    CHOICES,
    FACTORS,
    FLOATS,
    FLOATS8,
    STORED,
    dtype_name,
    in_config,
    remedy,
    spoken,
    stored_as,
    torch_dtype,
)


@pytest.mark.parametrize("stored", FACTORS)
def test_a_file_of_the_library_names_each_dtype_as_the_table_does(stored: str, tmp_path: Path) -> None:
    dtype = torch_dtype(stored)
    save_file({"x": torch.zeros(4).to(dtype)}, tmp_path / "x.safetensors")
    header = (tmp_path / "x.safetensors").read_bytes()[8:]
    assert f'"dtype":"{stored}"'.encode() in header
    assert load_file(tmp_path / "x.safetensors")["x"].dtype == dtype
    assert stored_as(dtype) == stored
    assert dtype.itemsize * 8 == BITS[stored]
    assert dtype.is_floating_point


def test_every_choice_but_auto_has_its_dtype_and_is_named_by_it() -> None:
    assert ("auto", *STORED) == CHOICES
    assert [torch_dtype(name) for name in STORED] == [torch.float32, torch.bfloat16, torch.float16]
    assert [dtype_name(torch_dtype(name)) for name in STORED] == [*STORED]
    assert [in_config(name) for name in STORED] == ["float32", "bfloat16", "float16"]
    assert set(STORED.values()) < set(FLOATS)


def test_the_floats_are_those_of_at_least_a_half_and_those_of_8_bits() -> None:
    assert {BITS[stored] for stored in FLOATS8} == {8}
    assert min(BITS[stored] for stored in FLOATS) == 16
    assert not set(FLOATS) & set(FLOATS8)


@pytest.mark.parametrize("name", ["I8", "F4", "C64", "F6_E2M3", "auto", "float32", "f32", ""])
def test_a_type_that_is_never_computed_with_has_no_dtype(name: str) -> None:
    with pytest.raises(KeyError):
        torch_dtype(name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_a_dtype_that_is_never_written_has_no_name(dtype: torch.dtype) -> None:
    with pytest.raises(KeyError):
        stored_as(dtype)


def test_a_type_that_users_cannot_choose_is_spoken_in_small_letters() -> None:
    assert [spoken(stored) for stored in ("F32", "BF16", "F16", "F64", "I8")] == ["fp32", "bf16", "fp16", "f64", "i8"]
    assert dtype_name(torch.float64) == "f64"


def test_names_alone_need_no_torch() -> None:
    code = "import sys, lora_cli.precision as p; p.spoken('F32'); p.in_config('fp16'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_another_precision_is_offered_only_where_it_has_a_wider_range() -> None:
    assert remedy("fp16", "leave it out") == "try --dtype fp32 or bf16, or leave it out"
    assert {remedy(used, "leave it out") for used in ("fp32", "bf16", "4bit")} == {"leave it out"}
