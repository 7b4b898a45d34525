"""Numbers read and rounded by numpy are those of torch, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_cli.errors import Refused
from lora_cli.formats.header import read_header
from lora_cli.formats.numbers import StoredTensor, rounded
from lora_cli.formats.reader import read_stored, tensor_of
from lora_cli.precision import EPSILON, FACTORS, FLOATS, torch_dtype

# Ties, subnormals, the ends of fp16 and bf16, signed zeros, and what lies between.
AT_THE_EDGES = [
    0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.99, 65520.0, -70000.0,
    2**-24, 2**-25, 3 * 2**-26, 2**-133, 2**-134, 2**-149, 1e-40, 3.3895314e38, 3.4e38, -3.4028235e38,
]  # fmt: skip


def samples() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    spread = torch.randn(4000, generator=g) * torch.exp2(torch.randint(-140, 120, (4000,), generator=g).float())
    return torch.cat([torch.tensor(AT_THE_EDGES), spread])


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    numbers = samples()
    wanted = numbers.to(torch_dtype(dtype))
    found = rounded(numbers.numpy(), dtype)
    assert found.dtype == dtype
    assert found.bits.tobytes() == wanted.view(torch.uint8).numpy().tobytes()
    assert found.finite == bool(wanted.isfinite().all())
    assert rounded(numbers.numpy()[:8], dtype).finite


@pytest.mark.parametrize("dtype", FACTORS)
def test_a_stored_tensor_has_the_numbers_that_torch_reads(dtype: str, tmp_path: Path) -> None:
    wanted = samples().reshape(-1, 2).to(torch_dtype(dtype))
    tensors = {"one": wanted, "row": wanted[:1].clone(), "none": wanted[:0].clone()}
    save_file(tensors, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors").tensors
    with (tmp_path / "x.safetensors").open("rb") as file:
        for name, tensor in tensors.items():
            stored = read_stored(file.fileno(), entries[name])
            assert torch.equal(tensor_of(stored, torch.float64).nan_to_num(7), tensor.double().nan_to_num(7))
            numbers = stored.numbers
            assert numbers.dtype == (np.float64 if dtype == "F64" else np.float32)
            same = torch.from_numpy(numbers).double()
            finite = tensor.double().isfinite()
            assert torch.equal(same[finite], tensor.double()[finite])
            assert not same[~finite].isfinite().any()


def test_a_file_that_ends_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"one": torch.ones(5, 5)}, path)
    entry = read_header(path).tensors["one"]
    path.write_bytes(path.read_bytes()[:-3])
    with path.open("rb") as file, pytest.raises(Refused, match="the file ends inside"):
        read_stored(file.fileno(), entry)


@pytest.mark.parametrize("dtype", FLOATS)
def test_epsilon_is_that_of_torch(dtype: str) -> None:
    assert torch.finfo(torch_dtype(dtype)).eps == EPSILON[dtype]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_seen(dtype: str, number: float) -> None:
    tensor = torch.tensor([1.0, number], dtype=torch_dtype(dtype))
    bits = (tensor.view(torch.uint16) if dtype == "BF16" else tensor).numpy()
    assert not StoredTensor(bits, dtype).finite
