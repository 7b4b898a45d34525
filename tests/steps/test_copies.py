"""Copies of the base's weights beside an update: compared where the base is here, said to be left out elsewhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.formats.reader import open_adapter
from lora_cli.steps.pool.copies import judge_copies
from tests.architectures import factors, files, model, saved_adapter, skeleton
from tests.cli import ok, refused

pytestmark = pytest.mark.filterwarnings("ignore")


def judged(kind: str, module: str, weight: torch.Tensor, base: Path | str) -> tuple[str, str]:
    """What is said of an adapter of one module with this copy."""
    rows, columns = weight.shape
    tensors = {f"{module}.base_layer.weight": weight, **factors({module: (rows, columns)})}
    folder = saved_adapter(Path("adapter"), tensors, [module])
    opened = open_adapter(files(folder), skeleton(kind))
    return judge_copies(opened.files.weights, opened.copies, str(base), skeleton(kind))


def saved(kind: str, dtype: torch.dtype = torch.float32) -> Path:
    model(kind).to(dtype).save_pretrained("base")
    return Path("base").resolve()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widened", [False, True])
def test_a_copy_that_was_only_cast_is_the_base_s(stored: torch.dtype, trained: torch.dtype, widened: bool) -> None:
    base, kept = saved("llama", stored), torch.float32 if widened else trained
    weight = load_file(base / "model.safetensors")["lm_head.weight"]
    assert judged("llama", "lm_head", weight.to(trained).to(kept), base) == ("", "")
    weight[7, 3] *= 1.05
    wrong, _ = judged("llama", "lm_head", weight.to(trained).to(kept), base)
    assert wrong == f"its copy of lm_head.weight differs from {base}, and PEFT would load it over the base's"


def test_a_head_is_compared_with_the_weight_that_it_is_tied_to() -> None:
    base = saved("qwen3")
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert judged("qwen3", "lm_head", weight, base) == ("", "")
    assert judged("qwen3", "lm_head", weight + 1, base)[0]


def test_where_the_base_is_not_here_the_copy_is_said_to_be_left_out() -> None:
    weight = model("llama").lm_head.weight.detach()
    said = "the copy of lm_head.weight is left out, not compared: acme/base is not here, or lacks this weight"
    assert judged("llama", "lm_head", weight, "acme/base") == ("", said)
    assert said in ok("merge", "adapter", "-o", "out").err
    base = saved("llama")
    assert "left out" not in ok("merge", "adapter", "--base", str(base), "-o", "compared").err
    judged("llama", "lm_head", weight + 1, base)
    told = refused(5, "merge", "adapter", "--base", str(base), "-o", "none")
    assert "its copy of lm_head.weight differs from" in told
    assert "use the adapter with the base model it was trained on" in told
