"""Every adapter that is converted, exported for every program: the same update by the program's rule, or refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli import ok, refused
from tests.exports.product import DECODER, TAKEN, outcome
from tests.exports.table import EXACT, ROUNDED, TARGETS
from tests.imports.kinds import Sample
from tests.imports.test_imports import asked, base_of, dense, written
from tests.readers import OF_EXPORTS

_FOLDERS = ("vllm", "sglang", "peft")
"""Programs of PEFT's folders and of its scale; `dense` reads their convolutions and embeddings too."""


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize("sample", [pytest.param(one, id=one.title) for one in TAKEN])
def test_a_converted_adapter_is_exported_as_the_table_says(sample: Sample, tmp_path: Path) -> None:
    source, updates = written(sample, tmp_path / "theirs")
    decoder = all(module.startswith("model.") for module in updates)
    base = Path("acme/tiny")
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(DECODER))
    named = str(base) if decoder else "acme/another"
    ok("convert", str(source), "-o", "lora", "--base", base_of(tmp_path) if sample.best else named, *asked(sample))
    for target in TARGETS:
        wanted, out = outcome(sample, target), Path(f"for-{target}")
        if wanted not in (EXACT, ROUNDED):
            said = refused(5, "export", target, "lora", "-o", str(out))
            assert wanted in said, target
            assert not out.exists()
            continue
        ok("export", target, "lora", "-o", str(out))
        found = dense(out) if target in _FOLDERS else OF_EXPORTS[target](out, [*updates])
        for module, update in updates.items():
            error = torch.linalg.norm(found.pop(module) - update.flatten(1)) / torch.linalg.norm(update)
            assert error <= (1e-15 if wanted == EXACT else 1e-6), (target, module)
        assert not any(map(torch.any, found.values())), target
