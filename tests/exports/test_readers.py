"""A merged adapter means the same in every program that loads it, and where it does not, the tool names the program."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.exports.vllm import RANKS, max_lora_rank
from lora_cli.formats import writer
from lora_cli.formats.coefficients import coefficients_text
from lora_cli.records import Coefficients
from tests import readers
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import Told, ok, refused
from tests.readers import READERS, Refuses
from tests.steps.test_merge import close, deltas, in_peft, merged, opened
from tests.tiny_bases import tiny_llama

ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
BASE = {
    f"model.layers.{layer}.{block}.{name}": shape
    for layer in range(2)
    for block, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name, shape in names.items()
}
IN_ATTENTION = {module: shape for module, shape in BASE.items() if "self_attn" in module}
FORMS = {
    "auto": [],
    "a number": ["--rank", "8"],
    "energy": ["--energy", "0.8"],
    "sum": ["--rank", "sum"],
    "another method": ["-m", "ties", "--energy", "0.7"],
    "half precision": ["--dtype", "bf16"],
    "compact": ["--energy", "0.8", "--compact"],
    "vllm": ["--for", "vllm"],
    "vllm, compact": ["--for", "vllm", "--energy", "0.8", "--compact"],
    "sglang": ["--for", "sglang"],
    "one kind": ["--scope", "modules=o_proj,down_proj"],
    "q alone": ["--scope", "modules=q_proj"],
    "q for sglang": ["--scope", "modules=q_proj", "--for", "sglang"],
    "k and up for sglang": ["--scope", "modules=k_proj,up_proj", "--for", "sglang"],
    "one layer": ["--scope", "layers=1"],
    "v of one layer": ["--scope", "layers=0", "--scope", "modules=v_proj", "--energy", "0.8"],
    "learnt": ["--coef", "c.json"],
}
RANKS_APART = {"llama.cpp", "SGLang", "LoRAX", "TensorRT-LLM", "lmdeploy"}
PARTIAL = {"LoRAX", "lmdeploy"}
WRONG = {
    "compact": RANKS_APART,
    "vllm, compact": RANKS_APART,
    "q alone": {"SGLang"},
    "one layer": PARTIAL,
    "v of one layer": {"SGLang", *PARTIAL},
}


@pytest.fixture(autouse=True)
def pool(own_home: Path) -> Path:
    """An adapter of every module, and one of lower rank and other scale that has attention only."""
    write_adapter(own_home / "wide", random_factors(BASE, 8, seed=1), lora_alpha=16)
    write_adapter(own_home / "narrow", random_factors(IN_ATTENTION, 4, seed=2), lora_alpha=4, use_rslora=True)
    coefficients = Coefficients(
        adapters=tuple(opened(own_home / name).ref.pinned for name in ("wide", "narrow")),
        values=dict.fromkeys(BASE, ((0.5,), (2.0,))),
        granularity="module",
        activation="linear",
        task_sha256="0" * 64,
        base="acme/tiny",
    )
    (own_home / "c.json").write_text(coefficients_text(coefficients))
    return own_home


def made(*options: str) -> tuple[Path, Told]:
    told = ok("merge", "wide", "narrow", *options, "-o", "out")
    return Path("out"), told


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Equal to a millionth of the whole norm, modules that one side lacks counting as zero."""
    try:
        close(found, wanted, 1e-6)
    except AssertionError:
        return False
    return True


def wrong_in(folder: Path, wanted: Mapping[str, Tensor]) -> set[str]:
    """The programs that do not apply `wanted`."""
    wrong = set()
    for name, read in READERS.items():
        try:
            right = same(read(folder, BASE), wanted)
        except Refuses:
            right = False
        wrong |= set() if right else {name}
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_reader_applies_what_peft_applies_except_those_that_are_named(form: str) -> None:
    folder, told = made(*FORMS[form])
    applied = in_peft([folder], [1.0])
    assert same(readers.peft(folder), applied)
    assert wrong_in(folder, applied) == WRONG.get(form, set())
    # A server asked for by --for stands there with its version.
    named = {name for name in READERS if re.search(rf"\b{re.escape(name)}\b(?! \d)", told.err)}
    assert named == WRONG.get(form, set())


@pytest.mark.parametrize("form", ["sum", "compact", "sglang", "learnt"])
def test_the_update_is_that_of_the_parents(form: str) -> None:
    options = FORMS[form] if form == "learnt" else ["-m", "linear", "--weights", "0.5,2", "--rank", "sum", *FORMS[form]]
    folder, _ = made(*[o for o in options if o not in ("--energy", "0.8")], "--force")
    wide, narrow = deltas(Path("wide")), deltas(Path("narrow"))
    close(deltas(folder), {m: 0.5 * wide[m] + 2.0 * narrow.get(m, torch.zeros(())) for m in BASE}, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if "compact" not in form])
def test_a_result_has_one_rank_which_is_its_alpha(form: str) -> None:
    folder, told = made(*FORMS[form])
    config = config_of(folder)
    ranks = {t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    results = json.loads((folder / "run.json").read_text())["results"]
    own = {module["rank"] for module in results["modules"].values()}
    assert max(own) == results["rank"] == config["r"]
    assert ("padded with zeros" in told.err) == (len(own) > 1)
    assert ("padded with zeros" in (folder / "README.md").read_text()) == (len(own) > 1)


def test_ranks_that_agree_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    begin = writer.TensorStream.__init__

    def counted(self: writer.TensorStream, path: Path, *rest: Any) -> None:
        written.append(path)
        begin(self, path, *rest)

    monkeypatch.setattr(writer.TensorStream, "__init__", counted)
    ok("merge", "wide", "narrow", "--rank", "4", "-o", "even")
    assert len(written) == 1
    ok("merge", "wide", "narrow", "-o", "uneven")
    assert len(written) == 3
    assert sorted(file.name for file in Path("uneven").iterdir()) == sorted(
        file.name for file in Path("even").iterdir()
    )


def bare(modules: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A model of nothing but these linear layers."""
    root = nn.Module()
    for module, (out, inn) in modules.items():
        holder = root
        for part in module.split(".")[:-1]:
            if part not in dict(holder.named_children()):
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.add_module(module.rpartition(".")[2], nn.Linear(inn, out, bias=False))
    return root


def test_a_compact_result_survives_peft_sorting_its_keys(tmp_path: Path) -> None:
    # Some names end like another, and some differ from another only where it has a dot.
    names = (
        "q",
        "a.q",
        "b.a.q",
        "layers.0.q",
        "deep.layers.0.q",
        "deep.layers.0_q",
        "layers.10.q",
        "x-y.0.q",
        "zz.a.q",
    )
    shapes = dict.fromkeys(names, (16, 12))
    ranks = {name: 1 + place % 5 for place, name in enumerate(names)}
    parent = write_adapter(
        tmp_path / "parent",
        random_factors(shapes, ranks, seed=1),
        task_type=None,
        target_modules=list(names),
        lora_alpha=7,
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items()},
    )
    merged(tmp_path / "out", [parent], [1.0], compact=True)
    assert len(config_of(tmp_path / "out")["rank_pattern"]) > 5
    from peft import PeftModel

    again: Any = PeftModel.from_pretrained(bare(shapes), str(tmp_path / "out"))
    again.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    for folder in ("out", "again"):
        close(in_peft([tmp_path / folder], [1.0]), deltas(parent), 1e-6)
        close({m: opened(tmp_path / folder).read(m).dense().double() for m in names}, deltas(parent), 1e-6)


@pytest.mark.parametrize("form", ["auto", "compact", "q for sglang"])
def test_transformers_loads_the_result_too(form: str) -> None:
    folder, _ = made(*FORMS[form])
    model: Any = tiny_llama(intermediate_size=48)
    model.load_adapter(str(folder))
    found = {m: model.get_submodule(m) for m in readers.peft(folder)}
    applied = {m: layer.get_delta_weight("default").detach().double() for m, layer in found.items()}
    close(applied, readers.peft(folder), 1e-6)


def test_targets_are_short_where_they_mean_the_same_modules() -> None:
    write_adapter(Path("regex"), random_factors(BASE, 2, seed=3), target_modules=r".*(self_attn|mlp)\..*_proj")
    write_adapter(Path("first"), random_factors(dict([*BASE.items()][:7]), 2, seed=4), layers_to_transform=[0])
    cases = {
        ("wide", "narrow"): {*ATTENTION, *MLP},
        ("wide", "narrow", "--scope", "modules=q_proj,*.mlp.up_proj"): {"q_proj", "up_proj"},
        ("wide", "regex", "first"): {*ATTENTION, *MLP},
        ("narrow", "regex", "--scope", "modules=q_proj"): {"q_proj"},
        ("wide", "--scope", "layers=1", "--scope", "modules=q_proj"): {"model.layers.1.self_attn.q_proj"},
        ("narrow", "regex"): set(BASE),
        ("first",): {module for module in BASE if ".0." in module},
    }
    for number, (words, wanted) in enumerate(cases.items()):
        ok("merge", *words, "-o", f"out{number}")
        assert set(config_of(Path(f"out{number}"))["target_modules"]) == wanted, words


def test_what_the_base_has_in_some_layers_only_is_no_partial_result() -> None:
    hybrid = {f"model.layers.{n}.{'self_attn.q_proj' if n == 2 else 'linear_attn.out'}": (32, 32) for n in range(3)}
    write_adapter(Path("hybrid"), random_factors(hybrid, 2, seed=3))
    unet = {f"down_blocks.{n}.attn.{name}": (32, 32) for n, name in ((0, "to_q"), (0, "to_out.0"), (1, "to_q"))}
    write_adapter(Path("unet"), random_factors(unet, 2, seed=4), target_modules=["to_q", "to_out.0"])
    first = {module: shape for module, shape in BASE.items() if ".0.self_attn" in module}
    write_adapter(Path("first"), random_factors(first, 2, seed=5), target_modules=list(first))
    mlp = {module: shape for module, shape in BASE.items() if "mlp" in module}
    write_adapter(Path("mlp"), random_factors(mlp, 2, seed=6), target_modules=r".*mlp\..*")
    for words, kinds in (
        (["hybrid"], ""),
        (["unet"], ""),
        (["mlp"], ""),
        (["first", "narrow"], ""),
        (["hybrid", "--scope", "layers=0"], "out"),
        (["first", "mlp", "--scope", "modules=*_proj"], "k_proj, o_proj, q_proj and v_proj"),
    ):
        told = ok("merge", *words, "-o", f"out-{'-'.join(words[:2])}").err
        assert ("only some layers have" in told) == bool(kinds), words
        assert not kinds or f"only some layers have {kinds}: LoRAX" in told


def test_options_that_ask_for_two_forms_of_result_are_refused() -> None:
    assert "--compact cannot be combined with --for sglang" in refused(
        2, "merge", "wide", "--compact", "--for", "sglang"
    )
    assert "--compact cannot be combined with --dense" in refused(2, "merge", "wide", "--compact", "--dense")
    assert "--for cannot be combined with --dense" in refused(2, "merge", "wide", "--for", "sglang", "--dense")
    assert "is not one of" in refused(2, "merge", "wide", "--for", "tgi")


def test_what_parents_lack_themselves_is_not_told() -> None:
    for name in ("q_proj", "up_proj"):
        shapes = {module: shape for module, shape in BASE.items() if module.endswith(name)}
        write_adapter(Path(name), random_factors(shapes, 2, seed=3))
    told = ok("merge", "q_proj", "up_proj", "-o", "out").err.splitlines()
    assert [line.partition(":")[0].strip() for line in told] == [
        "norm-matched",
        "module names are not checked against acme/tiny",
        "licences",
    ]


def test_compact_says_nothing_where_ranks_agree() -> None:
    told = ok("merge", "wide", "narrow", "--rank", "4", "--compact", "-o", "out")
    assert "ranks differ" not in told.err
    assert config_of(Path("out"))["rank_pattern"] == {}


def test_what_is_told_of_readers_is_told_again_of_a_result_that_is_up_to_date() -> None:
    _, first = made(*FORMS["v of one layer"])
    _, again = made(*FORMS["v of one layer"])
    assert "up to date" in again.err
    assert first.err.splitlines()[1:] == again.err.splitlines()[1:]
    assert len(again.err.splitlines()) == 5


def test_vllm_is_given_the_smallest_rank_that_it_accepts() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    assert RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_the_shapes_of_zeros_for_sglang_are_those_of_the_base() -> None:
    folder, _ = made(*FORMS["q for sglang"])
    factors = load_file(folder / "adapter_model.safetensors")
    for module, shape in BASE.items():
        if module.rpartition(".")[2] in ("k_proj", "v_proj"):
            a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
            assert (b.shape[0], a.shape[1]) == shape
            assert not a.any()
            assert not b.any()


def test_a_shape_that_nobody_here_has_is_taken_from_its_twin_or_asked_for() -> None:
    kinds = {name: {m: s for m, s in BASE.items() if m.endswith(name)} for name in ("q_proj", "k_proj", "v_proj")}
    write_adapter(Path("qk"), random_factors(kinds["q_proj"] | kinds["k_proj"], 2, seed=3))
    told = ok("merge", "qk", "--for", "sglang", "-o", "out").err
    assert "zeros in 2 modules: SGLang 0.5.23 fuses them" in told
    assert deltas(Path("out")).keys() == {module for kind in kinds.values() for module in kind}
    write_adapter(Path("v"), random_factors(kinds["v_proj"], 2, seed=4))
    told = refused(5, "merge", "v", "--for", "sglang", "-o", "none")
    assert "without model.layers.0.self_attn.q_proj, whose shape is not known" in told
