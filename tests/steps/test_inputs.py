"""Activations of modules with adapters applied, against PEFT and torch's own hooks, and RegMean on it end to end."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lora_cli.catalogue.runs import recorded
from lora_cli.errors import DataError, OutputError, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.activations import activations
from lora_cli.models.base_model import BaseModel
from lora_cli.models.ref import BaseRef, load, pin
from lora_cli.steps.merge.inputs import ModuleInputs, data_of
from lora_cli.steps.merge.stream import merge
from tests.adapters_on_disk import random_factors, write_adapter
from tests.dense_clusters import regmean
from tests.dense_reference import Case
from tests.steps.test_merge import close, deltas, planned_merge
from tests.templates import STYLES, tokenizer_of
from tests.tiny_bases import examples, gpt2, llama, opened, saved, tiny_llama

EVERYTHING = 10**6
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def shapes_of(base: BaseModel, *, head: bool = False) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in base.shapes.items() if head or name != "lm_head"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of different target modules, and two tasks."""
    home = tmp_path_factory.mktemp("inputs")
    saved(home / "base")
    shapes = shapes_of(llama())
    small = {m: (0.3 * b, a) for m, (b, a) in random_factors(shapes, 4, seed=1).items()}
    write_adapter(home / "one", small)
    write_adapter(home / "two", random_factors({m: s for m, s in shapes.items() if "mlp" not in m}, 3, seed=2))
    for task in ("shift", "another"):
        lines = [{"prompt": e.prompt, "completion": e.completion} for e in examples(9, task=task)]
        (home / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


@pytest.fixture(scope="module")
def ref(home: Path) -> BaseRef:
    return pin(str(home / "base"), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def adapters(home: Path) -> list[OpenAdapter]:
    return [opened(home / "one"), opened(home / "two")]


def collected(
    ref: BaseRef, adapters: Sequence[OpenAdapter], files: Sequence[str], folder: Path, **options: Any
) -> ModuleInputs:
    samples = ModuleInputs(base=ref, files=data_of(files, adapters), **options)
    samples.collect(adapters, {m for a in adapters for m in a.modules}, folder)
    return samples


def captured(home: Path, adapter: OpenAdapter, task: str) -> dict[str, Tensor]:
    """Every input of every module by PEFT and torch hooks, example after example, without padding and end tokens."""
    base = load(str(home / "base"), device="cpu", dtype="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base.model, adapter.files.weights.parent)
    recorded: dict[str, list[Tensor]] = {module: [] for module in adapter.modules}
    for module, found in recorded.items():
        layer = adapted.base_model.model.get_submodule(module)
        layer.register_forward_hook(lambda _, arguments, output, found=found: found.append(arguments[0][0]))
    for example in examples(9, task=task):
        ids = base.encode(example).ids[:-1]
        with torch.no_grad():
            adapted(input_ids=torch.tensor([ids]))
    return {module: torch.cat(found) for module, found in recorded.items()}


def rows_of(sample: Tensor, everything: Tensor) -> list[int]:
    """Where the rows of a sample stand among all."""
    apart = torch.cdist(sample.double(), everything.double())
    assert float(apart.min(1).values.max()) < 1e-4
    return apart.argmin(1).tolist()


def test_all_tokens_equal_what_hooks_on_peft_see(
    home: Path, ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    samples = collected(ref, adapters, [str(home / "shift.jsonl")], tmp_path, tokens=EVERYTHING)
    for adapter in adapters:
        for module, wanted in captured(home, adapter, "shift").items():
            torch.testing.assert_close(samples(adapter, module), wanted, rtol=1e-4, atol=1e-5)


def test_a_sample_holds_the_same_tokens_for_every_module_and_no_padding(
    ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    one, task = adapters[0], tmp_path / "uneven.jsonl"
    prompts = ["one that is much longer than all others", *"abcdef"]
    task.write_text("".join(json.dumps({"prompt": p, "completion": "ok"}) + "\n" for p in prompts))

    def sample(**options: Any) -> ModuleInputs:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return collected(ref, [one], [str(task)], folder, **options)

    every, samples = sample(tokens=EVERYTHING), sample(tokens=40)
    # <bos> <user> … <assistant> ok, the end token left out.
    assert len(every(one, DOWN)) == sum(len(p) + 5 for p in prompts)
    rows = rows_of(samples(one, DOWN), every(one, DOWN))
    assert len(rows) == 40
    for module in one.modules:
        torch.testing.assert_close(samples(one, module), every(one, module)[rows], rtol=1e-4, atol=1e-5)
    assert torch.equal(sample(tokens=40)(one, DOWN), samples(one, DOWN))
    assert not torch.equal(sample(tokens=40, seed=1)(one, DOWN), samples(one, DOWN))


def test_a_sample_ends_before_the_end_of_a_turn(tmp_path: Path) -> None:
    made = tokenizer_of(STYLES["chatml"])
    tiny_llama(vocab_size=len(made), max_position_embeddings=128).save_pretrained(tmp_path / "base")
    made.save_pretrained(tmp_path / "base")
    one = opened(write_adapter(tmp_path / "one", random_factors({Q: (32, 32)}, 2, seed=1)))
    (tmp_path / "task.jsonl").write_text('{"prompt": "ab", "completion": "xyz"}\n')
    ref = pin(str(tmp_path / "base"), device="cpu", dtype="fp32")
    sample = collected(ref, [one], [str(tmp_path / "task.jsonl")], tmp_path, tokens=EVERYTHING)
    turns = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nxyz"
    assert len(sample(one, Q)) == len(made(turns, add_special_tokens=False)["input_ids"])


def test_adapters_are_told_apart_only_after_they_acted(
    home: Path, ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    one, two = adapters
    samples = collected(ref, adapters, [str(home / "shift.jsonl")], tmp_path, tokens=20)
    later = "model.layers.1.self_attn.q_proj"
    assert torch.equal(samples(one, Q), samples(two, Q))
    assert float((samples(one, later) - samples(two, later)).norm()) > 0.1 * float(samples(one, later).norm())


def test_each_adapter_may_bring_its_own_task(
    home: Path, ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    one, two = adapters
    files = [f"{two.ref.id}={home / 'another.jsonl'}", f"{one.ref.id}={home / 'shift.jsonl'}"]
    samples = collected(ref, adapters, files, tmp_path, tokens=EVERYTHING)
    for adapter, task in ((one, "shift"), (two, "another")):
        wanted = captured(home, adapter, task)[Q]
        torch.testing.assert_close(samples(adapter, Q), wanted, rtol=1e-4, atol=1e-5)
    hashes = samples.settings["module_inputs"]["data"]
    assert hashes.keys() == {one.ref.pinned, two.ref.pinned}
    assert set(hashes.values()) < set(samples.inputs.values())
    assert len(samples.inputs) == 3


def test_modules_with_the_same_activations_share_their_bytes(
    home: Path, ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    collected(ref, adapters[:1], [str(home / "shift.jsonl")], tmp_path, tokens=10)
    per_layer = 32 + 32 + 32 + 48  # q, k and v; o; gate and up; down
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 2 * per_layer * 10 * 4


def test_conv1d_modules_and_the_head_are_sampled_too() -> None:
    base = gpt2()
    encoded = [base.encode(example) for example in examples(5)]
    places = [range(len(item.ids)) for item in encoded]
    wanted = [base.model(input_ids=torch.tensor([item.ids]), output_hidden_states=True) for item in encoded]
    last = torch.cat([one.hidden_states[-1][0] for one in wanted])
    found = activations(base, list(base.shapes), encoded, places, batch_size=2)
    torch.testing.assert_close(found["lm_head"], last, rtol=1e-4, atol=1e-5)
    assert {name: x.shape[1] for name, x in found.items()} == {name: shape[1] for name, shape in base.shapes.items()}


def test_a_module_that_does_not_see_every_token_is_refused() -> None:
    base = llama()
    mlp = base.model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x[:, :1])).expand_as(x)
    encoded = [base.encode(example) for example in examples(2)]
    with pytest.raises(Refused, match=re.escape(f"{DOWN} does not see every token")):
        activations(base, [Q, DOWN], encoded, [[0, 1], [2]])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jsonl", "b.jsonl"], "one FILE for all adapters or ADAPTER=FILE for each"),
        (["a.jsonl", "{one}=b.jsonl"], "one FILE for all adapters or ADAPTER=FILE for each"),
        (["{one}=b.jsonl"], "no --data for {two}"),
        (["{one}=a.jsonl", "{two}=a.jsonl", "nobody=a.jsonl"], "nobody=…: no adapter of this merge"),
    ],
)
def test_which_file_is_whose_must_be_plain(adapters: list[OpenAdapter], files: list[str], message: str) -> None:
    names = {"one": adapters[0].ref.id, "two": adapters[1].ref.id}
    with pytest.raises(UsageError, match=re.escape(message.format(**names))):
        data_of([file.format(**names) for file in files], adapters)


def test_a_file_may_have_an_equals_sign_in_its_name(adapters: list[OpenAdapter], tmp_path: Path) -> None:
    odd = tmp_path / "lr=1.jsonl"
    odd.touch()
    assert set(data_of([str(odd)], adapters).values()) == {odd}


def test_inputs_that_cannot_be_collected_are_errors(
    home: Path, ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no such file"):
        ModuleInputs(base=ref, files=data_of(["none.jsonl"], adapters))
    with pytest.raises(UsageError, match="at least 1 token"):
        ModuleInputs(base=ref, files=data_of([str(home / "shift.jsonl")], adapters), tokens=0)
    with pytest.raises(OutputError, match="cannot be written"):
        collected(ref, adapters, [str(home / "shift.jsonl")], tmp_path / "absent")
    alien = opened(write_adapter(tmp_path / "alien", random_factors({"model.layers.7.mlp.up_proj": (8, 8)}, 2, seed=3)))
    with pytest.raises(Refused, match="does not fit"):
        collected(ref, [alien], [str(home / "shift.jsonl")], tmp_path)


def test_regmean_merges_by_them(home: Path, ref: BaseRef, adapters: list[OpenAdapter], tmp_path: Path) -> None:
    one, two = adapters
    files = data_of([f"{one.ref.id}={home / 'shift.jsonl'}", f"{two.ref.id}={home / 'another.jsonl'}"], adapters)
    samples = ModuleInputs(base=ref, files=files, tokens=EVERYTHING)
    made = {}
    for method in ("regmean", "linear"):
        planned = planned_merge(adapters, [0.5, 0.5], method=method, rank="sum", inputs=samples)
        with recorded(tmp_path / "runs.db", "merge", planned.settings, samples.inputs, tmp_path / method) as run:
            if method == "regmean":
                samples.collect(planned.adapters, planned.modules, tmp_path)
            merge(planned, tmp_path / method, run)
        made[method] = deltas(tmp_path / method)
    own = [deltas(home / name) for name in ("one", "two")]
    sampled = [captured(home, one, "shift"), captured(home, two, "another")]
    wanted = {}
    for module in own[0]:
        there = [i for i in (0, 1) if module in own[i]]
        case = Case(
            [(own[i][module].numpy(), torch.eye(own[i][module].shape[1], dtype=torch.float64).numpy()) for i in there],
            [0.5 for _ in there],
            inputs=[sampled[i][module].double().numpy() for i in there],
        )
        wanted[module] = torch.from_numpy(regmean(case))
    close(made["regmean"], wanted, 1e-4)
    shared = own[0].keys() & own[1].keys()

    def error(result: Mapping[str, Tensor]) -> float:
        pairs = [(own[i][m], sampled[i][m].double(), result[m]) for i in (0, 1) for m in shared]
        return sum(float((x @ (result - delta).T).square().sum()) for delta, x, result in pairs)

    assert error(made["regmean"]) < 0.7 * error(made["linear"])


def test_regmean_without_examples_says_what_it_needs(adapters: list[OpenAdapter]) -> None:
    with pytest.raises(UsageError, match="needs examples"):
        planned_merge(adapters, [0.5, 0.5], method="regmean")
