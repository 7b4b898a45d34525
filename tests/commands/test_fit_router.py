"""`lora fit --preset arrow|spectr` as a user types it: the folder, its evaluation, PEFT, reruns and refusals."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_cli
from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import UsageError
from lora_cli.models.ref import pin
from lora_cli.steps.evaluate.systems import opened_systems
from lora_cli.steps.opened_pool import Pool
from lora_cli.world import World
from tests.cli import ok, refused
from tests.commands.test_fit_commands import here, record
from tests.paths import ROOT

__all__ = ["here"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
TWO = ("pool/kestrel/outer", "pool/mossy/double")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bare(here: World) -> World:
    """The same without a task in the settings."""
    settings = Path("lora.toml")
    settings.write_text(re.sub(r"(?m)^data = .*\n", "", settings.read_text()))
    return here


def router(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "router.json").read_text())
    return found


def test_a_router_needs_no_data_and_is_made_once(bare: World) -> None:
    told = ok("fit", "--preset", "arrow", *TWO, "--top-k", "1", "-o", "routed")
    assert told.out.strip() == "routed"
    assert "router of 2 adapters in 14 modules by arrow; no single LoRA equals it" in told.err
    assert "lora eval and PEFT's Arrow run it" in told.err
    found = router("routed")
    assert found["knobs"] == {"temperature": 1.0, "top_k": 1}
    assert found["peft"] == {"router_temperature": 1.0, "top_k": 1}
    assert {one["adapter"].partition("@")[0] for one in found["adapters"]} == set(TWO)
    folders = [one["folder"] for one in found["adapters"]]
    assert sorted(file.name for file in Path("routed").iterdir()) == sorted(
        [*folders, "README.md", "router.json", "run.json"]
    )
    made = record("routed")
    assert set(made["outputs"]) == {"router.json"} | {
        f"{one}/{name}" for one in folders for name in ("adapter_config.json", WEIGHTS)
    }
    assert (made["command"], made["settings"]["preset"], made["settings"]["top_k"]) == ("fit", "arrow", 1)
    assert "loss" not in made["results"]
    # Adapters of rank 8 and 4: PEFT wants one rank.
    ranks = {json.loads(Path("routed", one, "adapter_config.json").read_text())["r"] for one in folders}
    assert ranks == {8}
    assert "up to date" in ok("fit", "--preset", "arrow", *TWO[::-1], "--top-k", "1", "-o", "routed").err
    assert "routed exists" in refused(1, "fit", "--preset", "arrow", *TWO, "-o", "routed")


def test_an_adapter_that_was_changed_since_is_not_used(bare: World) -> None:
    ok("fit", "--preset", "arrow", *TWO, "-o", "routed")
    own = router("routed")["adapters"][0]["folder"]
    weights = Path("routed", own, WEIGHTS)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    changed = refused(1, "fit", "--preset", "arrow", *TWO, "-o", "routed")
    assert f"{own}/{WEIGHTS} has changed" in changed
    assert f"the weights of {own} have changed since they were written" in refused(5, "eval", "routed")
    ok("fit", "--preset", "arrow", *TWO, "-o", "routed", "--force")
    shutil.rmtree(Path("routed", own))
    assert own in refused(3, "eval", "routed")


def test_answers_are_not_those_of_a_router_before_it_was_changed(here: World) -> None:
    def likelihood() -> float:
        rows = json.loads(ok("eval", "routed", "--metric", "nll", "-o", "rows.jsonl", "--json").out)["rows"]
        return float(rows[1]["log_likelihood"])

    ok("fit", "--preset", "arrow", *TWO, "-o", "routed")
    found = [likelihood()]
    config = Path("routed", router("routed")["adapters"][0]["folder"], "adapter_config.json")
    written = config.read_text()
    settings = json.loads(written)
    config.write_text(json.dumps({**settings, "lora_alpha": 3 * settings["lora_alpha"]}))
    found.append(likelihood())
    config.write_text(written)
    edited = router("routed")
    Path("routed/router.json").write_text(json.dumps({**edited, "knobs": {**edited["knobs"], "top_k": 1}}))
    found.append(likelihood())
    Path("routed/router.json").write_text(json.dumps(edited))
    assert len({round(one, 6) for one in found}) == 3
    assert likelihood() == pytest.approx(found[0], abs=1e-9)


def test_eval_applies_routers_beside_other_systems(here: World) -> None:
    ok("fit", "--preset", "arrow", *TWO, "-o", "routed")
    ok("fit", "--preset", "spectr", "pool/kestrel/outer", "-o", "alone")
    told = ok("eval", "routed", "alone", "pool/kestrel/outer", "--json")
    scores = {row["system"]: row for row in json.loads(told.out)["rows"]}
    assert list(scores) == ["base", "routed", "alone", "pool/kestrel/outer"]
    # A router over one adapter is that adapter: the same answers and likelihoods.
    assert scores["alone"]["value"] == scores["pool/kestrel/outer"]["value"]
    assert scores["alone"]["log_likelihood"] == pytest.approx(scores["pool/kestrel/outer"]["log_likelihood"], rel=1e-4)
    assert scores["routed"]["changed"] > 0
    assert "trained_on" not in scores["routed"]["details"]
    again = ok("eval", "routed", "alone", "pool/kestrel/outer", "--json")
    assert json.loads(again.out)["rows"] == json.loads(told.out)["rows"]
    # What fit wrote last is evaluated if nothing is named.
    assert "alone" in ok("eval", "--metric", "nll").err
    shutil.copytree("routed", "moved")
    moved = json.loads(ok("eval", "moved", "--json").out)["rows"][1]
    assert (moved["value"], moved["log_likelihood"]) == (scores["routed"]["value"], scores["routed"]["log_likelihood"])


def test_with_a_task_the_loss_is_measured_beside_the_base_and_noise(here: World) -> None:
    told = ok("fit", "--preset", "spectr", *TWO, "--temperature", "2", "--control", "random,base", "-o", "routed")
    found = record("routed")["results"]
    assert found["n_validation"] == 20
    assert [one["against"] for one in found["comparisons"]] == ["base", "random"]
    assert found["loss"] != found["comparisons"][0]["loss"]
    assert f"→ {found['loss']:.3f}" in told.err
    assert "the random-LoRA control" in told.err
    assert router("routed")["peft"] is None
    assert "PEFT has no such router" in told.err
    settings = record("routed")["settings"]
    assert (settings["measured_on"], settings["temperature"]) == ("task.jsonl", 2.0)
    # Nothing was learnt from the task, so no example of it flatters the router.
    assert "trained on" not in ok("eval", "routed", "--data", "task.jsonl", "--metric", "nll").err
    assert runs.latest_output(Path("lora.db"), ["fit"], "adapter_config.json") is None


def test_the_validation_part_is_that_of_the_last_fit_that_learnt(here: World) -> None:
    settings = Path("lora.toml")
    settings.write_text(re.sub(r"(?m)^test = .*\n", "", settings.read_text()))
    ok("fit", "--preset", "arrow", *TWO, "-o", "routed")
    assert "no test data" in refused(2, "eval", "routed")
    ok("fit", *TWO, "--steps", "2", "-o", "fitted")
    ok("fit", "--preset", "spectr", *TWO, "-o", "other")
    assert "the validation part of the last fit" in ok("eval", "routed", "--metric", "nll").err


def test_the_example_of_the_page_loads_the_same_router_in_peft(bare: World) -> None:
    page = (ROOT / "docs" / "fitting.md").read_text(encoding="utf-8")
    section = page.partition("## Routers\n")[2].partition("\n## ")[0]
    [shell, *_] = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    for line in shell.splitlines():
        ok(*line.split()[1:])
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "fitting.md", "exec"), names)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = names["model"].eval()(input_ids=ids).logits
    base = pin("base", device="cpu").load()
    with Catalogue(Path("lora.db")) as catalogue:
        pool = Pool(catalogue=catalogue, base="base", aliases=[bare.base_name], announce=lambda text: None)
        [system] = opened_systems(pool, ["router"]).systems
    with system.applied(base), torch.no_grad():
        ours = base.model(input_ids=ids).logits
    plain = base.model(input_ids=ids).logits
    # PEFT's 15 power iterations stop a little short of the strongest direction.
    assert (theirs - ours).norm() < 0.05 * (plain - ours).norm()


def test_what_a_router_cannot_be_is_said_in_one_line(here: World) -> None:
    ok("fit", "--preset", "arrow", "pool/kestrel/outer", "pool/tarn/mirror", "-o", "routed")
    found = router("routed")
    assert found["peft"] is None
    assert found["why_not"].startswith("PEFT needs the same modules in all adapters, and pool/tarn/mirror")
    for words in (("merge", "routed", TWO[0]), ("bake", "routed"), ("diff", "routed", TWO[0]), ("fit", "routed")):
        assert "routed is a router, which no single LoRA equals" in refused(5, *words)
    for options, told in {
        ("--steps", "5"): "takes no --steps: it learns nothing",
        ("--rank", "4"): "takes no --rank: it makes a router",
        ("--target", "pool/tarn/mirror"): "takes no --target",
        ("--seeds", "2"): "takes no --seeds",
        ("--time-limit", "2"): "takes no --time-limit",
        ("--grad-checkpointing",): "takes no --grad-checkpointing",
        ("--control", "target"): "takes no --control target",
        ("--control", "nothing"): "unknown control 'nothing'",
        ("--plot", "fit.svg"): "takes no --plot",
        ("--granularity", "layer"): "arrow takes no --granularity",
        ("--temperature", "0"): "--temperature 0.0 is out of range",
        ("--top-k", "-1"): "--top-k -1 is out of range",
    }.items():
        assert told in refused(2, "fit", "--preset", "arrow", *TWO, *options)
    assert "adaptive takes no --top-k" in refused(2, "fit", *TWO, "--top-k", "1")


def test_python_makes_the_same_router_as_the_command(here: World) -> None:
    with lora_cli.open_pool() as pool:
        folder = pool.fit(None, TWO, preset="arrow", top_k=1, out="routed")
        [base, routed] = pool.evaluate("task.jsonl", [str(folder)], metric="nll")
        assert (base.system, routed.details["moved"]) == ("base", 100)
        with pytest.raises(UsageError, match="adaptive learns from data"):
            pool.fit(None, TWO)
    assert "loss" not in record(folder)["results"]


def test_a_router_is_not_written_over_its_own_adapters(bare: World) -> None:
    ok("fit", "--preset", "arrow", *TWO, "-o", "routed")
    own = f"routed/{router('routed')['adapters'][0]['folder']}"
    assert "holds one of the adapters" in refused(1, "fit", "--preset", "spectr", own, "-o", "routed", "--force")
    assert Path(own, WEIGHTS).is_file()
    shutil.copytree("pool/mossy/double", "still")
    factors = load_file(Path("still", WEIGHTS))
    save_file({name: 0 * one if "lora_B" in name else one for name, one in factors.items()}, Path("still", WEIGHTS))
    told = refused(5, "fit", "--preset", "arrow", TWO[0], "still", "-o", "other")
    assert "still: no effect, because lora_B or lora_alpha is zero" in told
    assert not list(Path().glob("*other*"))


def test_a_control_or_a_prompt_needs_a_task(bare: World) -> None:
    assert "--control compares by examples" in refused(2, "fit", "--preset", "arrow", *TWO, "--control", "random")
    assert "options about prompts need examples" in refused(2, "fit", "--preset", "arrow", *TWO, "--system", "x")
    assert "no task file" in refused(2, "fit", *TWO)


def test_a_dry_run_changes_nothing(here: World) -> None:
    plan = json.loads(ok("fit", "--preset", "arrow", *TWO, "--dry-run", "--json").out)
    assert (plan["preset"], plan["adapters"], plan["top_k"]) == ("arrow", 2, 0)
    assert not Path(plan["out"]).exists()
    done = json.loads(ok("fit", "--preset", "arrow", *TWO, "--json").out)
    assert (done["out"], done["settings"]["preset"]) == (plan["out"], "arrow")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "lora.router/2"}, {"preset": "adaptive"}, {"preset": []}, {"knobs": {"temperature": -1}},
        {"knobs": {"more": 1}}, {"adapters": []}, {"adapters": 5}, {"more": 1}, {"knobs": None},
        {"adapters": [{"folder": "../pool/kestrel/outer", "adapter": "x@1", "sha256": "0"}]},
        {"adapters": [{"folder": "0-double"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_router_is_refused_in_one_line(here: World, change: dict[str, Any]) -> None:
    ok("fit", "--preset", "arrow", "pool/kestrel/outer", "-o", "routed")
    Path("routed/router.json").write_text(json.dumps({**router("routed"), **change}))
    assert "routed/router.json: no router" in refused(1, "eval", "routed")
