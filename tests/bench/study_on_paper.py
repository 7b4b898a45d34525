"""The paper's grid on paper: what 62 tasks by 960 adapters by 12 systems take on Llama-3.1-8B, from counted work."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lora_cli.steps.estimate import FP32, Outline, of_merge
from lora_cli.steps.speed import rates_of
from lora_cli.steps.study.plan import Cell, Need, Study

TASKS, ADAPTERS, LEARNT, TESTED = 62, 960, 100, 300
TOKENS, WRITTEN, K, RANK = 200, 30, 30, 16
"""Tokens of an example, those that an answer writes, adapters of a pool, and the rank of each."""
EVERY_MODULE = {
    f"layers.{layer}.{name}": shape
    for layer in range(32)
    for name, shape in {
        "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
        "up": (14336, 4096), "down": (4096, 14336),
    }.items()
}  # fmt: skip
HEAD = 128_256 * 4096
PER_TOKEN = sum(out * into for out, into in EVERY_MODULE.values()) + HEAD
"""Multiplications of a forward pass."""
PER_RANK = sum(out + into for out, into in EVERY_MODULE.values())
GPU = 2e14
"""Multiplications a second: 40 % of the 4.9e14 that an H100's data sheet states for dense bf16."""
PER_ANSWER = 150
"""Bytes of an answer in a result."""


class Amount(NamedTuple):
    """Some work: multiplications by the base, seconds of merging on one core, and bytes that stay."""

    products: float = 0.0
    merging: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Amount") -> "Amount":
        """Both."""
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


def answers(examples: int) -> Amount:
    """Answers to examples, with their bytes in a result and in rows.jsonl."""
    return Amount(examples * (TOKENS + WRITTEN) * PER_TOKEN, 0.0, 2 * PER_ANSWER * examples)


def learnt(steps: int, batch: int, numbers: float) -> Amount:
    """Steps of a training through the frozen base, of `numbers` beside it, with its validation every ten steps."""
    judged = (steps / 10 + 2) * 0.2 * LEARNT * TOKENS
    return Amount(steps * batch * TOKENS * (2 * PER_TOKEN + 3 * numbers) + judged * (PER_TOKEN + numbers))


def of_cell(study: Study, cell: Cell) -> Amount:
    """A cell without what it needs."""
    way, pooled = study.systems[cell.system], K + study.systems[cell.system].target
    scored = answers(TESTED)
    if way.kind == "merge":
        outline = Outline(
            bytes=PER_RANK * RANK * 2, width=2.0, modules={name: (*shape, RANK) for name, shape in EVERY_MODULE.items()}
        )
        found = of_merge([outline] * pooled, way.merge)
        return scored.plus(Amount(0.0, found.seconds, found.written_bytes))
    if way.kind == "fit" and way.options["shape"]["preset"] == "lorahub":
        return scored.plus(Amount(40 * LEARNT * TOKENS * (PER_TOKEN + pooled * RANK * PER_RANK), 0.0, 1e5))
    if way.kind == "fit":
        return scored.plus(learnt(100, 8, pooled * RANK * PER_RANK)).plus(Amount(bytes=pooled * len(EVERY_MODULE) * 20))
    return scored


def of_need(study: Study, need: Need) -> Amount:
    """Shared work: a LoRA trained on the data, or the selection of a pool."""
    if need.kind == "target":
        return learnt(400, 8, 64 * PER_RANK).plus(Amount(bytes=64 * PER_RANK * FP32))
    if study.pools[need.pool].kind != "trials":
        return Amount(bytes=4000)
    one = answers(LEARNT)
    return Amount(ADAPTERS * one.products, 0.0, 4000)


def print_on_paper(study: Study) -> None:
    """The counts of the whole grid, and its hours: by a GPU's stated speed, and by what this machine shows."""
    cells: Sequence[Cell] = study.cells()
    needs = [*study.needs(cells).values()]
    amounts = Counter[str]()
    total = Amount()
    for name, one in [
        *((study.systems[cell.system].kind, of_cell(study, cell)) for cell in cells),
        *((need.kind, of_need(study, need)) for need in needs),
    ]:
        total = total.plus(one)
        amounts[name] += round(one.products)
    print(f"{TASKS} tasks: {TASKS * len(cells):,} cells and {TASKS * len(needs):,} pieces of shared work")
    print(f"{TASKS * ADAPTERS:,} adapters judged: {TASKS * ADAPTERS * LEARNT:,} answers")
    print(f"multiplications by the base: {TASKS * total.products:.3g}")
    for name, count in amounts.most_common():
        print(f"  {name}: {100 * count / total.products:.1f} %")
    rates = rates_of("cpu", "fp32", 1)
    print(f"GPU-hours at {GPU:.0e} multiplications/s: {TASKS * total.products / GPU / 3600:,.0f}")
    hours = TASKS * total.products / rates.products / 3600
    print(f"core-hours here, at the calibrated {rates.products:.2g}/s: {hours:,.0f}")
    print(f"core-hours of merging here: {TASKS * total.merging / 3600:,.0f}")
    print(f"bytes that stay: {TASKS * total.bytes / 1e12:.2f} TB")
    sys.stdout.flush()
