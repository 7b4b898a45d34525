"""Kinds of adapters × commands: one verdict, and where it is "ok" one model, whoever applies the adapter."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from lora_cli.formats.reader import open_adapter
from lora_cli.models.ref import pin
from tests.architectures import SPECS, files, model
from tests.cli import Told, lora
from tests.matrix import KINDS, TEXT_BASES, Kind, mate
from tests.tiny_bases import characters

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = [{"id": str(i), "prompt": f"after {letter}", "completion": "x"} for i, letter in enumerate("abcdefghij")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of every architecture in the table, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    for base in {kind.base for kind in KINDS}:
        model(base).save_pretrained(folder / base / "base")
        characters().save_pretrained(folder / base / "base")
    return folder


def verdicts(kind: Kind, base: str) -> dict[str, Told]:
    """What each command says of the adapter in pool/one, beside a plain one in pool/mate."""
    one, plain = "pool/one", "pool/mate"
    task = ["--data", "task.jsonl", "--base", base]
    told = {
        "sync": lora("pool", "sync", base, "--from", "pool"),
        "verify": lora("pool", "verify", one, "--base", base, "--deep"),
        "merge": lora("merge", one, "--base", base, "-m", "linear", "-o", "merged"),
        "diff": lora("diff", one, plain, "--base", base),
        "bake": lora("bake", one, "--base", base, "-o", "baked"),
    }
    if kind.base in TEXT_BASES:
        told["fit"] = lora("fit", one, plain, *task, "--steps", "4", "--lr", "0.02", "-o", "fitted")
        told["eval"] = lora("eval", one, *task, "--metric", "nll", "-o", "rows.jsonl")
    rows = [json.loads(line) for line in lora("pool", "list", "--jsonl").out.splitlines()]
    row = next(row for row in rows if row["id"].endswith("one"))
    told["sync"] = Told(0 if row["status"] == "ok" else 5, "", row["reason"])
    return told


def logits(net: Any, kind: Kind) -> Tensor:
    """What a model makes of some input of its own sort."""
    torch.manual_seed(3)
    ids = torch.randint(8, 100, (2, 9))
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind.base == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids}
    elif kind.base == "t5":
        inputs["decoder_input_ids"] = ids
    elif kind.base == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 28, 28)}
    with torch.no_grad():
        found: Tensor = net.eval()(**inputs).logits
    return found


def loaded(folder: str | Path, kind: Kind) -> Any:
    return getattr(transformers, SPECS[kind.base][0]).from_pretrained(str(folder))


def by_peft(base: str, adapter: str, kind: Kind) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(loaded(base, kind), adapter), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.base}: {kind.title}")
def test_every_command_gives_one_verdict(kind: Kind, bases: Path) -> None:
    base = str(bases / kind.base / "base")
    kind.make(Path("pool/one"), kind.base)
    mate(Path("pool/mate"), kind.base)
    Path("task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in TASK))
    told = verdicts(kind, base)
    wanted = dict.fromkeys(told, kind.refused) | kind.but
    for name, one in told.items():
        assert (one.code, wanted[name] in one.err) == (5 if wanted[name] else 0, True), (name, one)
    if kind.refused:
        return
    before = logits(loaded(base, kind), kind)
    ours = {"merge": by_peft(base, "merged", kind)}
    if "bake" not in kind.but:
        ours["bake"] = logits(loaded("baked", kind), kind)
    if kind.base in TEXT_BASES:
        pinned = pin(base, device="cpu").load()
        adapter = open_adapter(files(Path("pool/one")), pinned.skeleton)
        with pinned.applied({name: adapter.read(name) for name in adapter.modules}):
            ours["eval"] = logits(pinned.model, kind)
    if not kind.repaired:
        ours["PEFT"] = by_peft(base, "pool/one", kind)
    expected = ours["merge"]
    assert (expected - before).abs().max() > 1e-3
    for name, found in ours.items():
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_table_names_the_bases_that_continue_a_text() -> None:
    writers = {kind.base for kind in KINDS if getattr(transformers, SPECS[kind.base][0]).can_generate()} - {
        "whisper",
        "t5",
    }
    assert writers == TEXT_BASES & {kind.base for kind in KINDS}
