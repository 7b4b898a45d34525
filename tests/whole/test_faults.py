"""Faults of numbers, templates, disks and memory: each is one clear line, and nothing that was there is lost."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.pairs import all_pairs, cosines
from lora_cli.errors import DataError, OutputError, Refused
from lora_cli.hashes import sha256_of
from lora_cli.models.base_model import BaseModel
from lora_cli.outputs import whole_folder
from lora_cli.records import Example
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import refused
from tests.steps.test_merge import SHAPES
from tests.tiny_bases import characters, tiny_llama

FIRST = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("first", FIRST)
def test_copies_with_factors_of_absurd_sizes_are_still_copies(first: str) -> None:
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(64, 4, generator=g), torch.randn(4, 48, generator=g)
    copies = [LowRank(b * 1e-20, a * 1e20) for _ in range(3)]
    ladder = dict.fromkeys([FIRST[first], torch.float32, torch.float64])
    torch.testing.assert_close(cosines(all_pairs(copies, precisions=[*ladder])), torch.ones(3, 3).double())


def test_a_chat_template_that_refuses_an_example_is_named() -> None:
    tokenizer = characters()
    tokenizer.chat_template = "{{ raise_exception('system turns are not supported') }}"
    base = BaseModel("acme/tiny", tiny_llama(), tokenizer)
    chat = ({"role": "system", "content": "x"}, {"role": "user", "content": "y"})
    with pytest.raises(DataError, match=r"refuses the roles system, user: system turns are not"):
        base.prompt_ids(chat)


def test_likelihoods_that_are_no_numbers_are_refused() -> None:
    base = BaseModel("acme/tiny", tiny_llama(), characters())
    nothing = {"model.layers.0.mlp.up_proj": LowRank(torch.full((48, 1), float("nan")), torch.ones(1, 32))}
    with base.applied(nothing), pytest.raises(Refused, match="example 7 is not finite in fp32") as found:
        base.log_likelihoods([Example(id="7", prompt="abc", completion="de")])
    assert found.value.hint == "leave this adapter out"


def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written"), whole_folder(target, replace=True) as partial:
        (partial / "new").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "x"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the disk"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("can't start new thread"), "too little memory, or too many processes"),
        (ImportError("libm.so: failed to map segment from shared object"), "for lack of memory: libm.so: failed"),
    ],
)
def test_no_room_is_one_line(error: BaseException, told: str, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(own_home / name, random_factors(SHAPES, 3, seed=seed))

    def fails(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("lora_cli.steps.merge.request.merge", fails)
    full = isinstance(error, OSError) and error.errno == errno.EDQUOT
    said = refused(1 if full else 5, "merge", "one", "two", "-o", "out")
    assert told in said
    assert len(said.strip().splitlines()) <= 2


def test_a_system_without_a_solution_is_refused(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(own_home / "one", random_factors(SHAPES, 3, seed=1))

    def fails(*args: Any, **options: Any) -> None:
        raise torch.linalg.LinAlgError("the matrix is singular")

    monkeypatch.setattr("lora_cli.merge_methods.tsv.polar", fails)
    assert "tsv failed numerically in this module" in refused(5, "merge", "one", "-m", "tsv", "-o", "out")


def test_a_file_is_hashed_again_once_it_was_written_to(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    first = sha256_of(file)
    assert sha256_of(file) == first
    file.write_bytes(b"three")
    assert sha256_of(file) != first
