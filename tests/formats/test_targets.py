"""Which modules a configuration means: as PEFT decides it, and no expression of a stranger's runs without an end."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lora_cli.formats.config import parse_config
from lora_cli.formats.facts import LoraConfigFacts

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.1.mlp.experts.3.up_proj",
    "layers.1.self_attn.q_proj",
    "model.vision_tower.layers.1.q_proj",
    "lm_head",
    "score",
    "score.dense",
    "q_proj",
]


def facts(**settings: Any) -> LoraConfigFacts:
    return parse_config(json.dumps({"peft_type": "LORA", **settings}).encode())


def agrees(**settings: Any) -> None:
    theirs = LoraConfig(**settings)
    if isinstance(theirs.target_modules, set):
        settings["target_modules"] = sorted(theirs.target_modules)
    ours = facts(**settings).targets
    for name in NAMES:
        found = check_target_module_exists(theirs, name)
        expected = bool(found) and type(found).__name__ != "_ExcludedModule"
        assert ours.module(name) == expected, (name, settings)
    assert not ours.undecided


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [3], "layers_pattern": ["blocks", "experts"]},
        {"target_modules": ["q_proj", "score"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision.*"},
        {"target_modules": ["q_proj", "score", "dense"], "modules_to_save": ["score"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
        {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": r"(?:.*?(?:language|text).*?q_proj)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.q_proj)"},
        {"target_modules": "q_proj"},
    ],
)
def test_modules_are_meant_as_in_peft(chosen: dict[str, Any]) -> None:
    agrees(**chosen)


words = st.sampled_from(["q_proj", "up_proj", "self_attn", "layers", "1", "model", "score", "experts.3.up_proj"])


@given(
    targets=st.lists(words, min_size=1, max_size=3),
    layers=st.none() | st.lists(st.integers(0, 11), max_size=2),
    excluded=st.lists(words, max_size=2),
    saved=st.none() | st.lists(words, min_size=1, max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_any_lists_of_names_mean_the_modules_that_peft_would_adapt(
    targets: list[str], layers: list[int] | None, excluded: list[str], saved: list[str] | None
) -> None:
    agrees(target_modules=targets, layers_to_transform=layers, exclude_modules=excluded or None, modules_to_save=saved)


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", None])
def test_all_modules_of_the_file_count_where_none_are_named(targets: str | None) -> None:
    assert all(map(facts(target_modules=targets).targets.module, NAMES))


def test_parameters_are_meant_by_the_end_of_their_names() -> None:
    targets = facts(target_modules=[], target_parameters=["experts.gate_up_proj", "gate.weight"]).targets
    assert targets.parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert targets.parameter("model.layers.0.mlp.gate.weight")
    assert not targets.parameter("model.layers.0.mlp.experts.down_proj")
    assert not targets.module("model.layers.0.mlp.gate")


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": r".*(?=\.)\.q_proj"},
        {"target_modules": "q" * 3_000},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["(a|b)"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["(?!x)"]},
    ],
)
def test_what_cannot_be_evaluated_is_said_and_leaves_nothing_out(chosen: dict[str, Any]) -> None:
    targets = facts(**chosen).targets
    assert targets.undecided
    assert all(map(targets.module, NAMES))


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"((a|aa)+)+b", "(.*)*" * 100, "[a-z]{0,900}" * 60 + "!"])
def test_no_expression_takes_long(pattern: str) -> None:
    targets = facts(target_modules=pattern).targets
    start = time.process_time()
    for number in range(2_000):
        targets.module(f"model.{number}." + "a" * 900)
    assert time.process_time() - start < 10
