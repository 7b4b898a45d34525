"""A base in 4 bits: its arithmetic is that of the dequantised weights, and adapters add what they add to others."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.models.base_model import BaseModel
from lora_cli.models.counted import without_data
from lora_cli.models.four_bit import held
from lora_cli.models.ref import load, pin
from lora_cli.models.together import Together
from tests.adapters_on_disk import write_adapter
from tests.cli import ok, refused
from tests.tiny_bases import characters, examples, saved, tiny_gpt2, tiny_llama

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("one_thread")
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SIZES = {"hidden_size": 64, "intermediate_size": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load(str(folder), device="cpu", dtype="4bit")


def dequantised(layer: nn.Module) -> Tensor:
    """The weight that NF4 codes and doubly quantised scales stand for, in float64; shares no code with the library."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    state = weight.quant_state  # type: ignore[attr-defined]
    codes = torch.stack([weight.flatten() >> 4, weight.flatten() & 15], dim=1).flatten().long()
    scales = state.state2.code.double()[state.absmax.long()]
    scales = scales * state.state2.absmax.double().repeat_interleave(256)[: len(scales)] + state.offset.double()
    values = state.code.double()[codes] * scales.repeat_interleave(64)[: len(codes)]
    return values.view(state.shape)


def reference(base: BaseModel, plain: nn.Module) -> nn.Module:
    """The unquantised class in float64 with the weights that the quantised ones stand for."""
    plain = plain.double().eval()
    for name, layer in base.model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            own, found = plain.get_submodule(name), dequantised(layer)
            own.weight.data = found.T if isinstance(own, transformers.pytorch_utils.Conv1D) else found
    return plain


def update(out: int, into: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        0.3 * torch.randn(out, rank, generator=generator), 0.3 * torch.randn(rank, into, generator=generator)
    )


UPDATES = {Q: update(64, 64, 4, 1), DOWN: update(64, 192, 3, 2)}
TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def test_every_layer_but_the_head_is_quantised_and_names_and_shapes_are_the_classs(
    base: BaseModel, folder: Path
) -> None:
    small = {n for n, layer in base.model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    plain = load(str(folder), device="cpu")
    assert small == set(plain.shapes) - {"lm_head"}
    assert base.shapes == plain.shapes
    assert (base.dtype, base.dtype_name) == (torch.float32, "4bit")


def test_outputs_are_those_of_the_dequantised_weights(base: BaseModel) -> None:
    plain = reference(base, tiny_llama(**SIZES))
    with torch.no_grad():
        found, wanted = base.model(TOKENS).logits, plain(TOKENS).logits
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_inputs_are_no_multiple_of_64_stays_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path, hidden_size=64, intermediate_size=96)
    base = load(str(folder), device="cpu", dtype="4bit")
    plain = tiny_llama(hidden_size=64, intermediate_size=96)
    assert torch.equal(base.model.get_parameter(f"{DOWN}.weight"), plain.get_parameter(f"{DOWN}.weight"))
    with torch.no_grad():
        found, wanted = base.model(TOKENS).logits, reference(base, plain)(TOKENS).logits
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_such_a_layer_that_is_stored_in_4_bits_is_refused_on_a_cpu(tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    saved(tmp_path / "plain", hidden_size=64, intermediate_size=96)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    made.save_pretrained(tmp_path / "stored")
    characters().save_pretrained(tmp_path / "stored")
    with pytest.raises(Refused, match=r"down_proj is stored in 4 bits with 96 inputs, no multiple of 64"):
        load(str(tmp_path / "stored"), device="cpu")


def test_a_gpt2_with_its_transposed_layers_too(tmp_path: Path) -> None:
    tiny_gpt2(n_embd=64).save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    base = load(str(tmp_path), device="cpu", dtype="4bit")
    assert base.shapes == load(str(tmp_path), device="cpu").shapes
    with torch.no_grad():
        found, wanted = base.model(TOKENS).logits, reference(base, tiny_gpt2(n_embd=64))(TOKENS).logits
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_adapters_add_to_it_what_they_add_to_the_dequantised_weights(base: BaseModel) -> None:
    plain = reference(base, tiny_llama(**SIZES))
    for name, one in UPDATES.items():
        plain.get_submodule(name).weight.data += one.dense().double()
    with torch.no_grad(), base.applied(UPDATES):
        found = base.model(TOKENS).logits
    with torch.no_grad():
        wanted = plain(TOKENS).logits
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_one_batch_go_through_their_own_adapters(base: BaseModel) -> None:
    other = {Q: update(64, 64, 2, 3)}
    both = Together(base, [UPDATES, other])
    both.arrange((0, 1), 2, TOKENS.shape[1])
    with torch.no_grad(), both.applied():
        found = base.model(TOKENS).logits
    for row, own in enumerate((UPDATES, other)):
        with torch.no_grad(), base.applied(own):
            torch.testing.assert_close(found[row], base.model(TOKENS[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_gradients_go_on_after_an_evaluation(base: BaseModel) -> None:
    encoded = base.encode_all(examples(4))

    def gradient() -> Tensor:
        with base.new_adapter(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", seed=0) as adapter:
            base.completion_losses(encoded).sum().backward()
            return torch.cat([p.grad.flatten() for p in adapter.parameters if p.grad is not None])

    before = gradient()
    base.mean_log_likelihoods(encoded)
    assert before.abs().max() > 0
    assert torch.equal(gradient(), before)


def test_the_bytes_of_its_weights_are_counted_without_data(base: BaseModel, folder: Path) -> None:
    real = 0
    for parameter in base.model.parameters():
        state = getattr(parameter, "quant_state", None)
        parts = (
            [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        )
        real += sum(one.numel() * one.element_size() for one in [parameter, *parts])
    assert held(without_data(folder, torch.float32, named="x", four_bit=True).model) == real


def test_a_base_that_is_stored_in_4_bits_is_taken_as_it_is(base: BaseModel, tmp_path: Path) -> None:
    base.model.save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    stored = load(str(tmp_path), device="cpu")
    assert (stored.dtype_name, stored.shapes) == ("4bit", base.shapes)
    assert stored.log_likelihoods(examples(3)) == base.log_likelihoods(examples(3))
    with pytest.raises(Refused, match="stored quantised already"):
        load(str(tmp_path), device="cpu", dtype="4bit")


def test_settings_name_the_quantiser_and_results_have_keys_of_their_own(base: BaseModel, folder: Path) -> None:
    ref = pin(str(folder), device="cpu", dtype="4bit")
    assert ref.settings["dtype"] == "4bit"
    assert ref.settings["bitsandbytes"] == bitsandbytes.__version__
    assert "bitsandbytes" not in pin(str(folder), device="cpu").settings
    assert base.arithmetic != load(str(folder), device="cpu").arithmetic


@pytest.fixture
def here(folder: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a task and a catalogued pool of two adapters, for the base in 4 bits."""
    for seed, name in enumerate(("one", "two")):
        factors = {Q: (0.1 * UPDATES[Q].B, (seed + 1) * UPDATES[Q].A)}
        write_adapter(own_home / "pool" / name, factors, base=str(folder))
    lines = [json.dumps({"prompt": one.prompt, "completion": one.completion}) for one in examples(20)]
    (own_home / "task.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("LORA_BASE", str(folder))
    monkeypatch.setenv("LORA_DTYPE", "4bit")
    ok("pool", "sync", "--from", "pool")
    return own_home


def test_fit_train_and_eval_run_on_it(here: Path) -> None:
    made = ("--data", "task.jsonl", "--steps", "20", "--lr", "0.02", "--json")
    trained = ok("train", *made, "--rank", "2", "--dropout", "0", "-o", "trained").out
    fitted = ok("fit", "trained", *made, "-o", "fitted").out
    for record in map(json.loads, (trained, fitted)):
        assert record["settings"]["dtype"] == "4bit"
        assert record["settings"]["bitsandbytes"] == bitsandbytes.__version__
    rows = json.loads(ok("eval", "fitted", "trained", "--data", "task.jsonl", "--metric", "nll", "--json").out)
    assert len(rows["rows"]) == 3


def test_a_dry_run_counts_4_bits(here: Path) -> None:
    def parts(*words: str) -> dict[str, int]:
        found = json.loads(ok("fit", "--data", "task.jsonl", "--dry-run", "--json", *words).out)
        return dict(found["estimate"]["parts"])

    assert parts()["base"] < 0.6 * parts("--dtype", "fp32")["base"]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str, usual: Callable[[str], str] = sys.modules["importlib.metadata"].version) -> str:  # type: ignore[attr-defined]
        if name == "bitsandbytes":
            raise sys.modules["importlib.metadata"].PackageNotFoundError(name)  # type: ignore[attr-defined]
        return usual(name)

    monkeypatch.setattr("importlib.metadata.version", version)


def test_without_bitsandbytes_one_line_names_the_extra(here: Path, absent: None) -> None:
    for command in (("fit",), ("train",), ("eval", "pool/one")):
        told = refused(2, *command, "--data", "task.jsonl")
        assert "needs bitsandbytes" in told
        assert "pip install 'lora-cli[4bit]'" in told
