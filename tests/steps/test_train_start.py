"""Training that goes on from another LoRA: it begins where that one ended, and takes none of another form."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from lora_cli.errors import NothingMatched, Refused
from lora_cli.models.base_model import BaseModel
from lora_cli.recipes import Recipe, TrainOptions
from lora_cli.steps.train.train import train
from tests.tiny_bases import examples, gpt2, llama

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Recipe(steps=6, every=3, lr=1e-2)
LORA = TrainOptions(rank=4, alpha=8.0, dropout=0.0)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return llama()


@pytest.fixture(scope="module")
def first(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    train(base, examples(24), folder, options=LORA, recipe=replace(SHORT, steps=30))
    return folder


def test_it_begins_where_the_other_training_ended(base: BaseModel, first: Path, tmp_path: Path) -> None:
    fresh = train(base, examples(24), tmp_path, options=LORA, recipe=SHORT).learnt
    later = train(base, examples(24), tmp_path, options=replace(LORA, start=first), recipe=SHORT).learnt
    trained = train(base, examples(24), tmp_path, options=LORA, recipe=replace(SHORT, steps=30)).learnt
    assert later.loss_before == pytest.approx(trained.loss_after, rel=1e-6)
    assert later.loss_before < 0.9 * fresh.loss_before


def test_no_step_taken_gives_the_same_factors(base: BaseModel, first: Path, tmp_path: Path) -> None:
    # The first step has a rate of 0, so that one step moves nothing.
    train(base, examples(24), tmp_path, options=replace(LORA, start=first), recipe=Recipe(steps=2, every=2, lr=1e-30))
    here, there = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("other", [{"rank": 8}, {"alpha": 4.0}, {"target_modules": "q_proj"}])
def test_another_form_is_refused(base: BaseModel, first: Path, tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(Refused, match="other modules, another rank or another alpha"):
        train(base, examples(24), tmp_path, options=replace(LORA, start=first, **other), recipe=SHORT)
    assert not any("lora" in name for name, _ in base.model.named_parameters())


def test_another_base_is_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is an adapter of acme/tiny, not of acme/gpt2"):
        train(gpt2(), examples(24), tmp_path, options=replace(LORA, start=first), recipe=SHORT)


def test_a_folder_without_an_adapter_is_named(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(NothingMatched, match="nowhere"):
        train(base, examples(24), tmp_path, options=replace(LORA, start=tmp_path / "nowhere"), recipe=SHORT)
