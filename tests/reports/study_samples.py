"""Reports of studies that nobody ran, from values that are given: for pages and verdicts."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from lora_cli.reports.study_facts import Change, Changes, Control, Gain, Learnt, Role, Row, StudyReport, Used
from lora_cli.scores import holm, interval, paired_differences
from lora_cli.steps.study.verdict import verdict

Key = tuple[str, str]
VALUES: dict[Key, list[float]] = {
    ("base", ""): [0.0] * 34 + [1.0] * 6,
    ("target", ""): [0.0] * 16 + [1.0] * 24,
    ("average", "relevant"): [0.0] * 30 + [1.0] * 10,
    ("adaptive", "relevant"): [0.0] * 12 + [1.0] * 28,
    ("adaptive", "random"): [0.0] * 14 + [1.0] * 26,
    ("adaptive", "noise"): [0.0] * 15 + [1.0] * 25,
}
"""Right and wrong answers by (system, pool): recycling beats the base, and nothing else."""


def rows_of(values: Mapping[Key, Sequence[float]], *, better: str = "higher", seeds: int = 3) -> list[Row]:
    """The rows of a study whose systems have these values of the same examples."""
    sign = -1 if better == "lower" else 1
    gains: dict[Key, dict[Control, Gain]] = {key: {} for key in values}
    for control in ("base", "target", "noise"):
        family = {}
        for key in values:
            other = (key[0], "noise") if control == "noise" else (control, "")
            if other in values and other != key and (control != "noise" or key[1]):
                family[key] = tuple(sign * (a - b) for a, b in zip(values[key], values[other], strict=True))
        if family:
            found = paired_differences([*family.values()], [0.0] * len(next(iter(family.values()))))
            for (key, pairs), one, p in zip(family.items(), found, holm([one.p for one in found]), strict=True):
                gains[key][control] = Gain(pairs=pairs, found=one, p_holm=p)  # type: ignore[index]
    rows = []
    for key, ours in values.items():
        low, high = interval("mean", ours)
        role: Role = "noise" if key[1] == "noise" else key[0] if key[0] in ("base", "target") else "recycled"  # type: ignore[assignment]
        drawn = role != "base"
        rows.append(
            Row(
                system=key[0], pool=key[1], role=role, value=fmean(ours), low=low, high=high, n=len(ours), drawn=drawn,
                by_seed=(fmean(ours),) * (seeds if drawn else 1), gains=gains[key], seconds=7.0 * (len(rows) + 1) ** 2,
                tokens=100.0 * len(rows),
            )
        )  # fmt: skip
    return rows


def sample(
    text: str = "", *, adapters: int = 4, modules: int = 6, values: Mapping[Key, Sequence[float]] = VALUES
) -> StudyReport:
    """A report with a stranger's text wherever one may stand."""
    rows = rows_of(values)
    changes = [
        Change(
            id=f"{text or 'example'}-{i}", prompt=f"What is {i} + {i}?\n{text}", expected=f"{2 * i}{text}",
            base=f"{i}{text}", system=f"{2 * i}{text}", base_value=0.0, system_value=1.0,
        )
        for i in range(3)
    ]  # fmt: skip
    names = [f"{text or 'ann'}/lora-{i}@{i:040x}" for i in range(adapters)]
    places = [f"model.layers.{j // 2}.self_attn.{'qv'[j % 2]}_proj{text}" for j in range(modules)]
    grid = tuple(tuple(((i * 7 + j * 3) % 11 - 4) / 10 for j in range(modules)) for i in range(adapters))
    return StudyReport(
        metric="exact", meaning="Share of exact matches.", better="higher", n=rows[0].n,
        about={"Base": f"acme/base{text}@0123", "Versions": f"torch 2.13.0{text}", "Test data (sha256)": "ab" * 32},
        planned=len(rows) + 2, rows=tuple(rows), verdict=verdict(rows, better="higher"),
        changes=Changes(
            name=f"adaptive (relevant){text}", cell=f"adaptive-relevant-s0{text}", gained=22, lost=1, same=17,
            gains=tuple(changes), losses=tuple(changes[:1]),
        ),
        learnt=(
            Learnt(cell=f"adaptive-relevant-s0{text}", adapters=tuple(names), modules=tuple(places), values=grid,
                   by_rank=False),
        ),
        adapters=tuple(Used(pinned=name, licence=text or "mit", sha256="ef" * 32, cells=("cell-a", f"cell{text}"))
                       for name in names),
        failed={f"ties-random-s0{text}": f"out of memory {text}"}, missing=(f"ties-random-s1{text}",),
    )  # fmt: skip
