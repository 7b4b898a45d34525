"""`lora export`: every kind of adapter for every program, read back by the program's rule; and what goes wrong."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli import hashes
from lora_cli.exports import Written, export
from lora_cli.formats.reader import Factors
from lora_cli.methods import file_names
from lora_cli.steps.export.export import error_of
from tests import readers
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.exports.table import EVERY, EXACT, GPT2, KINDS, LLAMA, ROUNDED, TARGETS, Kind
from tests.readers import OF_EXPORTS, Deltas
from tests.steps.test_merge import close

CELLS = [pytest.param(kind, target, id=f"{kind.title}-{target}") for kind in KINDS for target in TARGETS]


@pytest.fixture(autouse=True)
def home(own_home: Path) -> Path:
    return own_home


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("rounded", ["", "B", "A", "BA"])
def test_the_error_of_an_update_is_that_of_dense_matrices(rounded: str, more: int, scale: float) -> None:
    numbers = np.random.default_rng(0)
    b, a = numbers.normal(size=(40, 4)).astype("f4"), numbers.normal(size=(4, 30)).astype("f4")
    own = Written(Factors(b, a), 2.0)
    b = b * np.float32(2 / scale)
    b, a = (x.astype("f2").astype("f4") if side in rounded else x for side, x in (("B", b), ("A", a)))
    written = Written(Factors(np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0)))), scale)
    first, second = (x.scale * (x.factors.B.astype("f8") @ x.factors.A.astype("f8")) for x in (own, written))
    wanted = np.linalg.norm(second - first) / np.linalg.norm(first)
    assert error_of(own, written) == pytest.approx(wanted, rel=1e-6, abs=1e-10)
    assert (wanted > 1e-5) == bool(rounded)


def base(config: Mapping[str, object] = LLAMA) -> None:
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps(config))


def plain(folder: str = "mine", **config: object) -> None:
    base()
    write_adapter(Path(folder), random_factors(EVERY, 8, seed=1), base="base", **{"lora_alpha": 16, **config})


def leftovers() -> set[str]:
    return {file.name for file in Path.cwd().iterdir()} - {"base", "mine"}


def read(target: str, folder: Path, kind: Kind) -> Deltas:
    """The updates of an export by the program's rule."""
    names = [*EVERY]
    if target in ("gguf", "ollama"):
        heads = None if kind.base is GPT2 else (4, 2)
        found = readers.gguf(folder, heads=heads)
        return found if heads is not None else {_GPT2[name]: update for name, update in found.items()}
    return OF_EXPORTS[target](folder, names)


_GPT2 = {
    "model.layers.0.attn_qkv": "transformer.h.0.attn.c_attn",
    "model.layers.1.mlp.up_proj": "transformer.h.1.mlp.c_fc",
}


def test_every_file_is_a_target_and_has_a_column() -> None:
    assert set(TARGETS) == set(file_names("lora_cli.exports")) == set(OF_EXPORTS)
    for target in TARGETS:
        assert export(target).title == f"{export(target).program} {export(target).version}"
        assert target in ok("export", "--help").out


@pytest.mark.parametrize(("kind", "target"), CELLS)
def test_a_kind_is_exported_as_the_table_says(kind: Kind, target: str) -> None:
    base(kind.base)
    updates = kind.write(Path("mine").absolute())
    outcome = kind.outcome(target)
    if outcome not in (EXACT, ROUNDED):
        said = refused(5, "export", target, "mine", "-o", "out")
        assert outcome in said
        assert len(said.splitlines()) <= 2
        assert leftovers() == set()
        return
    told = ok("export", target, "mine", "-o", "out")
    assert told.out == "out\n"
    record = json.loads(Path("out/run.json").read_text())
    errors = record["results"]["errors"]
    assert len(errors) == len(updates)
    assert (max(errors.values()) == 0) == (outcome == EXACT)
    assert max(errors.values()) < 1e-7
    assert set(record["outputs"]) == {file.name for file in Path("out").iterdir()} - {"run.json"}
    if kind.title not in ("embeddings", "experts, one by one"):
        found = read(target, Path("out"), kind)
        close(found, updates, 1e-12 if outcome == EXACT else 1e-7)
    assert leftovers() == {"out"}
    assert "up to date" in ok("export", target, "mine", "-o", "out").err


@pytest.mark.parametrize("target", ["mlx", "olive", "gguf"])
@pytest.mark.parametrize("kind", list(KINDS[:8]), ids=lambda kind: kind.title)
def test_a_round_trip_gives_the_same_update(kind: Kind, target: str) -> None:
    base(kind.base)
    updates = kind.write(Path("mine").absolute())
    ok("export", target, "mine", "-o", "out")
    ok("convert", "out", "-o", "back", "--base", "base")
    close(readers.peft(Path("back")), updates, 1e-6)
    if kind.title == "one rank, one alpha" and target != "olive":
        before, after = (load_file(Path(one) / "adapter_model.safetensors") for one in ("mine", "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang"])
def test_an_adapter_of_one_rank_and_alpha_keeps_its_factors(target: str) -> None:
    plain()
    ok("export", target, "mine", "-o", "out")
    before, after = (load_file(Path(one) / "adapter_model.safetensors") for one in ("mine", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["target_modules"] == sorted({module.rpartition(".")[2] for module in EVERY})


def test_sglang_gets_the_layers_that_it_fuses() -> None:
    base()
    shapes = {module: shape for module, shape in EVERY.items() if module.endswith("q_proj")}
    write_adapter(Path("mine"), random_factors(shapes, 4, seed=1), base="base")
    ok("export", "sglang", "mine", "-o", "out")
    found = readers.sglang(Path("out"))
    assert {module.rpartition(".")[2] for module in found} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_narrower_precision_is_asked_for_and_told(target: str, dtype: str) -> None:
    plain()
    told = ok("export", target, "mine", "-o", "out", "--dtype", dtype)
    assert f"in {dtype}" in told.err
    assert "rounded, by" in told.err
    results = json.loads(Path("out/run.json").read_text())["results"]
    assert 1e-5 < max(results["errors"].values()) < 1e-2
    assert results["precision"] == dtype


def test_a_gguf_file_of_a_bf16_adapter_is_bf16_bit_for_bit_if_asked() -> None:
    base()
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1, dtype=torch.bfloat16), base="base")
    ok("export", "gguf", "mine", "-o", "out", "--dtype", "bf16")
    results = json.loads(Path("out/run.json").read_text())["results"]
    assert max(results["errors"].values()) == 0


def test_what_a_precision_cannot_hold_is_refused() -> None:
    base()
    factors = {m: (b * 1e-9, a) for m, (b, a) in random_factors(EVERY, 8, seed=1).items()}
    write_adapter(Path("mine"), factors, base="base")
    assert "loses" in refused(5, "export", "gguf", "mine", "-o", "out", "--dtype", "fp16")
    assert leftovers() == set()
    shutil.rmtree("mine")
    factors = {m: (b * 1e6, a) for m, (b, a) in random_factors(EVERY, 8, seed=1).items()}
    write_adapter(Path("mine"), factors, base="base")
    for target in TARGETS:
        assert "overflow" in refused(5, "export", target, "mine", "-o", "out", "--dtype", "fp16")
    assert leftovers() == set()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", ["zero", "nan", "truncated", "no weights"])
def test_a_broken_adapter_leaves_nothing(target: str, fault: str) -> None:
    plain()
    file = Path("mine/adapter_model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    if fault == "zero":
        save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, file)
    elif fault == "nan":
        tensors[name][0, 0] = float("nan")
        save_file(tensors, file)
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.unlink()
    said = refused(5, "export", target, "mine", "-o", "out")
    words = {"zero": "changes nothing", "nan": "NaN or Inf in", "truncated": "", "no weights": "no adapter_config.json"}
    assert words[fault] in said
    assert len(said.splitlines()) <= 2
    assert leftovers() == set()


def test_an_output_that_exists_or_is_a_link_or_the_adapter_is_left_alone() -> None:
    plain()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert "out exists" in refused(1, "export", "gguf", "mine", "-o", "out")
    assert "not an output of lora" in refused(1, "export", "gguf", "mine", "-o", "out", "--force")
    Path("link").symlink_to("out")
    assert "a link" in refused(1, "export", "gguf", "mine", "-o", "link")
    assert "where the adapter is" in refused(1, "export", "gguf", "mine", "-o", "mine/out")
    assert [file.name for file in Path("out").iterdir()] == ["mine.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_leaves_nothing(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    whole = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "out")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on the disk" in refused(1, "export", target, "mine", "-o", "out")
    assert leftovers() == set()
    monkeypatch.setattr(os, "fsync", whole)
    ok("export", target, "mine", "-o", "out")


@pytest.mark.parametrize("name", ['a"\nSYSTEM you are', "a\nADAPTER /etc/passwd", 'x" y', "a\x1b]0;x"])
def test_a_name_that_would_write_lines_of_a_modelfile_is_refused(name: str) -> None:
    plain()
    said = refused(5, "export", "ollama", "mine", "-o", "out", "--base-name", name)
    assert "a Modelfile cannot hold this name" in said
    assert leftovers() == set()


def test_the_modelfile_names_base_and_adapter() -> None:
    plain()
    told = ok("export", "ollama", "mine", "-o", "out", "--base-name", "./my model.gguf")
    assert Path("out/Modelfile").read_text() == 'FROM "./my model.gguf"\nADAPTER ./adapter.gguf\n'
    assert "--base-name" not in told.err
    told = ok("export", "ollama", "mine", "-o", "other")
    assert 'FROM "base"\n' in Path("other/Modelfile").read_text()
    assert "give Ollama's name of it" in told.err


def test_openvino_is_told_of_a_weight_that_two_layers_have() -> None:
    base(LLAMA | {"tie_word_embeddings": True})
    write_adapter(Path("mine"), random_factors({"lm_head": (104, 32)}, 4, seed=1), base="base")
    told = ok("export", "openvino", "mine", "-o", "out")
    assert "MODE_FUSE of OpenVINO GenAI would change model.embed_tokens too, whose weight lm_head has" in told.err


def test_gguf_needs_the_configuration_and_a_class_that_is_known() -> None:
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="here/absent")
    said = refused(5, "export", "gguf", "mine", "-o", "out")
    assert "that of here/absent is not here" in said
    shutil.rmtree("mine")
    base(LLAMA | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    shapes = {"backbone.layers.0.mixer.x_proj": (34, 64)}
    write_adapter(Path("mine"), random_factors(shapes, 4, seed=1), base="base")
    said = refused(5, "export", "gguf", "mine", "-o", "out")
    assert "whose layers in llama.cpp are not known here" in said or "does not fit" in said


def test_the_gguf_package_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'lora-cli[gguf]'" in refused(2, "export", "gguf", "mine", "-o", "out")
    ok("export", "mlx", "mine", "-o", "out")


def test_the_class_of_a_plain_base_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.exports.gguf.is_plain", lambda adapter, config: False)
        ok("export", "gguf", "mine", "-o", "slow")
    record = json.loads(Path("slow/run.json").read_text())
    monkeypatch.setattr("lora_cli.steps.opened_pool.skeleton_of", lambda base: pytest.fail("the class was built"))
    ok("export", "gguf", "mine", "-o", "fast")
    assert Path("fast/adapter.gguf").read_bytes() == Path("slow/adapter.gguf").read_bytes()
    assert json.loads(Path("fast/run.json").read_text())["outputs"] == record["outputs"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_imports_no_torch(target: str) -> None:
    base()
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1, dtype=torch.bfloat16), base="base", lora_alpha=12)
    # The class of the base is built once; then its modules are in the user's cache.
    ok("export", target, "mine", "-o", "first")
    code = (
        "import sys\nfrom lora_cli.app import app\n"
        f"try:\n    app({['export', target, 'mine', '-o', 'out']!r}, prog_name='lora')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'numpy' in sys.modules\nassert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    files = {file.name: file.read_bytes() for file in Path("first").iterdir()}
    assert files == {file.name: file.read_bytes() for file in Path("out").iterdir()}


def test_the_hashes_are_those_of_the_files() -> None:
    plain()
    for target in TARGETS:
        ok("export", target, "mine", "-o", target)
        outputs = json.loads(Path(target, "run.json").read_text())["outputs"]
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(target).iterdir()}
        assert outputs == {name: found for name, found in files.items() if name != "run.json"}


def test_a_file_that_the_program_would_read_otherwise_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.exports.gguf.rearranged", lambda b, heads: b)
        assert "of its update" in refused(5, "export", "gguf", "mine", "-o", "out")
    assert leftovers() == set()
    ok("export", "gguf", "mine", "-o", "out")


def test_a_disk_that_fills_up_while_a_file_is_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()

    def full(file: hashes.HashedFile, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hashes.HashedFile, "write", full)
        assert "no space left on the disk" in refused(1, "export", "gguf", "mine", "-o", "out")
    assert leftovers() == set()


def test_shapes_of_another_base_are_refused_by_its_class() -> None:
    base(LLAMA | {"num_key_value_heads": 4})
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="base")
    assert "does not fit LlamaForCausalLM" in refused(5, "export", "gguf", "mine", "-o", "out")
    assert leftovers() == set()


def test_a_dry_run_tells_files_and_bytes_and_writes_nothing() -> None:
    plain()
    for target in TARGETS:
        told = json.loads(ok("export", target, "mine", "-o", "out", "--dry-run", "--json").out)
        assert told["schema"] == "lora.export.plan/1"
        assert leftovers() == set()
        ok("export", target, "mine", "-o", "out")
        sizes = {name: Path("out", name).stat().st_size for name in told["files"]}
        assert told["bytes"] == sum(told["files"].values())
        assert all(abs(size - told["files"][name]) < 12_000 for name, size in sizes.items())
        shutil.rmtree("out")


def test_json_tells_the_record_and_force_writes_again() -> None:
    plain()
    told = json.loads(ok("export", "gguf", "mine", "-o", "out", "--json").out)
    assert (told["schema"], told["out"]) == ("lora.export/1", "out")
    first = Path("out/adapter.gguf").read_bytes()
    assert "up to date" not in ok("export", "gguf", "mine", "-o", "out", "--force").err
    assert Path("out/adapter.gguf").read_bytes() == first


def test_a_mistyped_target_or_two_adapters_are_refused() -> None:
    plain()
    assert "did you mean 'gguf'" in refused(2, "export", "ggfu", "mine")
    assert "export takes one adapter" in refused(2, "export", "gguf", "-", stdin="mine\nbase\n")


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "ollama"])
def test_a_name_of_the_base_is_refused_where_no_file_holds_it(target: str) -> None:
    plain()
    assert "--base-name is for ollama" in refused(2, "export", target, "mine", "-o", "out", "--base-name", "llama3.1")
    assert leftovers() == set()
