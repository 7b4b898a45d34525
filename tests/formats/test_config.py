"""adapter_config.json of strangers: read as data, the scale by PEFT's own rule, what is no s·B·A refused by name."""

import contextlib
import importlib
import itertools
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lora_cli.errors import ConfigError
from lora_cli.formats.config import parse_config
from lora_cli.formats.facts import LoraConfigFacts
from tests.clock import least_cpu
from tests.hostile.corpus import GOOD_CONFIG, code_naming_configs, malformed_configs

MALFORMED = malformed_configs()


def config(**changes: Any) -> LoraConfigFacts:
    return parse_config(json.dumps({**GOOD_CONFIG, **changes}).encode())


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_configuration_is_refused(what: str) -> None:
    def refused() -> None:
        with pytest.raises(ConfigError):
            parse_config(MALFORMED[what])

    assert least_cpu(refused, 2.0) < 2


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("Git LFS pointer", "config is a Git LFS pointer"),
        ("alpha twice", "gives lora_alpha twice"),
        ("alpha is NaN", "holds NaN"),
        ("r is text", "r in adapter_config.json must be a whole number above 0, not the text '8'"),
        ("use_rslora is text", "use_rslora in adapter_config.json must be true or false, not the text 'false'"),
        ("two megabytes", "2,000,0.. bytes"),
    ],
)
def test_the_refusal_says_what_is_wrong(what: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config(MALFORMED[what])


@pytest.mark.slow
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_facts_or_a_config_error(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse_config(data)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
KEYS = sorted(peft.LoraConfig().to_dict())


@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_value_of_any_key_gives_facts_or_a_config_error(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        found = config(**changes)
        found.refusals()
        found.scale("model.layers.0.self_attn.q_proj", 4)


def test_every_key_that_peft_writes_is_understood_and_plain_lora_is_not_refused(tmp_path: Path) -> None:
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], base_model_name_or_path="acme/tiny").save_pretrained(
        tmp_path
    )
    found = parse_config((tmp_path / "adapter_config.json").read_bytes())
    assert (found.rank, found.alpha, found.base, found.target_modules) == (4, 8.0, "acme/tiny", ("q_proj",))
    assert found.refusals() == ()


def test_old_and_sparse_configurations_are_read() -> None:
    found = parse_config(b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": null, "bias": "none"}')
    assert (found.rank, found.alpha, found.target_modules, found.base) == (8, 16.0, (), "")
    assert found.refusals() == ()
    assert config(target_modules="all-linear").target_modules == "all-linear"
    assert config(modules_to_save=["score", "score"]).modules_to_save == ("score",)
    assert config(new_key={"a": [1]}).unknown == {"new_key": {"a": [1]}}


def test_nothing_that_a_configuration_names_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str, package: str | None = None) -> None:
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    for data in code_naming_configs(tmp_path / "canary").values():
        parse_config(data).refusals()


# Scale -------------------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(6, 6)
        self.v_proj = torch.nn.Linear(6, 6)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention() for _ in range(12)])
        self.proj = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [
        ({}, {}),
        ({"q_proj": 2}, {"q_proj": 32}),
        ({"layers.1.q_proj": 3}, {"layers.1.q_proj": 5}),
        ({"1.q_proj": 3, "q_proj": 2}, {"1.q_proj": 3, "q_proj": 7.5}),
        ({"q_proj": 2, "1.q_proj": 3}, {"q_proj": 7, "1.q_proj": 3}),
        ({"^layers.1.q_proj": 3}, {"^layers.1.q_proj": 9, "^q_proj": 11}),
        ({r"layers\.1\.v_proj$": 3}, {r"layers\.1\.v_proj$": 9}),
        ({"proj": 5}, {"proj": 50}),
        ({"layers.1..q_proj": 5}, {"layers.1.q.proj": 50}),
    ],
)
def test_the_scale_is_that_of_peft(rslora: bool, rank_pattern: dict[str, int], alpha_pattern: dict[str, float]) -> None:
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "proj"],
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=rslora,
    )
    with warnings.catch_warnings():
        # PEFT warns of an entry that matches no module; such entries are part of what is compared here.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Tiny(), theirs)
    ours = config(r=4, lora_alpha=16, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, use_rslora=rslora)

    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "scaling")]

    assert len(layers) == 25
    for name, layer in layers:
        rank = layer.lora_A["default"].weight.shape[0]
        module = name.removeprefix("base_model.model.")
        assert (ours.rank_of(module), ours.scale(module, rank)) == (rank, layer.scaling["default"])


parts = st.lists(st.sampled_from(["q", "qx", "1", "11", "a_b"]), min_size=1, max_size=4)
keys = st.builds(
    lambda front, names, dot, end: front + dot.join(names) + end,
    st.sampled_from(["", "", "^"]),
    parts,
    st.sampled_from([".", r"\.", "..", "x"]),
    st.sampled_from(["", "", "$"]),
)


@pytest.mark.slow
@given(patterns=st.dictionaries(keys, st.integers(1, 99), max_size=5), module=parts.map(".".join))
@settings(max_examples=500, deadline=None)
def test_keys_match_as_in_peft(patterns: dict[str, int], module: str) -> None:
    expected = patterns.get(get_pattern_key(list(patterns), module), 1)
    assert config(lora_alpha=1, alpha_pattern=patterns).scale(module, 1) == expected


def test_the_rank_is_that_of_the_tensor() -> None:
    assert config(r=8, lora_alpha=16).scale("q_proj", 4) == 4.0
    assert config(r=8, lora_alpha=16, use_rslora=True).scale("q_proj", 4) == 8.0


@pytest.mark.parametrize("key", ["(a+)+", ".*", "q_proj|v_proj", "[qv]_proj", r".*\.up", r"layers\.\d", "q{1,9}"])
def test_a_regular_expression_matches_as_in_peft(key: str) -> None:
    found = config(lora_alpha=1, alpha_pattern={"first": 9, key: 5, "last": 7})
    for module in ("m.q_proj", "first", "m.last", "aaaa", "a.up", "layers.7", "layers.77", "x.qqq", "x.q", "q_proj.x"):
        expected = {"first": 9, key: 5, "last": 7}.get(get_pattern_key(["first", key, "last"], module), 1)
        assert found.scale(module, 1) == expected, module


@pytest.mark.parametrize("key", [r"(?=q)q", r"(q)\1", "q_proj\\", "(", "a" * 5_000])
def test_a_regular_expression_that_only_backtracking_evaluates_is_refused_and_never_run(key: str) -> None:
    found = config(alpha_pattern={key: 4}) if len(key) < 1000 else config(alpha_pattern={f"({key})": 4})
    assert any("alpha_pattern has the key" in reason for reason in found.refusals())
    with pytest.raises(ConfigError, match="alpha_pattern"):
        found.scale("a" * 10_000, 4)


def test_regular_expressions_that_cost_much_end_with_a_word() -> None:
    slow = "".join(f"[a-z.]{{0,900}}{letter}?" for letter in "abcdefghijklmnopqrstuvwxyz") + "!"
    found = config(alpha_pattern={slow: 4})
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"take too long|not evaluated here"):
        for number in range(100_000):
            found.scale(f"model.layers.{number}." + "q" * 900, 4)
    assert time.process_time() - start < 20


def test_adapters_of_one_configuration_do_not_spend_its_budget_of_time_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.thread_time", lambda: next(clock) * 0.1)
    found = config(lora_alpha=1, alpha_pattern={"[qv]_proj": 5}, target_modules="(.*[qv]_proj)")
    for _ in range(1_000):
        assert found.scale("m.q_proj", 1) == 5
        assert found.targets.module("m.q_proj")
    assert not found.targets.undecided


def test_thirty_thousand_patterns_cost_no_more_than_a_few() -> None:
    found = config(alpha_pattern={f"layers.{i}.q": i for i in range(30_000)})

    def scaled() -> None:
        assert [found.scale(f"model.layers.{i}.q", 1) for i in range(10_000)] == list(range(10_000))

    assert least_cpu(scaled, 3.0) < 3


def test_a_missing_alpha_is_told() -> None:
    found = parse_config(b'{"peft_type": "LORA", "r": 8}')
    with pytest.raises(ConfigError, match="lora_alpha is missing"):
        found.scale("q_proj", 8)
    assert found.refusals() == ("lora_alpha is missing: the scale of the update is not known",)
    assert math.isclose(config(lora_alpha=0).scale("q_proj", 8), 0)


# What is no s·B·A --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias=all"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {}}, "BD-LoRA"),
        ({"arrow_config": {}}, "Arrow"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "pissa_niter_16"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "OLoRA"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "LoftQ"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
        ({"init_lora_weights": "something_new"}, "something_new"),
    ],
)
def test_what_is_more_than_a_product_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    reasons = config(**changes).refusals()
    assert any(word in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "rank_pattern": {"q_proj": 3}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
        {"modules_to_save": []},
        {"modules_to_save": ["classifier", "score"]},
        {"megatron_core": "megatron.core", "megatron_config": None},
        {"alora_invocation_tokens": None, "trainable_token_indices": None, "layer_replication": None},
        {"fan_in_fan_out": True},
        {"loftq_config": {}},
        {"velora_config": {"num_groups": 64}},
        {"monteclora_config": {"num_samples": 4}},
        {"layers_to_transform": 3, "exclude_modules": "lm_head"},
    ],
)
def test_what_is_a_product_is_not_refused(changes: dict[str, Any]) -> None:
    assert config(**changes).refusals() == ()


def test_every_variant_of_lora_that_peft_knows_has_been_judged() -> None:
    judged = {
        "use_dora",
        "velora_config",
        "alora_invocation_tokens",
        "monteclora_config",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
    }
    fields = peft.LoraConfig.__dataclass_fields__.values()
    assert {field.name for field in fields if field.metadata.get("is_lora_variant")} == judged
