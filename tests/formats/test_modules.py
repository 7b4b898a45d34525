"""Names in an adapter's file as the base's own: what PEFT applies under its names, the rest repaired or refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

from lora_cli.errors import HeaderError, Refused
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from lora_cli.formats.modules import Located, locate_modules
from lora_cli.formats.reader import open_adapter
from lora_cli.formats.skeleton import Skeleton
from tests.architectures import SPECS, agree, by_peft, by_us, factors, files, model, saved_adapter, skeleton

# What PEFT and transformers remark about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

Q = "layers.1.self_attn.q_proj"


def located(folder: Path, base: Skeleton | None = None) -> Located:
    config = parse_config((folder / "adapter_config.json").read_bytes())
    return locate_modules(config, read_header(folder / "adapter_model.safetensors"), base)


def shape_of(kind: str, name: str) -> tuple[int, int]:
    matrix = skeleton(kind).get(name)
    assert matrix is not None, name
    return matrix.shape


# Every architecture --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_a_lora_on_every_kind_of_module_is_read_as_peft_applies_it(kind: str, tmp_path: Path) -> None:
    base = skeleton(kind)
    layers = {name: matrix for name, matrix in base.matrices.items() if matrix.kind in ("linear", "embedding", "conv")}
    # PEFT refuses some modules of Mamba layers, and takes some names for those of experts.
    others = {"out_proj", "conv1d"} if kind == "nemotron_h" else base.retargeted
    # Of modules that share one weight PEFT merges every update into it.
    targets = [name for name in layers if name not in base.ties and name.rpartition(".")[2] not in others]
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model(kind), LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    found = located(tmp_path, base)
    assert (found.refusals, found.conflict, found.notes, found.coverage) == ((), "", (), 1.0)
    assert set(found.modules) == set(targets)
    agree(by_us(kind, tmp_path), by_peft(kind, tmp_path))


# Names that are not the base's ---------------------------------------------------------------------------------------

TEXT = f"model.language_model.{Q}"
# Kind, name in the file (below PEFT's prefix unless it begins with /), the base's name, whether PEFT applies it.
NAMINGS = [
    ("llama", f"model.{Q}", f"model.{Q}", True),
    ("llama", Q, f"model.{Q}", False),
    ("llama", f"base_model.model.model.{Q}", f"model.{Q}", False),
    ("llama", f"base_model.model.base_model.model.model.{Q}", f"model.{Q}", False),
    ("llama", f"_orig_mod.model.{Q}", f"model.{Q}", False),
    ("llama", f"/_orig_mod.base_model.model.model.{Q}", f"model.{Q}", False),
    ("llama", f"/module.base_model.model.model.{Q}", f"model.{Q}", False),
    ("llama", f"module.model.{Q}", f"model.{Q}", False),
    ("llama", "model.layers.1._checkpoint_wrapped_module.self_attn.q_proj", f"model.{Q}", False),
    ("llama", "model.layers.1._fsdp_wrapped_module.self_attn._orig_mod.q_proj", f"model.{Q}", False),
    ("llama", f"model.{Q}.base_layer", f"model.{Q}", False),
    ("gemma3", f"language_model.model.{Q}", TEXT, True),
    ("gemma3", f"language_model.{Q}", TEXT, False),
    ("gemma3", f"model.{Q}", TEXT, False),
    ("gemma3", Q, TEXT, False),
    ("gemma3", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", None, False),
    ("gemma3_text", f"model.language_model.{Q}", f"model.{Q}", False),
    ("gemma3_text", f"language_model.model.{Q}", f"model.{Q}", False),
    ("llama4", f"model.{Q}", f"language_model.model.{Q}", False),
    ("mllama", f"language_model.model.{Q.replace('1', '0')}", TEXT.replace("1", "0"), True),
    ("llava", f"language_model.model.{Q}", TEXT, True),
    ("llava", f"model.{Q}", TEXT, False),
    ("qwen2_5_vl", f"model.{Q}", TEXT, False),
    ("qwen2_5_vl", "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", False),
    ("qwen3_5", f"model.{Q}", TEXT, False),
    ("qwen3_5_text", f"model.language_model.{Q}", f"model.{Q}", False),
    ("nemotron_h", "backbone.layers.1.mixer.q_proj", "model.layers.1.mixer.q_proj", True),
    ("nemotron_h", "/backbone.layers.1.mixer.q_proj", "model.layers.1.mixer.q_proj", True),
    ("whisper", "encoder.layers.0.self_attn.q_proj", "model.encoder.layers.0.self_attn.q_proj", False),
    ("bert", "encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query", False),
    ("phimoe", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router", False),
]


@pytest.mark.parametrize(("kind", "written", "name", "applied"), [n for n in NAMINGS if n[2]])
def test_a_name_is_read_as_peft_reads_it_or_repaired(
    kind: str, written: str, name: str, applied: bool, tmp_path: Path
) -> None:
    tensors = factors({written: shape_of(kind, name)})
    target = written.removesuffix(".base_layer").rpartition(".")[2]
    folder = saved_adapter(tmp_path, tensors, [target])
    found = located(folder, skeleton(kind))
    assert (list(found.modules), found.refusals, found.conflict) == ([name], (), "")
    assert (found.notes == ()) == applied
    if not applied:
        assert found.notes[0].startswith("names repaired: ")
        assert found.notes[0].endswith(f" is {name}")
    if kind != "phimoe":  # whose targets PEFT does not find at all
        assert (f"{name}.weight" in by_peft(kind, folder)) == applied
    if applied:
        agree(by_us(kind, folder), by_peft(kind, folder))


def test_a_vision_model_of_transformers_4_is_found_in_that_of_transformers_5(tmp_path: Path) -> None:
    shape = shape_of("vit", "vit.layers.0.attention.q_proj")
    folder = saved_adapter(tmp_path, factors({"vit.encoder.layer.0.attention.attention.query": shape}), ["query"])
    found = located(folder, skeleton("vit"))
    assert (list(found.modules), found.conflict) == (["vit.layers.0.attention.q_proj"], "")
    assert "names repaired" in found.notes[0]


@pytest.mark.parametrize("written", ["layers.1.self_attn.q_proj", "self_attn.q_proj"])
def test_a_name_that_could_mean_several_modules_is_not_guessed(written: str, tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, factors({written: (32, 32)}), ["q_proj"])
    found = located(folder, skeleton("whisper"))
    assert (dict(found.modules), found.coverage) == ({}, 0.0)
    assert found.conflict == f"targets match no module of the base (such as {written})"


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = factors({f"model.{Q}": (32, 32), f"_orig_mod.model.{Q}": (32, 32)})
    folder = saved_adapter(tmp_path, tensors, ["q_proj"])
    for base in (None, skeleton("llama")):
        assert located(folder, base).refusals == (f"model.{Q} is there twice, under two names",)


def test_names_without_peft_s_prefix_are_left_out_and_said(tmp_path: Path) -> None:
    shapes = {f"model.{Q}": (32, 32), "/model.layers.0.self_attn.q_proj": (32, 32)}
    folder = saved_adapter(tmp_path / "some", factors(shapes), ["q_proj"])
    for base in (None, skeleton("llama")):
        found = located(folder, base)
        assert list(found.modules) == [f"model.{Q}"]
        assert found.notes == (
            "modules that PEFT does not apply are left out: 1 without the prefix base_model.model "
            "(such as model.layers.0.self_attn.q_proj)",
        )
    agree(by_us("llama", folder), by_peft("llama", folder))
    alone = saved_adapter(tmp_path / "all", factors({f"/model.{Q}": (32, 32)}), ["q_proj"])
    [reason] = located(alone).refusals
    assert reason.startswith("PEFT applies none of its modules: 1 without the prefix base_model.model")
    # For this class PEFT puts the prefix there itself.
    assert located(alone, skeleton("qwen3_moe")).notes == ()
    assert set(by_peft("qwen3_moe", alone)) == {f"model.{Q}.weight"}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"exclude_modules": r".*layers\.1\..*q_proj"},
        {"target_modules": r".*(v_proj|layers\.0\.self_attn\.q_proj)"},
    ],
)
def test_tensors_outside_the_configuration_are_left_out_and_said(settings: dict[str, Any], tmp_path: Path) -> None:
    names = [f"model.layers.{n}.self_attn.{m}" for n in (0, 1) for m in ("q_proj", "v_proj")]
    shapes = {name: shape_of("llama", name) for name in names}
    chosen = {"target_modules": ["q_proj", "v_proj"], **settings}
    folder = saved_adapter(tmp_path, factors(shapes), chosen.pop("target_modules"), **chosen)
    found = located(folder, skeleton("llama"))
    assert 0 < len(found.modules) < 4
    assert f"model.{Q}" not in found.modules
    assert "outside target_modules" in found.notes[0]
    agree(by_us("llama", folder), by_peft("llama", folder))


def test_an_adapter_s_own_name_in_its_tensors_is_taken_off(tmp_path: Path) -> None:
    tensors = {name.replace("lora_A.", "lora_A.x.").replace("lora_B.", "lora_B.x."): tensor
               for name, tensor in factors({f"model.{Q}": (32, 32)}).items()}  # fmt: skip
    folder = saved_adapter(tmp_path / "one", tensors, ["q_proj"])
    assert located(folder).notes == ("names repaired: without the adapter's name x",)
    more = {name.replace(".x.", ".y.").replace("layers.1", "layers.0"): t.clone() for name, t in tensors.items()}
    assert located(saved_adapter(tmp_path / "two", tensors | more, ["q_proj"])).refusals == (
        "2 adapters in one file (x, y)",
    )


# What the configuration says, held against the tensors ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({"r": 16, "lora_alpha": 32}, 16), ({"rank_pattern": {"q_proj": 3}}, 3), ({"r": None}, 8)],
)
def test_a_rank_that_is_not_the_tensors_is_refused(settings: dict[str, Any], wanted: int, tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, factors({f"model.{Q}": (32, 32)}), ["q_proj"], **settings)
    for base in (None, skeleton("llama")):
        [reason] = located(folder, base).refusals
        assert reason == f"model.{Q} has rank 2 in its tensors and {wanted} in its configuration: PEFT cannot load it"


def test_transposed_factors_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.T for name, tensor in factors({f"model.{Q}": (32, 32)}).items()}
    folder = saved_adapter(tmp_path, tensors, ["q_proj"])
    assert "has rank 32 in its tensors and 2" in located(folder).refusals[0]


def test_shapes_that_are_not_the_base_s_are_named(tmp_path: Path) -> None:
    shapes = {f"model.{Q}": (16, 32), "model.layers.0.self_attn.q_proj": (32, 32)}
    folder = saved_adapter(tmp_path, factors(shapes), ["q_proj"])
    found = located(folder, skeleton("llama"))
    assert found.conflict == f"shapes differ from base at model.{Q}: (16, 32) here, (32, 32) there"
    assert found.coverage == 0.5
    with pytest.raises(Refused, match="does not fit LlamaForCausalLM: shapes differ"):
        open_adapter(files(folder), skeleton("llama"))


# Mixtures of experts -------------------------------------------------------------------------------------------------


def expert_shapes(kind: str, below: str, leaves: Mapping[str, tuple[int, int]], experts: int = 4) -> dict[str, Any]:
    return {
        f"model.layers.{layer}.{below}.experts.{expert}.{leaf}": shape
        for layer in range(2)
        for expert in range(experts)
        for leaf, shape in leaves.items()
    }


QWEN = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
MIXTRAL = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}


@pytest.mark.parametrize(
    ("kind", "below", "leaves"),
    [("qwen3_moe", "mlp", QWEN), ("mixtral", "block_sparse_moe", MIXTRAL), ("mixtral", "mlp", MIXTRAL)],
)
@pytest.mark.parametrize("fuse", [False, True])
def test_single_experts_of_transformers_4_are_those_that_peft_fuses(
    kind: str, below: str, leaves: Mapping[str, tuple[int, int]], fuse: bool, tmp_path: Path
) -> None:
    folder = saved_adapter(tmp_path, factors(expert_shapes(kind, below, leaves)), sorted(leaves))
    found = located(folder, skeleton(kind))
    assert (found.notes, found.refusals, found.conflict) == ((), (), "")
    agree(by_us(kind, folder, fuse=fuse), by_peft(kind, folder))
    opened = open_adapter(files(folder), skeleton(kind), fuse=fuse)
    ranks = {name.rpartition(".")[2]: one.rank for name, one in opened.modules.items()}
    assert ranks == ({"gate_up_proj": 4, "down_proj": 2} if fuse else dict.fromkeys(leaves, 2))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "phimoe"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
def test_fused_experts_are_read_as_peft_means_them(kind: str, parameters: list[str], tmp_path: Path) -> None:
    router = next(name for name in skeleton(kind).matrices if name.endswith((".gate", ".router")))
    torch.manual_seed(2)
    chosen = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=[f"experts.{name}" for name in parameters] + [f"{router.rpartition('.')[2]}.weight"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={r".*\.gate_up_proj": 7},
    )
    wrapped = peft.get_peft_model(model(kind), chosen)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    found = located(tmp_path, skeleton(kind))
    assert (found.notes, found.refusals, found.conflict) == ((), (), "")
    experts = [name for name in found.modules if ".experts." in name]
    assert len(experts) == 2 * 4 * len(parameters)
    assert router in found.modules
    agree(by_us(kind, tmp_path), by_peft(kind, tmp_path))


def test_fused_experts_have_names_without_their_base_too(tmp_path: Path) -> None:
    tensors = {}
    for layer in range(2):
        for place, (out_features, in_features) in {"experts.base_layer": (48, 32), "experts": (32, 24)}.items():
            name = f"model.layers.{layer}.mlp.{place}"
            tensors |= {
                f"{name}.lora_A.weight": torch.randn(4 * 2, in_features),
                f"{name}.lora_B.weight": torch.randn(out_features, 4 * 2),
            }
    chosen = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    declared = saved_adapter(tmp_path / "declared", tensors, [], target_parameters=chosen)
    found, known = located(declared), located(declared, skeleton("qwen3_moe"))
    assert found.modules == known.modules
    assert found.modules["model.layers.1.mlp.experts.3.gate_up_proj"].out_features == 48
    flat = saved_adapter(tmp_path / "flat", tensors, ["q_proj", "experts"])
    for base in (None, skeleton("qwen3_moe")):
        assert "fused experts that its target_parameters do not name" in located(flat, base).refusals[0]


def test_a_stack_of_which_an_expert_is_missing_is_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, factors(expert_shapes("qwen3_moe", "mlp", QWEN, experts=3)), sorted(QWEN))
    assert located(folder, skeleton("qwen3_moe")).refusals[0].startswith("expert 3 of model.layers.0.mlp.experts.")


@pytest.mark.parametrize(
    ("kind", "below", "leaves", "settings", "note"),
    [
        (
            "qwen3_moe",
            "mlp",
            QWEN,
            {"use_rslora": True},
            "use_rslora: PEFT makes the update of fused experts",
        ),
        (
            "qwen3_moe",
            "mlp",
            {key: QWEN[key] for key in ("gate_proj", "up_proj")},
            {},
            "PEFT does not apply the experts' factors without those of down_proj",
        ),
        ("phimoe", "block_sparse_moe", MIXTRAL, {}, "PEFT does not apply factors of single experts on a PhimoeFor"),
    ],
)
def test_experts_that_peft_applies_otherwise_than_they_were_trained_are_said(
    kind: str,
    below: str,
    leaves: Mapping[str, tuple[int, int]],
    settings: dict[str, Any],
    note: str,
    tmp_path: Path,
) -> None:
    tensors = factors(expert_shapes(kind, below, leaves))
    folder = saved_adapter(tmp_path, tensors, sorted(leaves), **settings)
    found = located(folder, skeleton(kind))
    assert (found.refusals, found.conflict) == ((), "")
    assert [said for said in found.notes if said.startswith(note)]
    # The update is the one that was trained: s·B·A of each expert by itself.
    name = f"model.layers.1.{below}.experts.2.{min(leaves)}"
    scale = 4 / 2**0.5 if settings else 4 / 2
    expected = scale * tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
    read = open_adapter(files(folder), skeleton(kind)).read(name.replace("block_sparse_moe", "mlp"), torch.float64)
    assert (read.dense() - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj"])
def test_a_layer_beside_experts_is_not_lost_though_peft_loses_it(name: str, tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, factors({name: shape_of("deepseek_v3", name)}), ["gate_proj", "up_proj"])
    found = located(folder, skeleton("deepseek_v3"))
    assert (list(found.modules), found.conflict) == ([name], "")
    assert found.notes == (f"PEFT takes {name} for a part of the experts and does not apply it",)
    assert by_peft("deepseek_v3", folder) == {}


# Other tensors -------------------------------------------------------------------------------------------------------


def test_an_untouched_copy_of_the_head_is_no_full_head(tmp_path: Path) -> None:
    base = model("llama")
    wrapped = peft.get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"]))
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=True)
    names = list(read_header(tmp_path / "adapter_model.safetensors").tensors)
    assert any("base_layer.weight" in name for name in names)
    found = located(tmp_path, skeleton("llama"))
    assert (found.saved, found.refusals, found.conflict) == ({}, (), "")
    assert {"lm_head", "model.embed_tokens"} <= found.modules.keys()


def test_modules_saved_whole_are_named_by_the_base_s_names(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    peft.get_peft_model(model("bert"), config).save_pretrained(str(tmp_path))
    found = located(tmp_path, skeleton("bert"))
    assert (found.whole, found.conflict) == (("classifier",), "")
    with pytest.raises(Refused, match=r"tensors of a full head saved \(classifier.weight\)"):
        open_adapter(files(tmp_path), skeleton("bert"))
    taken = open_adapter(files(tmp_path), skeleton("bert"), whole=True)
    assert taken.saved.keys() == {"classifier.weight", "classifier.bias"}


def test_a_file_without_factors_says_so(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, {"score.weight": torch.ones(2, 3)}, ["q_proj"])
    assert located(folder).refusals == ("no LoRA tensors in its weights",)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(Refused, match="no LoRA tensors"):
        open_adapter(files(folder))


def test_a_factor_without_its_partner_is_refused(tmp_path: Path) -> None:
    tensors = factors({f"model.{Q}": (32, 32)})
    folder = saved_adapter(tmp_path, {name: t for name, t in tensors.items() if "lora_A" in name}, ["q_proj"])
    with pytest.raises(HeaderError, match="has lora_A but no lora_B"):
        located(folder)
