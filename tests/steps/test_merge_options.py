"""What every merge method shares: scope, norm, dense output, coefficients, serving, rebuilding from a lock."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.formats import writer
from lora_cli.formats.coefficients import coefficients_text
from lora_cli.records import Coefficients
from lora_cli.world import World
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.paths import ROOT
from tests.steps.test_merge import close, deltas, opened

SHAPES = {f"model.layers.{n}.self_attn.{name}": (24, 16) for n in range(3) for name in ("q_proj", "v_proj")}
TWO = ("one", "two")


@pytest.fixture(autouse=True)
def pool(own_home: Path) -> Path:
    """Two adapters of different ranks and scales in the working folder."""
    write_adapter(own_home / "one", random_factors(SHAPES, 2, seed=1), lora_alpha=4)
    write_adapter(own_home / "two", random_factors(SHAPES, 3, seed=2), lora_alpha=3)
    return own_home


def norms(folder: str) -> dict[str, float]:
    return {module: float(delta.norm()) for module, delta in deltas(Path(folder)).items()}


def total(scale: float = 1.0) -> dict[str, Tensor]:
    """Sum of the two adapters' updates, times `scale`."""
    one, two = deltas(Path("one")), deltas(Path("two"))
    return {module: scale * (one[module] + two[module]) for module in SHAPES}


@pytest.mark.parametrize(
    ("scope", "layers", "names"),
    [
        (["layers=0-1"], {0, 1}, {"q_proj", "v_proj"}),
        (["layers=0,2", "modules=v_proj"], {0, 2}, {"v_proj"}),
        (["modules=model.layers.1.*"], {1}, {"q_proj", "v_proj"}),
    ],
)
def test_a_scope_leaves_the_rest_as_the_base_has_it(scope: list[str], layers: set[int], names: set[str]) -> None:
    ok("merge", *TWO, "-m", "linear", "--weights", "sum", "-o", "out", *(w for s in scope for w in ("--scope", s)))
    wanted = {m: d for m, d in total().items() if int(m.split(".")[2]) in layers and m.rpartition(".")[2] in names}
    found = deltas(Path("out"))
    assert found.keys() == wanted.keys()
    close(found, wanted)
    # PEFT must not find modules of other layers by their last names.
    targets = json.loads(Path("out/adapter_config.json").read_text())["target_modules"]
    assert set(targets) == wanted.keys()


@pytest.mark.parametrize(
    ("scope", "code", "words"),
    [
        ("layers=7", 3, "none of the adapters' modules is in the scope"),
        ("layers=2-1", 2, "nor a range of layers"),
        ("layers=x", 2, "nor a range of layers"),
        ("heads=1", 2, "--scope is layers="),
        ("layers", 2, "--scope is layers="),
        ("modules=", 2, "--scope is layers="),
    ],
)
def test_a_wrong_scope_is_named(scope: str, code: int, words: str) -> None:
    assert words in refused(code, "merge", *TWO, "--scope", scope)


def test_norm_match_gives_every_module_the_mean_norm() -> None:
    ok("merge", "one=1", "two=3", "-m", "linear", "--norm-match", "--lambda", "2", "-o", "out")
    one, two = norms("one"), norms("two")
    for module, norm in norms("out").items():
        assert norm == pytest.approx(2 * (0.25 * one[module] + 0.75 * two[module]), rel=1e-5)


def test_dense_writes_the_whole_update() -> None:
    ok("merge", *TWO, "-m", "linear", "--weights", "sum", "--dense", "-o", "out")
    found = load_file("out/delta.safetensors")
    assert not Path("out/adapter_config.json").exists()
    close({name.removesuffix(".weight"): d.double() for name, d in found.items()}, total())
    assert "cannot be combined with --dense" in refused(2, "merge", *TWO, "--dense", "--rank", "4")


def test_a_small_result_is_told() -> None:
    assert "norm 0.01 of the adapters' mean" in (told := ok("merge", *TWO, "--lambda", "0.01", "-o", "out").err)
    assert "it will change little" in told
    assert "change little" not in ok("merge", *TWO, "-o", "large").err


def test_a_rank_that_no_module_has_is_refused() -> None:
    assert "the largest module of these adapters allows rank 16" in refused(5, "merge", *TWO, "--rank", "17")


@pytest.mark.parametrize("device", ["cuda:7", "mps"])
def test_a_device_that_is_not_here(device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    assert "no such device" in refused(5, "merge", *TWO, "--device", device)


def coefficients(**changes: Any) -> Coefficients:
    made: dict[str, Any] = {
        "adapters": tuple(opened(Path(name)).ref.pinned for name in TWO),
        "values": dict.fromkeys(SHAPES, ((0.5,), (1.0, -2.0, 0.0))),
        "granularity": "rank",
        "activation": "linear",
        "task_sha256": "0" * 64,
        "base": "acme/tiny",
    }
    return Coefficients(**made | changes)


def test_learnt_coefficients_leave_nothing_to_missing() -> None:
    Path("c.json").write_text(coefficients_text(coefficients()))
    told = refused(2, "merge", *TWO, "--coef", "c.json", "--missing", "renorm", "-o", "out")
    assert "--missing cannot be combined with --coef" in told


@pytest.mark.parametrize("row", [["0.5"], [True], [None], []])
def test_a_coefficient_that_is_no_number(row: list[Any]) -> None:
    found = json.loads(coefficients_text(coefficients()))
    found["values"] = {module: [row, row] for module in found["values"]}
    Path("c.json").write_text(json.dumps(found))
    assert refused(5 if row == [] else 1, "merge", *TWO, "--coef", "c.json", "-o", "out")


def test_learnt_coefficients_are_merged_as_fit_wrote_them() -> None:
    Path("c.json").write_text(coefficients_text(coefficients()))
    ok("merge", *TWO, "--coef", "c.json", "-o", "out")
    one, tensors = deltas(Path("one")), load_file("two/adapter_model.safetensors")
    wanted = {}
    for module in SHAPES:
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        wanted[module] = 0.5 * one[module] + (b * torch.tensor([1.0, -2.0, 0.0])) @ a
    close(deltas(Path("out")), wanted)


def test_coefficients_of_others_are_refused() -> None:
    Path("c.json").write_text(coefficients_text(coefficients()))
    assert "which was not given" in refused(5, "merge", "one", "--coef", "c.json")
    assert "--weights and --dedupe cannot be combined with --coef" in refused(
        2, "merge", *TWO, "--coef", "c.json", "--weights", "sum"
    )
    short = dict.fromkeys(SHAPES, ((0.5,), (1.0, 2.0)))
    Path("c.json").write_text(coefficients_text(coefficients(values=short)))
    assert "values for" in refused(5, "merge", *TWO, "--coef", "c.json")
    values = ("NaN", "9" * 400, "9" * 5000, "[" * 100_000, "[]", '"x"', "null")
    whole = coefficients_text(coefficients())
    texts = [whole.replace("0.5", value) for value in values]
    for text in ("{}", "[]", "nonsense", whole.replace('"linear"', "[1]"), *texts):
        Path("c.json").write_text(text)
        assert "c.json: no coefficients" in refused(1, "merge", *TWO, "--coef", "c.json")


@pytest.mark.slow
def test_regmean_sees_what_the_examples_feed(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_world.folder)
    ok("pool", "sync")
    parents = ("pool/tarn/mirror", "pool/mossy/double")
    told = ok("merge", *parents, "-m", "regmean", "--data", "task.jsonl", "-o", "out").err
    assert "regmean: 2 adapters" in told
    record = json.loads(Path("out/run.json").read_text())
    assert len([name for name in record["inputs"] if name.startswith("data:task.jsonl@")]) == 1
    assert "up to date" in ok("merge", *parents[::-1], "-m", "regmean", "--data", "task.jsonl", "-o", "out").err
    own = [word for name in parents for word in ("--data", f"{name}=task.jsonl")]
    ok("merge", *parents, "-m", "regmean", *own, "-o", "each")
    close(deltas(Path("each")), deltas(Path("out")), 1e-6)
    assert "no --data for" in refused(2, "merge", *parents, "-m", "regmean", *own[:2])
    assert "takes no --data" in refused(2, "merge", *parents, "-m", "ties", "--data", "task.jsonl")
    Path("other.jsonl").write_text(Path("task.jsonl").read_text().splitlines()[0] + "\n")
    told = refused(5, "merge", "--locked", "out/run.json", "--data", "other.jsonl", "-o", "again")
    assert "give the same --coef, --data" in told
    ok("merge", "--locked", "out/run.json", "--data", "task.jsonl", "-o", "again")
    assert Path("again/run.json").read_bytes() == Path("out/run.json").read_bytes()


def test_near_copies_are_left_out_by_name() -> None:
    factors = random_factors(SHAPES, 2, seed=1)
    write_adapter(Path("copy"), {m: (b * 1.1, a) for m, (b, a) in factors.items()}, lora_alpha=4)
    told = ok("merge", *TWO, "copy", "-m", "linear", "--dedupe", "0.95", "-o", "out").err
    assert "left out" in told
    assert "linear: 2 adapters" in told
    assert len(json.loads(Path("out/run.json").read_text())["merge.lock"]["parents"]) == 2


def test_vllm_is_served_at_a_rank_that_it_accepts() -> None:
    ok("merge", *TWO, "-m", "linear", "--energy", "0.8", "-o", "plain")
    told = ok("merge", *TWO, "-m", "linear", "--energy", "0.8", "--for", "vllm", "-o", "served").err
    line = f"vllm serve acme/tiny --enable-lora --max-lora-rank 8 --lora-modules served={Path.cwd()}/served"
    assert line in told
    assert "rank 3, padded with zeros from 2" in told
    assert "checked by the rules of vLLM 0.33.0, not on a server" in told
    assert "depends on the model" not in told
    again = ok("merge", *TWO, "-m", "linear", "--energy", "0.8", "--for", "vllm", "-o", "served").err
    assert "up to date" in again
    assert line in again
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("served", file).read_bytes() == Path("plain", file).read_bytes()


def test_sglang_is_served_with_the_line_that_its_server_reads() -> None:
    ok("merge", *TWO, "-o", "plain")
    told = ok("merge", *TWO, "--for", "sglang", "-o", "served").err
    line = (
        f"python -m sglang.launch_server --model-path acme/tiny --enable-lora --lora-paths served={Path.cwd()}/served"
    )
    assert line in told
    assert "zeros in 3 modules: SGLang 0.5.23 fuses them with the others" in told
    assert not set(norms("plain")) - set(norms("served"))
    close(deltas(Path("served")), deltas(Path("plain")), 1e-7)


def test_the_line_that_serves_is_safe_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    for out in ("a b;$(touch pwned)'\"`id`", "lr=1e-4,bs=8", "-x"):
        told = ok("merge", *TWO, "--for", "vllm", "-o", f"./{out}").err
        [line] = [line for line in told.splitlines() if "vllm serve" in line]
        shown = subprocess.run(["sh", "-c", line.replace("vllm", "printf '%s\\n'", 1)], capture_output=True, text=True)
        last = shown.stdout.splitlines()[-1]
        # vLLM splits NAME=PATH at equals signs, and at commas takes it for JSON.
        name, path = last.split("=") if "," not in last else json.loads(last).values()
        assert (name, path) == (out, str(Path(out).absolute()))
    assert not Path("pwned").exists()
    monkeypatch.setenv("LORA_BASE", "acme/Tiny")
    assert "vllm serve acme/Tiny --enable" in ok("merge", *TWO, "--for", "vllm", "-o", "with-base").err


def test_a_base_that_nobody_here_has_is_left_open() -> None:
    write_adapter(Path("lost"), random_factors(SHAPES, 3, seed=4), base="/content/llama")
    assert "vllm serve BASE-MODEL --enable" in ok("merge", "lost", "--for", "vllm", "-o", "out").err


def test_what_vllm_does_not_take_is_refused_before_the_work_and_what_it_may_not_take_is_told() -> None:
    write_adapter(Path("head"), random_factors({"lm_head": (90, 16)}, 2, seed=3))
    for server, title in (("vllm", "vLLM 0.33.0"), ("sglang", "SGLang 0.5.23")):
        told = ok("merge", "head", "--for", server, "-o", server).err
        assert f"whether {title} adapts lm_head depends on the model" in told
    write_adapter(Path("turned"), random_factors(SHAPES, 3, seed=4), fan_in_fan_out=True)
    wide = {"model.layers.0.mlp.up_proj": (700, 600)}
    write_adapter(Path("wide"), random_factors(wide, 520, seed=3))
    for plan in ([], ["--dry-run"]):
        for server in ("vllm", "sglang"):
            told = refused(5, "merge", "turned", "--for", server, *plan)
            assert "takes no LoRA on Conv1D modules" in told
            assert "/turned has (fan_in_fan_out)" in told
        assert "ranks up to 512" in refused(5, "merge", "wide", "--for", "vllm", "--rank", "sum", *plan)
        assert "ranks up to 512" in refused(5, "merge", "wide", "--for", "vllm", "--rank", "520", *plan)
    assert "1 module · rank 512 · " in ok("merge", "wide", "--for", "vllm", "-o", "w").err
    assert json.loads(Path("w/adapter_config.json").read_text())["r"] == 512
    assert not Path("lora-runs").exists() or not list(Path("lora-runs").iterdir())


@pytest.fixture
def lock() -> Path:
    """run.json of a merge by a method with randomness."""
    ok("merge", "one=0.3", "two=0.9", "-m", "dare", "--seed", "5", "--energy", "0.8", "-o", "first")
    return Path("first/run.json")


def test_a_locked_merge_gives_the_same_bytes(lock: Path) -> None:
    parents = json.loads(lock.read_text())["merge.lock"]["parents"]
    assert all(len(parent["sha256"]) == 64 for parent in parents.values())
    assert len(parents) == 2
    ok("merge", *TWO, "--locked", str(lock), "-o", "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"):
        assert (Path("first") / name).read_bytes() == (Path("again") / name).read_bytes()


def test_a_locked_merge_finds_its_parents_in_the_catalogue(own_home: Path) -> None:
    os.environ["LORA_BASE"] = "acme/tiny"
    ok("pool", "sync", "--from", str(own_home))
    name = own_home.name
    ok("merge", f"{name}/one", f"{name}/two", "-o", "first")
    told = ok("merge", "--locked", "first/run.json", "-o", "again").err
    assert "norm-matched: 2 adapters" in told
    assert Path("first/run.json").read_bytes() == Path("again/run.json").read_bytes()


def rebuilt(run: Path, *folders: str) -> None:
    """Rebuild a locked merge into `again`, which must hold the same bytes."""
    told = ok("merge", *folders, "--locked", str(run), "-o", "again").err
    assert "taken from the Hub" not in told
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run.parent / name).read_bytes() == (Path("again") / name).read_bytes()
    before, after = (json.loads(file.read_text()) for file in (run, Path("again/run.json")))
    assert (before["key"], before["inputs"], before["settings"]) == (after["key"], after["inputs"], after["settings"])


def test_a_locked_merge_finds_folders_from_where_its_record_lies(lock: Path) -> None:
    rebuilt(lock)
    assert lock.read_bytes() == Path("again/run.json").read_bytes()


def test_a_tree_that_was_moved_is_merged_again_under_the_old_names(lock: Path) -> None:
    Path("elsewhere/deep").mkdir(parents=True)
    for name in (*TWO, "first"):
        Path(name).rename(Path("elsewhere/deep") / name)
    rebuilt(Path("elsewhere/deep/first/run.json"))


def test_folders_that_were_moved_and_renamed_are_known_by_their_bytes(lock: Path) -> None:
    Path("elsewhere").mkdir()
    Path("one").rename("elsewhere/uno")
    Path("two").rename("elsewhere/due")
    told = refused(3, "merge", "--locked", str(lock), "-o", "again")
    assert f"{Path.cwd().name}/one@" in told
    assert "was a folder, which is missing now" in told
    assert f"lora merge --locked {lock} FOLDER..." in told
    rebuilt(lock, "elsewhere/due", "elsewhere/uno")


def test_byte_identical_parents_are_found_again_too(own_home: Path) -> None:
    write_adapter(own_home / "twin", random_factors(SHAPES, 2, seed=1), lora_alpha=4)
    ok("merge", "one=1", "two=2", "twin=3", "-m", "linear", "-o", "first")
    rebuilt(Path("first/run.json"))
    for name in ("one", "two", "twin"):
        Path(name).rename(f"moved-{name}")
    shutil.rmtree("again")
    rebuilt(Path("first/run.json"), "moved-twin", "moved-one", "moved-two")


def places(run: str) -> list[str | None]:
    """Where the record of a merge says that its parents are."""
    parents = json.loads(Path(run).read_text())["merge.lock"]["parents"]
    return [parent.get("path") for _, parent in sorted(parents.items())]


def test_a_record_holds_no_path_that_leads_far_or_through_the_home(own_home: Path, monkeypatch: Any) -> None:
    ok("merge", *TWO, "-o", "runs/of/may/near")
    ok("merge", *TWO, "-o", "runs/of/may/the/far")
    ok("merge", *TWO, "-o", "/".join(["..", own_home.name, "here"]))
    assert places("runs/of/may/near/run.json") == [None, None]
    assert places("runs/of/may/the/far/run.json") == [None, None]
    assert places("here/run.json") == ["../one", "../two"]
    for home in (own_home, own_home.parent):
        monkeypatch.setenv("HOME", str(home))
        ok("merge", *TWO, "-o", f"below-{home.name}")
        assert places(f"below-{home.name}/run.json") == ([None, None] if home == own_home else ["../one", "../two"])
    told = refused(3, "merge", "--locked", "runs/of/may/near/run.json", "-o", "again")
    assert "name all parents" in told


def test_a_folder_with_other_weights_is_not_taken_for_a_parent(lock: Path) -> None:
    shutil.rmtree("two")
    write_adapter(Path("two"), random_factors(SHAPES, 3, seed=9))
    told = refused(5, "merge", "--locked", str(lock), "-o", "again")
    assert f"not the adapter that was merged: {Path.cwd().name}/two@" in told


NOWHERE = [
    "{here}/one", "../link", "../through/one", "~/one", "../../../../../../../one", "../one/../../../../../../etc",
    "../absent", "../one\0", "../" + "x" * 5000, 5, None, [], {}, True,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "code"),
    [("../one", 0), ("../../{name}/one/../one", 0), *((path, 3) for path in NOWHERE), (".", 5), ("../\ud800", 1)],
)
def test_a_path_that_somebody_wrote_leads_nowhere_else(lock: Path, path: Any, code: int, own_home: Path) -> None:
    Path("link").symlink_to("one")
    Path("through").symlink_to(".")
    record = json.loads(lock.read_text())
    name = next(name for name in record["merge.lock"]["parents"] if "/one@" in name)
    text = path.replace("{here}", str(own_home)).replace("{name}", own_home.name) if isinstance(path, str) else path
    record["merge.lock"]["parents"][name]["path"] = text
    lock.write_text(json.dumps(record))
    told = lora("merge", "--locked", str(lock), "-o", "again")
    assert (told.code, Path("again").exists()) == (code, code == 0), told
    assert ("was a folder, which is missing now" in told.err) == (code == 3)


def test_a_parent_of_the_hub_is_no_folder_here(lock: Path, own_home: Path) -> None:
    record = json.loads(lock.read_text().replace(f"{own_home.name}/one@", f"{own_home}/one@"))
    name = next(name for name in record["merge.lock"]["parents"] if "/one@" in name)
    record["merge.lock"]["parents"][name]["source"] = "hub"
    Path(name).mkdir()
    lock.write_text(json.dumps(record))
    assert "is a parent from the Hub, but a local folder has the same name" in refused(
        5, "merge", "--locked", str(lock), "-o", "again"
    )


def test_what_differs_from_a_lock_is_told(lock: Path) -> None:
    assert "leave out --rank" in refused(2, "merge", *TWO, "--locked", str(lock), "--rank", "2")
    assert "leave out --method" in refused(2, "merge", *TWO, "--locked", str(lock), "--method", "ties")
    assert "missing or changed since the locked merge" in refused(
        5, "merge", "one", "--locked", str(lock), "-o", "again"
    )
    record = json.loads(lock.read_text())
    record["merge.lock"]["versions"]["torch"] = "1.0"
    record["outputs"]["adapter_model.safetensors"] = "0" * 64
    Path("other.json").write_text(json.dumps(record))
    told = refused(5, "merge", *TWO, "--locked", "other.json", "-o", "again")
    assert "adapter_model.safetensors differs from the locked merge (sha256)" in told
    assert "torch 1.0 then" in told
    assert "rounds in another way" not in told
    assert not Path("again").exists()
    del record["merge.lock"]["arithmetic"]  # as every earlier version
    Path("other.json").write_text(json.dumps(record))
    assert "the version that made it rounds in another way" in refused(
        5, "merge", *TWO, "--locked", "other.json", "-o", "again"
    )
    write_adapter(Path("three"), random_factors(SHAPES, 3, seed=9))
    assert "missing or changed since the locked merge" in refused(
        5, "merge", "one", "three", "--locked", str(lock), "-o", "again"
    )


MERGES = """
import json, sys
from tests.cli import ok
adapters = json.loads(sys.argv[1])
for method, *options in (["dare-ties", "--seed", "3"], ["norm-matched"], ["tsv"]):
    ok("merge", *adapters, "-m", method, *options, "-o", f"{method}-{sys.argv[2]}")
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_hash_seeds_order_and_threads(own_home: Path) -> None:
    # More than one block of rows, and more modules than threads.
    shapes = {f"model.layers.{i}.mlp.up_proj": (640, 512) for i in range(6)}
    for seed in range(3):
        write_adapter(own_home / f"{seed}", random_factors(shapes, 3 + seed, seed=seed))
    names = ["0", "1", "2"]
    for seed, threads, adapters in (("1", "1", names), ("2", "2", names[::-1]), ("3", "4", names)):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", MERGES, json.dumps(adapters), seed]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    for method in ("dare-ties", "norm-matched", "tsv"):
        assert len({(Path(f"{method}-{seed}") / "adapter_model.safetensors").read_bytes() for seed in "123"}) == 1


HOSTILE: list[Any] = [None, 5, -1.0, True, "x", "../x", [], [[]], {}, {"x": []}, {"seed": "x"}, 10**400, float("nan")]


@pytest.mark.slow
def test_a_lock_that_somebody_wrote(lock: Path) -> None:
    record = json.loads(lock.read_text())
    settings, parents = record["settings"], record["merge.lock"]["parents"]
    changed = [{**record, "settings": {**settings, k: v}} for k in settings for v in HOSTILE if settings[k] != v]
    changed += [{**record, "settings": {**settings, "other": v}} for v in HOSTILE]
    changed += [{**record, "merge.lock": {**record["merge.lock"], "parents": v}} for v in HOSTILE if parents != v]
    for one in changed:
        Path("other.json").write_text(json.dumps(one))
        told = lora("merge", *TWO, "--locked", "other.json", "-o", "again")
        assert told.code in {1, 2, 3, 5}, one
        assert len(told.err.splitlines()) <= 2
        assert not Path("again").exists()


def test_a_lock_of_an_earlier_version_gives_the_same_weights(lock: Path) -> None:
    ok("merge", *TWO, "-m", "linear", "--compact", "-o", "before")
    record = json.loads(Path("before/run.json").read_text())
    for name in ("compact", "saved_modules"):
        del record["settings"][name]
    record["settings"]["for"] = ""
    record["outputs"]["adapter_config.json"] = "0" * 64
    Path("earlier.json").write_text(json.dumps(record))
    told = ok("merge", *TWO, "--locked", "earlier.json", "-o", "again")
    assert "earlier.json is of an earlier version: weights are rebuilt byte for byte" in told.err
    name = "adapter_model.safetensors"
    assert Path("again", name).read_bytes() == Path("before", name).read_bytes()
    record["outputs"][name] = "0" * 64
    Path("earlier.json").write_text(json.dumps(record))
    assert f"{name} differs from the locked merge" in refused(
        5, "merge", *TWO, "--locked", "earlier.json", "-o", "other", "--force"
    )


def test_a_lock_without_outputs_proves_nothing(lock: Path) -> None:
    Path("other.json").write_text(json.dumps({**json.loads(lock.read_text()), "outputs": {}}))
    assert "not the run.json of a merge" in refused(1, "merge", *TWO, "--locked", "other.json", "-o", "again")


def test_a_lock_from_a_device_that_is_not_here(lock: Path) -> None:
    Path("other.json").write_text(lock.read_text().replace('"cpu"', '"cuda:99"'))
    assert "only the same kind of device" in refused(5, "merge", *TWO, "--locked", "other.json", "-o", "again")


def test_weights_beside_a_file_that_has_them(lock: Path) -> None:
    assert "=WEIGHT cannot be used with a file" in refused(
        2, "merge", "one=1", "two=2", "--locked", str(lock), "-o", "again"
    )
    Path("c.json").write_text(coefficients_text(coefficients()))
    assert "=WEIGHT cannot be used with a file" in refused(
        2, "merge", "one=1", "two=2", "--coef", "c.json", "-o", "again"
    )


def test_an_id_with_an_equals_sign_is_found_again(own_home: Path) -> None:
    os.environ["LORA_BASE"] = "acme/tiny"
    Path("one").rename("lr=1e-4")
    ok("pool", "sync", "--from", str(own_home))
    ok("merge", f"{own_home.name}/lr=1e-4=1", f"{own_home.name}/two=1", "-o", "first")
    ok("merge", "--locked", "first/run.json", "-o", "again")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"merge.lock": 3}', "\x00", "[" * 100_000, '{"a":' * 100_000])
def test_a_lock_that_is_none(text: str) -> None:
    Path("lock.json").write_text(text)
    assert "not the run.json of a merge" in refused(1, "merge", *TWO, "--locked", "lock.json")
    assert "No such file" in refused(1, "merge", *TWO, "--locked", "absent.json")


def test_a_disk_that_fills_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    add = writer.TensorStream.add

    def full(self: writer.TensorStream, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(writer.TensorStream, "add", full)
    assert "no space left on the disk" in refused(1, "merge", *TWO, "-o", "out")
    assert [p.name for p in Path().iterdir() if "out" in p.name] == []
    monkeypatch.undo()


@pytest.mark.slow
def test_a_disk_that_is_really_full(own_home: Path) -> None:
    """On a file system of one megabyte, in a namespace of its own, where this machine allows that."""
    write_adapter(own_home / "big", random_factors({"model.layers.0.mlp.up_proj": (3000, 2000)}, 64, seed=3))
    script = (
        "mkdir small && mount -t tmpfs -o size=1m none small && "
        f"{{ {sys.executable} -m lora_cli merge big -o small/out; code=$?; ls -A small; exit $code; }}"
    )
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespaces here")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no space left on the disk" in done.stderr
