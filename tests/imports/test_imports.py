"""Adapters of other programs: recognised, converted exactly or refused by name, and taken wherever an adapter is."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.imports import file_of, find, imports
from lora_cli.methods import file_names
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.imports.kinds import SAMPLES, Sample, adapterhub, kohya, of_peft

COPIED = {"parts", "peft"}
TAKEN = [one for one in SAMPLES if not one.refused]


def titled(samples: list[Sample]) -> list[object]:
    return [pytest.param(one, id=one.title) for one in samples]


def written(sample: Sample, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The path to convert, and the dense updates."""
    folder.mkdir()
    updates = dict(sample.write(folder))
    return folder / sample.source, updates


def asked(sample: Sample) -> list[str]:
    """The options that a sample needs to be exact."""
    return ["--rank", str(sample.rank)] if sample.best else []


def base_of(place: Path) -> str:
    """The base model that a sample wrote beside its adapter, or a name."""
    return str(place / "base") if (place / "base").is_dir() else "acme/tiny"


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """The updates of a PEFT folder with one rank and one alpha, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, b in tensors.items():
        for end, other in ((".lora_B.weight", ".lora_A.weight"), (".lora_embedding_B", ".lora_embedding_A")):
            if name.endswith(end):
                module = name.removesuffix(end)
                a = tensors[module + other]
                assert a.shape[0] == b.shape[1] == config["r"]
                found[module.removeprefix("base_model.model.")] = scale * (
                    b.double().flatten(1) @ a.double().flatten(1)
                )
    assert len(tensors) == 2 * len(found)
    return found


@pytest.mark.parametrize("sample", titled(TAKEN))
def test_a_converted_adapter_is_the_same_update(sample: Sample, tmp_path: Path) -> None:
    source, updates = written(sample, tmp_path / "theirs")
    base = base_of(tmp_path)
    words = ["convert", str(source), "-o", "out", "--base", base, *asked(sample)]
    told = ok(*words)
    assert told.out == "out\n"
    result = dense(Path("out"))
    assert result.keys() == updates.keys()
    for module, update in updates.items():
        assert torch.linalg.norm(result[module] - update) <= 1e-6 * torch.linalg.norm(update), module
    record = json.loads(Path("out/run.json").read_text())
    assert record["results"]["exact"] is sample.exact
    assert record["results"]["error"] == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == sample.rank
    assert ("as in the file" in told.err) is sample.exact
    assert "up to date" in ok(*words).err


@pytest.mark.parametrize("sample", titled([one for one in SAMPLES if one.refused]))
def test_what_is_no_lora_is_refused_by_name(sample: Sample, tmp_path: Path) -> None:
    source, _ = written(sample, tmp_path / "theirs")
    said = refused(5, "convert", str(source), "-o", "out", "--base", base_of(tmp_path))
    assert sample.refused in said
    assert len(said.splitlines()) <= 2
    assert not Path("out").exists()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("sample", titled([*SAMPLES]))
def test_an_adapter_is_recognised_by_its_own_kind_alone(sample: Sample, tmp_path: Path) -> None:
    source, _ = written(sample, tmp_path / "theirs")
    found = find(source)
    assert found is not None
    place = found.place
    names = [name for name, one in zip(file_names("lora_cli.imports"), imports(), strict=True) if one.recognises(place)]
    assert names == [sample.program]


def test_every_kind_has_a_sample() -> None:
    assert {one.program for one in SAMPLES} == {*file_names("lora_cli.imports")}


@pytest.mark.parametrize("sample", titled([one for one in TAKEN if not COPIED.intersection([one.program])]))
def test_a_lower_rank_is_the_best_one_and_its_error_is_told(sample: Sample, tmp_path: Path) -> None:
    source, updates = written(sample, tmp_path / "theirs")
    told = ok("convert", str(source), "-o", "out", "--base", base_of(tmp_path), "--rank", "2")
    record = json.loads(Path("out/run.json").read_text())["results"]
    result, total, lost = dense(Path("out")), 0.0, 0.0
    for module, update in updates.items():
        update = update.flatten(1)
        values = torch.linalg.svdvals(update)
        best = float(values[2:].square().sum().sqrt() / values.square().sum().sqrt())
        error = float(torch.linalg.norm(result[module] - update) / torch.linalg.norm(update))
        assert error == pytest.approx(best, abs=1e-6), module
        assert record["modules"][module]["error"] == pytest.approx(best, abs=1e-6), module
        total, lost = total + float(values.square().sum()), lost + float(values[2:].square().sum())
    assert record["error"] == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert ("relative error" in told.err) is (sample.rank > 2)


def test_a_rank_that_no_program_serves_is_not_written_unasked(tmp_path: Path) -> None:
    loha = Sample("", "loha", lambda folder: of_peft(folder, "LoHa", r=24, alpha=6, init_weights=False))
    source, _ = written(loha, tmp_path / "theirs")
    said = refused(5, "convert", str(source), "-o", "out")
    assert "rank 576, more than 512" in said
    assert "--rank R" in said
    assert not Path("out").exists()
    assert "rank 576" in refused(5, "merge", str(source), "-o", "out")


ONE_EACH = {one.program: one for one in reversed(TAKEN) if "--base" not in one.says}


@pytest.mark.parametrize("sample", titled([*ONE_EACH.values()]))
def test_it_is_taken_wherever_an_adapter_is(sample: Sample, tmp_path: Path) -> None:
    source, updates = written(sample, tmp_path / "theirs")
    ok("convert", str(source), "-o", "out", "--base", "acme/tiny")
    base = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    told = ok("diff", str(source), "out", "--json", "--base", base)
    assert json.loads(told.out)["cosine"] == pytest.approx(1.0)
    kind = next(one for one in imports() if type(one).__name__.lower() == sample.program).program
    assert f"{kind}, converted" in told.err
    ok("merge", f"{source}=0.5", "-o", "half", "--base", base)
    for module, update in dense(Path("half")).items():
        assert torch.linalg.norm(update - updates[module].flatten(1) / 2) <= 1e-3 * torch.linalg.norm(update)


@pytest.mark.parametrize("sample", titled(TAKEN[:1]))
def test_sync_lists_it_as_usable(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    written(sample, tmp_path / "pool" / "theirs")
    ok("pool", "sync", "acme/tiny", "--from", str(tmp_path / "pool"))
    [row] = json.loads(ok("pool", "list", "--json", "--base", "acme/tiny").out)["rows"]
    assert (row["status"], row["rank"]) == ("ok", sample.rank)
    told = ok("merge", row["id"], "-o", "merged", "--base", "acme/tiny")
    assert "converted" in told.err
    assert "1 unchanged" in ok("pool", "sync", "acme/tiny", "--from", str(tmp_path / "pool")).err
    ok("pool", "verify", row["id"], "--deep")


def test_a_text_that_names_no_file_is_none() -> None:
    assert file_of("acme/\0x.safetensors") is None
    assert file_of("acme/x.safetensors") is None


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    source, _ = written(SAMPLES[0], tmp_path / "theirs")
    Path("out").mkdir()
    Path("out/mine").write_text("kept")
    assert "out exists" in refused(1, "convert", str(source), "-o", "out")
    assert "not an output of lora" in refused(1, "convert", str(source), "-o", "out", "--force")
    assert "where the adapter is" in refused(1, "convert", str(source), "-o", str(source))
    assert Path("out/mine").read_text() == "kept"


def test_a_place_without_an_adapter(tmp_path: Path) -> None:
    assert "no file or folder" in refused(3, "convert", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "no adapter of a known program" in refused(5, "convert", str(tmp_path / "empty"))


def test_one_of_several_adapters_in_a_file(tmp_path: Path) -> None:
    sample = next(one for one in SAMPLES if one.title == "several adapters in one file")
    source, updates = written(sample, tmp_path / "theirs")
    assert "--adapter speech" in refused(5, "convert", str(source))
    assert "it has no adapter 'hearing'" in refused(5, "convert", str(source), "--adapter", "hearing")
    ok("convert", str(source), "--adapter", "speech", "-o", "out")
    for module, update in dense(Path("out")).items():
        assert torch.equal(update, updates[module])


def test_several_adapters_beside_each_other_are_named(tmp_path: Path) -> None:
    sample = next(one for one in SAMPLES if one.program == "kohya")
    source, _ = written(sample, tmp_path / "theirs")
    (source.parent / "other.safetensors").write_bytes(source.read_bytes())
    said = refused(5, "convert", str(source.parent))
    assert "2 adapters beside each other (other.safetensors, style.safetensors)" in said
    assert "other.safetensors" in said.splitlines()[-1]


def test_copied_tensors_take_no_rank(tmp_path: Path) -> None:
    sample = next(one for one in SAMPLES if one.program == "parts")
    source, _ = written(sample, tmp_path / "theirs")
    assert "holds one adapter" in refused(2, "convert", str(source), "--adapter", "mine")
    assert "copied as it is" in refused(2, "convert", str(source), "--rank", "2")


def test_files_of_one_folder_are_catalogued_and_merged_among_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "pool" / "styles"
    folder.mkdir(parents=True)
    for at, name in enumerate(("one", "two", "three")):
        updates = kohya(folder, alphas=(2.0 + at,) * 3, name=f"{name}.safetensors")
    ok("pool", "sync", "stable-diffusion-v1", "--from", str(tmp_path / "pool"))
    rows = json.loads(ok("pool", "list", "--json").out)["rows"]
    assert {row["id"]: row["status"] for row in rows} == {
        f"pool/styles/{name}.safetensors": "ok" for name in ("one", "two", "three")
    }
    told = ok("merge", *(row["id"] for row in rows), "-o", "merged", "--weights", "sum", "--method", "linear")
    assert told.err.count("an adapter of kohya, converted") == 3
    for module, update in dense(Path("merged")).items():
        wanted = updates[module] * (2 + 3 + 4) / 4
        assert torch.linalg.norm(update - wanted) <= 1e-3 * torch.linalg.norm(wanted)
    assert "3 unchanged" in ok("pool", "sync", "stable-diffusion-v1", "--from", str(tmp_path / "pool")).err
    (folder / "two.safetensors").unlink()
    assert "1 gone" in ok("pool", "sync", "stable-diffusion-v1", "--from", str(tmp_path / "pool")).err
    ok("pool", "verify", str(folder / "one.safetensors"), "--deep")


def test_checkpoints_are_named(tmp_path: Path) -> None:
    for step in (500, 1000):
        write_adapter(tmp_path / "out" / f"checkpoint-{step}", random_factors({"x.q_proj": (8, 8)}, 2, seed=step))
    for words in (["convert"], ["merge"]):
        said = refused(5, *words, str(tmp_path / "out"))
        assert "checkpoint-500 and checkpoint-1000" in said
        assert said.splitlines()[1].endswith("out/checkpoint-1000")


def test_a_pickle_is_refused_with_the_line_that_helps(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = tmp_path / "theirs"
    updates = adapterhub(folder) if folder.mkdir() is None else {}
    torch.save(load_file(folder / "adapter.safetensors"), folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    line = refused(5, "convert", str(folder)).splitlines()[1].strip()
    subprocess.run(["bash", "-c", line.replace("python", sys.executable, 1)], cwd=folder, check=True, timeout=120)
    ok("convert", str(folder), "-o", "out")
    assert dense(Path("out")).keys() == updates.keys()


def test_what_is_peft_already_is_not_converted(tmp_path: Path) -> None:
    write_adapter(tmp_path / "ours", random_factors({"x.q_proj": (8, 8)}, 2, seed=0))
    assert "nothing to convert" in refused(5, "convert", str(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("entries", "said"),
    [({"peft_type": "BOFT"}, "peft_type is BOFT"), ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "bias=all")],
)
def test_what_peft_writes_and_no_merge_takes_is_named(entries: dict[str, object], said: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "ours", random_factors({"x.q_proj": (8, 8)}, 2, seed=0))
    file = tmp_path / "ours" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    told = refused(5, "convert", str(tmp_path / "ours"))
    assert said in told
    assert "nothing to convert" not in told


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter.gguf", "adapter_config.json"])
def test_a_pipe_in_the_place_of_a_file_is_named(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert f"{name}: a pipe, not a file" in refused(5, "convert", str(tmp_path), "-o", "out")
    assert f"{name}: a pipe, not a file" in refused(5, "convert", str(tmp_path / name), "-o", "out")


def test_a_broken_file_is_named_and_not_taken_for_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    assert "an adapter of llama.cpp (GGUF): truncated" in refused(5, "convert", str(tmp_path), "-o", "out")
    write_adapter(tmp_path / "ours", random_factors({"x.q_proj": (8, 8)}, 2, seed=0))
    (tmp_path / "ours" / "adapter_model.safetensors").write_bytes(b"no safetensors")
    said = refused(5, "convert", str(tmp_path / "ours"), "-o", "out")
    assert "adapter_model.safetensors: not a safetensors file" in said


def test_a_scale_that_is_text_is_quoted(tmp_path: Path) -> None:
    source, _ = written(SAMPLES[0], tmp_path / "theirs")
    file = source / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["scale"] = "4"
    file.write_text(json.dumps(config))
    assert 'scale is "4", not a number' in refused(5, "convert", str(source), "-o", "out")


def test_a_missing_gguf_package_is_one_error_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = written(next(one for one in SAMPLES if one.title == "GGUF of Qwen 3"), tmp_path / "theirs")
    ok("convert", str(source), "-o", "lora", "--base", "acme/tiny")
    config = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4}
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "gguf", None)
    for words in (["convert", str(source), "-o", "out"], ["export", "gguf", "lora", "--base", "base", "-o", "out"]):
        if words[0] == "export":
            file = Path("lora/adapter_config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
        said = refused(2, *words)
        assert "GGUF needs the gguf package" in said
        assert "pip install 'lora-cli[gguf]'" in said
