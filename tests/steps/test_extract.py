"""A fine-tuned model as a LoRA of its base: beside dense SVD, and what no LoRA holds is told."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.algebra.truncation import truncate
from tests.cli import ok, refused
from tests.imports.test_imports import dense
from tests.tiny_bases import tiny_gpt2, tiny_llama


def spectrum(kind: str, count: int) -> torch.Tensor:
    """Singular values of a kind."""
    at = torch.arange(1, count + 1).double()
    return {
        "flat": 1 - 0.2 * at / count,
        "gaussian": torch.linalg.svdvals(torch.randn(count, 2 * count, generator=torch.Generator().manual_seed(3))),
        "slow": at**-0.3,
        "trained": at**-0.7,
        "steep": torch.exp(-at / 20),
        "spikes": torch.where(at <= 20, 5.0, 1.0).double(),
        "low": torch.where(at <= 16, 1.0, 1e-3 * at**-0.5).double(),
    }[kind].double()


@pytest.mark.parametrize("shape", [(320, 224), (200, 500), (64, 300)])
@pytest.mark.parametrize("kind", ["flat", "gaussian", "slow", "trained", "steep", "spikes", "low"])
def test_the_remainder_is_as_small_as_a_dense_svd_leaves(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    count = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, count, generator=generator).double())[0] for side in shape)
    delta = ((u * spectrum(kind, count)) @ v.T).float()
    values = torch.linalg.svdvals(delta.double())
    for rank in (8, 32):
        best = float(values[rank:].square().sum().sqrt())
        found = truncate(delta, rank)
        error = float(torch.linalg.norm(delta.double() - found.at(rank).dense().double()))
        assert error <= 1.001 * best
        assert found.remainder(rank) ** 0.5 == pytest.approx(error, rel=1e-3)
        assert found.total == pytest.approx(float(values.square().sum()), rel=1e-6)


def test_the_rank_for_a_share_of_the_energy() -> None:
    delta = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    found = truncate(delta, 4)
    assert [found.rank_for(share) for share in (0.5, 16 / 22, 0.8, 20 / 22, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4]
    low = torch.outer(torch.arange(1.0, 200), torch.arange(1.0, 300))
    assert truncate(low, 8).rank_for(0.999) == 1


def models(folder: Path, *, gpt2: bool = False, shards: bool = False, layers: bool = True) -> tuple[str, str]:
    """A base, and the same with every linear layer, the embedding and a norm changed."""
    model = tiny_gpt2() if gpt2 else tiny_llama(tie_word_embeddings=True)
    size = {"max_shard_size": "20KB"} if shards else {}
    model.save_pretrained(folder / "base", **size)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("embed" in name or "wte" in name):
                parameter.add_(0.01 * torch.randn_like(parameter))
            elif parameter.ndim == 2 and "wpe" not in name and layers and "layers.1.mlp" not in name:
                out, into = parameter.shape
                parameter.add_(0.1 * torch.randn(out, 6) @ torch.randn(6, into) + 0.01 * torch.randn(out, into))
            elif name.endswith("norm.weight") or name.endswith("ln_f.weight"):
                parameter.add_(0.5)
    model.save_pretrained(folder / "tuned", **size)
    return str(folder / "tuned"), str(folder / "base")


@pytest.mark.parametrize("shards", [False, True])
def test_each_layer_is_the_best_of_its_rank(tmp_path: Path, shards: bool) -> None:
    tuned, base = models(tmp_path, shards=shards)
    told = ok("extract", tuned, "--base", base, "--rank", "4", "-o", "out")
    assert told.out == "out\n"
    result, record = dense(Path("out")), json.loads(Path("out/run.json").read_text())["results"]
    one, other = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (tuned, base))
    assert len(result) == 11
    assert record["unchanged"] == 3
    for module, update in result.items():
        delta = one[f"{module}.weight"].double() - other[f"{module}.weight"].double()
        values = torch.linalg.svdvals(delta)
        error = float(torch.linalg.norm(update - delta) / torch.linalg.norm(delta))
        best = float(values[4:].square().sum().sqrt() / values.square().sum().sqrt())
        assert best * (1 - 1e-6) <= error <= best * 1.001
        assert record["modules"][module]["error"] == pytest.approx(error, rel=1e-3)
        assert record["modules"][module]["norm"] == pytest.approx(float(torch.linalg.norm(delta)), rel=1e-5)
    assert set(record["left_out"]) == {"model.embed_tokens.weight", *(n for n in one if n.endswith("norm.weight"))}
    change = float(torch.linalg.norm(one["model.norm.weight"] - other["model.norm.weight"]))
    relative = change / float(torch.linalg.norm(other["model.norm.weight"]))
    assert record["left_out"]["model.norm.weight"] == pytest.approx(relative, rel=1e-5)
    assert "11 layers (3 unchanged) · rank 4 · relative error" in told.err
    assert "6 tensors in none of these layers" in told.err
    again = ok("extract", tuned, "--base", base, "--rank", "4", "-o", "out")
    assert "up to date" in again.err


def test_a_tensor_that_was_zero_in_the_base_has_no_relative_change(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    file = Path(base, "model.safetensors")
    zero = {name: tensor * (name != "model.norm.weight") for name, tensor in load_file(file).items()}
    save_file(zero, file, {"format": "pt"})
    told = ok("extract", tuned, "--base", base, "--rank", "4", "--json", "-o", "out")
    left = json.loads(told.out, parse_constant=pytest.fail)["results"]["left_out"]
    assert left["model.norm.weight"] is None
    assert "most in model.layers" in told.err


def test_a_share_of_the_energy_chooses_the_rank(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    told = ok("extract", tuned, "--base", base, "--energy", "0.9", "--modules", "--json", "-o", "out")
    modules = json.loads(told.out)["results"]["modules"]
    for name, one in modules.items():
        assert 1 - one["error"] ** 2 >= 0.9
        assert one["rank"] <= 6, name
    table = ok("extract", tuned, "--base", base, "--energy", "0.9", "--modules", "-o", "out").out
    assert [line.split("\t")[0] for line in table.splitlines()] == [*modules]


@pytest.mark.parametrize("gpt2", [False, True])
def test_peft_applies_it_as_the_difference(tmp_path: Path, gpt2: bool) -> None:
    """With all ranks, layers are as in the tuned model; what is left out is put there by hand."""
    from peft import PeftModel

    tuned, base = models(tmp_path, gpt2=gpt2)
    ok("extract", tuned, "--base", base, "--rank", "32", "-o", "out")
    one, other = (AutoModelForCausalLM.from_pretrained(place) for place in (tuned, base))
    record = json.loads(Path("out/run.json").read_text())["results"]
    assert record["error"] < 1e-3
    with torch.no_grad():
        for name in record["left_out"]:
            other.get_parameter(name if name in dict(other.named_parameters()) else f"transformer.{name}").copy_(
                one.get_parameter(name if name in dict(one.named_parameters()) else f"transformer.{name}")
            )
        with warnings.catch_warnings(action="ignore"):
            worn = PeftModel.from_pretrained(other, "out")
        ids = torch.arange(3, 40)[None]
        assert torch.allclose(worn(ids).logits, one(ids).logits, atol=1e-3)


@pytest.mark.parametrize("tokens", [56, 80])
@pytest.mark.parametrize("gpt2", [False, True])
def test_a_head_for_other_tokens_is_left_out(gpt2: bool, tokens: int, tmp_path: Path) -> None:
    model = tiny_gpt2(tied=False) if gpt2 else tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model.resize_token_embeddings(tokens)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "c_attn.weight")):
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "tuned")
    told = ok("extract", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--rank", "4", "-o", "out")
    table = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    left = json.loads(Path("out/run.json").read_text())["results"]["left_out"]
    assert left == {"lm_head.weight": None, table: None}
    assert "2 tensors in none of these layers" in told.err
    assert {name.rpartition(".")[2] for name in dense(Path("out"))} == {"c_attn" if gpt2 else "q_proj"}


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    tuned, base = models(tmp_path, layers=False)
    assert "no linear layer" in refused(5, "extract", tuned, "--base", base, "--rank", "4", "-o", "out")
    assert "are one model" in refused(5, "extract", base, "--base", base, "--rank", "4", "-o", "out")
    assert "either --rank or --energy" in refused(2, "extract", tuned, "--base", base)
    assert "either --rank or --energy" in refused(2, "extract", tuned, "--base", base, "--rank", "4", "--energy", "0.5")
    assert "from 1 to 512" in refused(2, "extract", tuned, "--base", base, "--rank", "513")
    assert "above 0 and at most 1" in refused(2, "extract", tuned, "--base", base, "--energy", "0")
    assert "no base model" in refused(2, "extract", tuned, "--rank", "4")
    assert "where the model is" in refused(1, "extract", tuned, "--base", base, "--rank", "4", "-o", f"{tuned}/out")
    other = tmp_path / "other"
    tiny_llama(hidden_size=16, num_attention_heads=4).save_pretrained(other)
    assert "in no shape of" in refused(5, "extract", tuned, "--base", str(other), "--rank", "4", "-o", "out")
    weights = load_file(f"{tuned}/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, f"{tuned}/model.safetensors", {"format": "pt"})
    assert "NaN or Inf in model.layers.0.mlp.up_proj" in refused(
        5, "extract", tuned, "--base", base, "--rank", "4", "-o", "out"
    )
    assert not Path("out").exists()


def test_a_plain_decoder_needs_no_class_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base = models(tmp_path)
    words = ("extract", tuned, "--base", base, "--rank", "4")
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.steps.convert.pair.is_plainly_named", lambda config, tensors: False)
        ok(*words, "-o", "by-class")
    monkeypatch.setattr("lora_cli.steps.bake.plan.skeleton_at", lambda folder: pytest.fail("the class was built"))
    ok(*words, "-o", "by-names")
    one, other = (Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("by-class", "by-names"))
    assert one == other


def test_the_number_of_threads_does_not_change_it(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            ok("extract", tuned, "--base", base, "--rank", "4", "-o", f"out{count}")
            found.append(Path(f"out{count}/adapter_model.safetensors").read_bytes())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_a_head_that_is_saved_beside_its_embedding_is_no_layer(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    for place in (tuned, base):
        weights = load_file(f"{place}/model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, f"{place}/model.safetensors", {"format": "pt"})
    ok("extract", tuned, "--base", base, "--rank", "4", "-o", "out")
    assert len(dense(Path("out"))) == 11


def test_the_plan_reads_no_weights(tmp_path: Path) -> None:
    tuned, base = models(tmp_path)
    plan = json.loads(ok("extract", tuned, "--base", base, "--rank", "4", "-o", "out", "--dry-run", "--json").out)
    assert (plan["modules"], plan["rank"]) == (14, 4)
    assert not Path("out").exists()
