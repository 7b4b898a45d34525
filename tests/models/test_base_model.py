import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import DataError, NetworkError, NothingMatched, Refused, UsageError
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import generate
from lora_cli.models.ref import load, resolve
from lora_cli.models.skeleton import skeleton
from lora_cli.records import Example
from tests.tiny_bases import characters, examples, gpt2, llama, opened, saved, tiny_gpt2, tiny_llama

PROMPTS = ["a", "shift:abc", "zz:", "a much longer prompt than those", "b"]
CHAT_EXAMPLE = Example(
    id="1",
    prompt=({"role": "system", "content": "s"}, {"role": "user", "content": "u"}),
    completion="ok",
)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return llama()


@pytest.fixture(params=["llama", "gpt2"])
def any_base(request: pytest.FixtureRequest) -> BaseModel:
    return llama() if request.param == "llama" else gpt2()


def ids(text: str) -> list[int]:
    return list(characters()(text, add_special_tokens=False)["input_ids"])


def test_a_prompt_becomes_a_user_turn_where_there_is_a_chat_template(base: BaseModel) -> None:
    encoded = base.encode(Example(id="1", prompt="hi", completion="ok"))
    assert list(encoded.ids) == [*ids("<bos>"), 4, *ids("hi"), 5, *ids("ok"), 2]
    assert encoded.ids[encoded.start :] == (*ids("ok"), 2)
    assert encoded.tokens == 3


def test_messages_go_through_the_bases_own_template(base: BaseModel) -> None:
    encoded = base.encode(CHAT_EXAMPLE)
    assert base.tokenizer.decode(encoded.ids) == "<bos><system>s<user>u<assistant>ok<eos>"


def test_without_a_template_a_prompt_is_plain_text_and_messages_are_refused() -> None:
    plain = llama(chat=False)
    assert plain.encode(Example(id="1", prompt="hi", completion="ok")).ids == (1, *ids("hi"), *ids("ok"), 2)
    with pytest.raises(DataError, match="no chat template"):
        plain.encode(CHAT_EXAMPLE)


def test_an_example_longer_than_the_model_takes_is_named(base: BaseModel) -> None:
    with pytest.raises(DataError, match=r"takes 64 tokens; 1 of 1 example has more: long \(70\)$"):
        base.encode(Example(id="long", prompt="x" * 64, completion="ok"))
    with pytest.raises(DataError, match=r"takes 64 tokens; 1 of 2 examples has more with 30 new ones: 2 \(73\)$"):
        generate(base, ["x", "x" * 40])


def test_the_loss_covers_the_completion_only(any_base: BaseModel) -> None:
    batch = [any_base.encode(e) for e in (*examples(3), Example(id="9", prompt="q", completion="long one"))]
    losses = any_base.completion_losses(batch)
    for item, loss in zip(batch, losses, strict=True):
        logits = any_base.model(input_ids=torch.tensor([item.ids])).logits[0].double()
        by_hand = -sum(logits[place - 1].log_softmax(-1)[item.ids[place]] for place in range(item.start, len(item.ids)))
        assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)


def test_log_likelihoods_are_means_per_token_in_the_given_order(base: BaseModel) -> None:
    wanted = examples(5)
    together = base.log_likelihoods(wanted, batch_size=2)
    alone = [-float(base.completion_losses([item]).sum()) / item.tokens for item in map(base.encode, wanted)]
    assert together == pytest.approx(alone, rel=1e-5)
    assert all(value < 0 for value in together)


def test_a_left_padded_batch_writes_what_single_prompts_write(any_base: BaseModel) -> None:
    alone = [generate(any_base, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert generate(any_base, PROMPTS, max_new_tokens=12, batch_size=5) == alone
    assert generate(any_base, PROMPTS, max_new_tokens=12, batch_size=2) == alone
    assert len(set(alone)) > 1


def test_generation_is_greedy_whatever_the_model_suggests() -> None:
    model = tiny_llama()
    wanted = generate(llama(), PROMPTS, max_new_tokens=12)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0)
    assert generate(BaseModel("acme/tiny", model, characters()), PROMPTS, max_new_tokens=12) == wanted


def test_generation_equals_taking_the_most_likely_token_again_and_again(base: BaseModel) -> None:
    tokens = base.prompt_ids("shift:abc")
    for _ in range(8):
        tokens.append(int(base.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    expected = base.tokenizer.decode(tokens[len(base.prompt_ids("shift:abc")) :], skip_special_tokens=True)
    assert generate(base, ["shift:abc"], max_new_tokens=8) == [expected]


def test_generation_stops_at_every_end_token_the_model_names() -> None:
    base = llama()
    [text] = generate(base, ["shift:abc"], max_new_tokens=12)
    [end] = ids(text[0])
    model = tiny_llama()
    model.generation_config.eos_token_id = [2, end]
    assert generate(BaseModel("acme/tiny", model, characters()), ["shift:abc"], max_new_tokens=12) == [""]


def peft_adapter(model: torch.nn.Module, folder: Path, *targets: str) -> Path:
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.filterwarnings("ignore:.*model config:UserWarning")
def test_applied_updates_act_as_those_of_peft(tmp_path: Path, kind: str) -> None:
    make, targets = (tiny_llama, ("q_proj", "down_proj")) if kind == "llama" else (tiny_gpt2, ("c_attn", "c_proj"))
    folder = peft_adapter(make(), tmp_path / "adapter", *targets)
    tokens = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(make(), folder).eval()(input_ids=tokens).logits
    base = BaseModel("acme/tiny", make(), characters())
    adapter = opened(folder)
    updates = {module: adapter.read(module) for module in adapter.modules}
    with torch.no_grad():
        bare = base.model(input_ids=tokens).logits
        with base.applied(updates):
            ours = base.model(input_ids=tokens).logits
        after = base.model(input_ids=tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, bare, atol=1e-2)
    assert torch.equal(after, bare)


def test_an_update_is_taken_off_even_when_the_work_fails(base: BaseModel) -> None:
    module = "model.layers.0.mlp.up_proj"
    update = LowRank(torch.ones(48, 1), torch.ones(1, 32))
    before = generate(base, ["a"])
    with pytest.raises(KeyError), base.applied({module: update}):
        raise KeyError
    assert generate(base, ["a"]) == before


@pytest.mark.parametrize(
    ("module", "shape", "problem"),
    [
        ("model.layers.7.mlp.up_proj", (48, 32), "no module model.layers.7.mlp.up_proj; modules that match: 1 of 2"),
        ("model.layers.0.mlp.up_proj", (32, 48), "is 48×32 here and 32×48 there; modules that match: 1 of 2"),
        ("model.embed_tokens", (104, 32), "is 32×104 here and 104×32 there"),
        ("model.norm", (32, 32), "no module model.norm"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name(
    base: BaseModel, module: str, shape: tuple[int, int], problem: str
) -> None:
    outputs, inputs = shape
    fitting = {"model.layers.0.self_attn.q_proj": LowRank(torch.ones(32, 1), torch.ones(1, 32))}
    wrong = {module: LowRank(torch.ones(outputs, 1), torch.ones(1, inputs))}
    with (
        pytest.raises(Refused, match=r"owner/name does not fit acme/tiny: ") as caught,
        base.applied(fitting | wrong, who="owner/name"),
    ):
        pass
    assert problem in caught.value.message


def test_a_new_adapter_trains_saves_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    base = llama()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with base.new_adapter(rank=2, alpha=4, dropout=0.1, target_modules="all-linear", seed=0) as adapter:
        assert len(adapter.parameters) == 2 * 14
        base.completion_losses([base.encode(e) for e in examples(2)]).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters)
        adapter.save(tmp_path / "new")
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len({file.stat().st_mode for file in (tmp_path / "new").iterdir()}) == 1, "a server may be another user"
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(opened(tmp_path / "new").modules) == 14


def test_target_modules_that_the_base_lacks_are_refused(base: BaseModel) -> None:
    with (
        pytest.raises(Refused, match="acme/tiny"),
        base.new_adapter(rank=2, alpha=4, dropout=0.0, target_modules=["c_attn"], seed=0),
    ):
        pass


def test_a_folder_is_loaded_and_its_shapes_are_known_without_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    loaded = load(str(folder))
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert generate(loaded, PROMPTS, max_new_tokens=8) == generate(llama(), PROMPTS, max_new_tokens=8)
    assert load(str(folder), dtype="bf16").dtype == torch.bfloat16
    (folder / "model.safetensors").unlink()
    known = skeleton(folder)
    assert known is not None
    for fact in (fact.name for fact in fields(known) if fact.compare):
        assert getattr(known, fact) == getattr(loaded.skeleton, fact), fact
    assert known.matrices["model.layers.1.self_attn.k_proj"].shape == loaded.shapes["model.layers.1.self_attn.k_proj"]
    assert loaded.shapes["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert loaded.shapes["lm_head"] == (104, 32)


def test_conv1d_shapes_are_out_by_in() -> None:
    assert gpt2().shapes["transformer.h.0.attn.c_attn"] == (96, 32)


def test_what_a_base_is_made_of_is_unknown_without_a_class_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    assert skeleton(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match=r"config\.json is not JSON"):
        skeleton(tmp_path)


@pytest.mark.slow
def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NothingMatched, match="no base model at"):
        load("./absent")
    with pytest.raises(NothingMatched, match=r"config\.json is missing"):
        load(str(tmp_path))
    with pytest.raises(NetworkError, match="acme/tiny"):
        load("acme/tiny")
    folder = saved(tmp_path / "base")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match=r"model\.safetensors: truncated"):
        load(str(folder))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02not opened")
    with pytest.raises(Refused, match="a pickle, which could run code"):
        load(str(folder))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        ImportError("libm.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_the_bases_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    folder = saved(tmp_path / "base")
    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fails)
    with pytest.raises(type(error)):
        load(str(folder))


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    more = saved(tmp_path / "more", num_hidden_layers=3)
    shutil.copy(folder / "model.safetensors", more / "model.safetensors")
    with pytest.raises(Refused, match="9 tensors missing"):
        load(str(more))


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(Refused, match="cannot be loaded"):
        load(str(folder))
    assert skeleton(folder) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("device", "error"),
    [("cpu:foo", UsageError), ("tpu", UsageError), ("cuda:", UsageError), ("cuda:99", Refused), ("cpu:1", Refused)],
)
def test_a_device_that_cannot_be_is_told_from_one_that_is_not_here(device: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"device .?{device}"):
        load("acme/tiny", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_is_resolved_without_loading_anything() -> None:
    assert resolve() == resolve("cpu", "fp32") == ("cpu", "fp32")
    with pytest.raises(Refused, match="no such device"):
        resolve("cuda")
    with pytest.raises(UsageError, match="unknown dtype 'fp8'"):
        resolve("cpu", "fp8")


def test_devices_of_a_machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve() == resolve("cuda") == resolve("cuda:0", "bf16") == ("cuda:0", "bf16")
    assert resolve("cuda:1", "fp16") == ("cuda:1", "fp16")
    with pytest.raises(Refused, match="no such device"):
        resolve("cuda:2")
