"""What every method merges loads in PEFT, and the model then says what base + ΔW says: on two real, tiny bases."""

import copy
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.catalogue.runs import recorded
from lora_cli.formats.reader import OpenAdapter
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import ModuleMerger
from lora_cli.steps.merge.stream import merge
from lora_cli.world import World
from tests.adapters_on_disk import random_factors, write_adapter
from tests.merge_methods.test_merge_laws import LAWS
from tests.steps.test_merge import opened, planned_merge
from tests.tiny_bases import STORIES

# PEFT asks the model for a property that transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.tensor([[1, 5, 9, 40, 17, 3, 22, 8]])


@pytest.fixture(scope="module", params=["stories260K", "demo"])
def base(request: pytest.FixtureRequest) -> Any:
    """A trained model; PEFT puts its layers into copies of it."""
    if request.param == "stories260K" and not STORIES.is_dir():
        pytest.skip("../shared/wild/bases/stories260K is not here")
    world: World = request.getfixturevalue("world")
    folder = STORIES if request.param == "stories260K" else world.base
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(base: Any, tmp_path_factory: pytest.TempPathFactory) -> list[OpenAdapter]:
    """Three random adapters of all its layers, of different ranks and scales."""
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    where = tmp_path_factory.mktemp("adapters")
    return [
        opened(write_adapter(where / str(rank), random_factors(shapes, rank, seed=rank), lora_alpha=0.1 * rank))
        for rank in (2, 3, 4)
    ]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits
    return found


def activations(adapter: OpenAdapter, module: str) -> Tensor:
    """Random activations of a module, the same in whatever order the modules are worked on."""
    seed = zlib.crc32(f"{adapter.ref.pinned} {module}".encode())
    return torch.randn(9, adapter.modules[module].in_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS.methods))
def test_the_merged_adapter_says_what_the_dense_update_says(
    name: str, base: Any, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    chosen = adapters[: LAWS[name].takes or 3]
    if LAWS[name].equal_ranks:
        chosen = [adapters[0]]
    kept = {} if METHODS.get(name).kind == "factors" else {"energy": 1.0}
    planned = planned_merge(
        chosen,
        [0.7, 0.5, 0.9][: len(chosen)],
        method=name,
        inputs=activations,
        **kept,
    )
    with recorded(tmp_path / "runs.db", "merge", planned.settings, {}, tmp_path / "out") as run:
        merge(planned, tmp_path / "out", run)
    by_hand, merger = copy.deepcopy(base), ModuleMerger(planned)
    for module in planned.modules:
        by_hand.get_submodule(module).weight.data += merger.merge_dense(module).update
    in_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    effect = (logits(by_hand) - logits(base)).norm()
    assert effect > 0.01
    # Where little is merged, as by model-stock, rounding of the logits is most of what differs.
    assert (logits(in_peft) - logits(by_hand)).norm() < 1e-3 * effect
