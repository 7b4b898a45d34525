"""Writes the generated pages of docs/ (see `generated`) and completions/: python -m tests.generate [--check]."""

import io
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from lora_cli.app import app
from lora_cli.commands.completion import SHELLS, completion_script
from lora_cli.commands.methods import CLASSES, DEFAULTS, METHODS, allowed, blocks, by_class, class_of, flag, inside
from lora_cli.methods import Knob, Method
from lora_cli.metrics import METRICS
from lora_cli.recipes import FIT_METHODS
from tests.architectures import SPECS
from tests.exports import product
from tests.exports.table import TARGETS, rows
from tests.imports.kinds import SAMPLES
from tests.matrix import KINDS, TEXT_BASES, Kind
from tests.paths import ROOT

FILES = {"bash": "lora.bash", "zsh": "_lora", "fish": "lora.fish", "pwsh": "lora.ps1"}


METHODS_INTRO = """# Merge methods

Made from `lora_cli/merge_methods/` by `python -m tests.generate`: the output of `lora methods NAME`, method by method.

All methods work module by module. They get the module's updates, ΔW_i = B_i A_i with B_i (out, r_i), A_i (r_i, in) and
the scale alpha/rank folded into B_i, and one weight w_i per adapter. A result above the requested rank is then reduced
to its best approximation in the Frobenius norm, and the share of the energy kept is reported.
"""
METRICS_INTRO = """# Metrics

Made from `lora_cli/metrics/` by `python -m tests.generate`. A metric gives every example a value; the score is the mean
over the examples, so that systems can be compared example by example.
"""
PRESETS_INTRO = """# Presets of `lora fit`

Made from `lora_cli/fit_methods/` by `python -m tests.generate`. A preset is a named point of one family: which parts of
the model have a coefficient of their own, the function from θ to coefficients, the start, what is minimised and how.
Its options move away from that point. c is a coefficient, N the number of adapters. Two presets learn nothing and make
a router, which is no LoRA: [fitting.md](fitting.md#routers) says what can be done with it.
"""
SCORES = {
    "share": "a share, with Wilson's interval",
    "mean": "a mean, with the interval of 10,000 bootstrap resamples",
}
ADAPTERS_INTRO = """# Accepted and refused adapters

Made from `tests/matrix.py` by `python -m tests.generate`. `tests/whole/test_matrix.py` runs every row
through the commands of the columns, on a small base with random weights. If an adapter is accepted (✓), the
logits of PEFT, of the base in `lora eval`, of the merge and of the bake agree to 1e-5. If it is refused (✗),
the error names it, the exit code is 5, and nothing is written. `lora fit` and `lora eval` need a base that
continues a text (·: not tried); others take any.
"""
EXCHANGE_INTRO = """# Exchange

Made from `tests/imports/kinds.py`, `tests/exports/table.py` and `tests/exports/product.py` by
`python -m tests.generate`; the tests run every cell.

`lora convert` makes a PEFT folder of another program's adapter, and `merge`, `diff`, `bake`, `fit`, `eval` and
`pool sync --from` take such adapters as they are: they convert them into a cache. What is accepted becomes a plain LoRA
of one rank; the last table shows what each program takes of it. `lora extract TUNED --base BASE --rank R` makes a LoRA
of a full fine-tune.
"""
EXCHANGE_IN = """"Bit for bit": the factors are those of the file, in its precision. "Exact": the update is the same to
1e-6 in float64; several scales, or a form that is no product of two factors, were computed into fp32 factors. With
`--rank R` either becomes the best LoRA of that rank, and the error of each module is told. "Best of a rank": the update
depends on the base's weights and has no low rank, so that `--base BASE --rank R` is needed; at the full rank it is the
same to 1e-6. Nothing of a refused adapter is written.
"""
EXCHANGE_OUT = """"Exact": the program applies the same update bit for bit. "fp32": the scale is in B, rounded once to
fp32. `lora export` checks each result by reading it back by the program's own rule.
"""
EXCHANGE_BOTH = """Each adapter of the first table, converted and then exported. "Exact": the program applies the
update of the foreign file bit for bit. "fp32": factors were computed in fp32, and the update is the same to 1e-6 in
float64. What `lora convert` refuses reaches no program.
"""
COMMANDS = ("sync", "verify", "merge", "diff", "bake", "fit", "eval")
CLASS_INTROS = {
    "exact low rank": "A weighted sum of the factored updates, without error at rank Σ r_i; nothing dense is formed.",
    "spectral": "Singular values and subspaces of the factored updates, rank Σ r_i at most; nothing dense is formed.",
    "elementwise": "Entry by entry on the dense updates, which are streamed; of full rank before the reduction.",
    "A and B apart": "Methods of other tools on the factors, not on the updates, to reproduce their results: the same "
    "update with other factors gives another result.",
}


def commands() -> Iterator[tuple[str, Any, Any]]:
    """Every command of the tree: its words, the command, its context."""

    def below(command: Any, words: str, parent: Any) -> Iterator[tuple[str, Any, Any]]:
        context = command.make_context(words.rpartition(" ")[2], [], parent=parent, resilient_parsing=True)
        yield words, command, context
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            yield from below(command.get_command(context, name), f"{words} {name}", context)

    return below(get_command(app), "lora", None)


def reference() -> str:
    """docs/commands.md."""
    text = io.StringIO()
    text.write(
        "# Commands\n\nMade from the program by `python -m tests.generate`: the output of `--help`, by command.\n"
    )
    for words, command, context in commands():
        text.write(f"\n## {words}\n\n```text\n{command.get_help(context).strip()}\n```\n")
    return text.getvalue()


def methods() -> str:
    """docs/methods.md."""
    found = by_class(METHODS)
    rows = [[f"[{one.name}](#{one.name})", class_of(one), DEFAULTS[one.weights], _paper(one.arxiv)] for one in found]
    parts = [METHODS_INTRO.rstrip(), _table(["method", "class", "weights by default", "paper"], rows)]
    for name in CLASSES:
        parts += [f"## {name[0].upper()}{name[1:]}", textwrap.fill(CLASS_INTROS[name], 120)]
        parts += [_section(one) for one in found if class_of(one) == name]
    return "\n\n".join(parts) + "\n"


def metrics() -> str:
    """docs/metrics.md."""
    found = METRICS.methods.values()
    rows = [[f"[{one.name}](#{one.name})", one.kind, SCORES[one.score], one.better] for one in found]
    parts = [METRICS_INTRO.rstrip(), _table(["metric", "judges each", "score", "better"], rows)]
    return "\n\n".join([*parts, *(_section(one, "##") for one in found)]) + "\n"


def presets() -> str:
    """docs/presets.md."""
    found = FIT_METHODS.methods.values()
    ways = {"gradient": "gradient descent", "search": "search", "routing": "no learning: a router"}
    rows = [
        [
            f"[{one.name}](#{one.name.replace('.', '')})",
            ways[one.kind],
            f"{one.lr:g}" if one.lr else "",
            _escaped(one.summary),
        ]
        for one in found
    ]
    parts = [PRESETS_INTRO.rstrip(), _table(["preset", "by", "`--lr`", ""], rows)]
    return "\n\n".join([*parts, *(_section(one, "##") for one in found)]) + "\n"


def adapters() -> str:
    """docs/adapters.md."""
    parts = [ADAPTERS_INTRO.rstrip()]
    for title, kinds in (
        ("Accepted", [k for k in KINDS if not k.refused]),
        ("Refused", [k for k in KINDS if k.refused]),
    ):
        rows = [
            [kind.title, f"`{SPECS[kind.base][0]}`", *(_verdict(kind, name) for name in COMMANDS), _reason(kind)]
            for kind in kinds
        ]
        parts += [f"## {title}", _table(["adapter", "tried on", *COMMANDS, ""], rows)]
    return "\n\n".join(parts) + "\n"


def exchange() -> str:
    """docs/exchange.md."""
    taken = [
        [one.title, "bit for bit" if one.exact else "best of a rank" if one.best else "exact", str(one.rank), one.says]
        for one in SAMPLES
        if not one.refused
    ]
    refusals = [[one.title, f"“…{one.refused}…”", one.says] for one in SAMPLES if one.refused]
    return (
        "\n\n".join(
            [
                EXCHANGE_INTRO.rstrip(),
                "## In",
                EXCHANGE_IN.rstrip(),
                _table(["adapter", "becomes a LoRA", "rank in the test", ""], taken),
                _table(["refused", "by name", ""], refusals),
                "## Out",
                EXCHANGE_OUT.rstrip(),
                _table(["adapter", *TARGETS], rows()),
                "## In and out together",
                EXCHANGE_BOTH.rstrip(),
                _table(["adapter", *TARGETS], product.rows()),
            ]
        )
        + "\n"
    )


def _verdict(kind: Kind, command: str) -> str:
    if command in ("fit", "eval") and kind.base not in TEXT_BASES:
        return "·"
    return "✓" if bool(kind.refused) == (command in kind.but) else "✗"


def _reason(kind: Kind) -> str:
    said = [f"“{text}”" for text in dict.fromkeys((kind.refused, *kind.but.values())) if text]
    return "; ".join(filter(None, [*said, kind.says]))


def _section(one: Method, mark: str = "###") -> str:
    """A method's page: its docstring and its options."""
    parts = [f"{mark} {one.name}", _prose(one.summary)]
    for formula, block in blocks(one.formula):
        parts.append(f"```text\n{block}\n```" if formula else _prose(block))
    if one.knobs:
        parts.append(_options([*one.knobs.values()]))
    for name, knobs in inside(one, METHODS).items():
        if knobs:
            parts += [f"With `--inside {name}`:", _options(knobs)]
    for label, text in one.sections.items():
        parts.append(_prose(text, f"**{label}:** "))
    return "\n\n".join(parts)


def _options(knobs: Sequence[Knob]) -> str:
    rows = [[f"`{flag(knob)}`", f"{knob.default}", allowed(knob), knob.help] for knob in knobs]
    return _table(["option", "default", "takes", ""], [[_escaped(cell) for cell in row] for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _paper(arxiv: str) -> str:
    return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""


def _prose(text: str, label: str = "") -> str:
    """A paragraph of plain text as Markdown that reads the same."""
    words = re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", lambda found: _paper(found[1]), _escaped(" ".join(text.split())))
    lines = textwrap.wrap(label + words, 120, break_long_words=False, break_on_hyphens=False)
    # At the start of a line these would begin a list, a heading or a quotation.
    return "\n".join(re.sub(r"^(\d*)([-+=>#|.)])(?=\s|$)", r"\1\\\2", line) for line in lines)


def _escaped(text: str) -> str:
    """Plain text in which Markdown finds nothing but code in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"[\\*~$]|<(?=[\w/!?])|\](?=\()|(?<![\w\u0300-\u036f])_|_(?!\w)", r"\\\g<0>", part)
        for part in parts[::2]
    ]
    return "".join(parts)


def generated() -> dict[Path, str]:
    """Every generated file with what it has to hold."""
    files = {ROOT / "docs" / "commands.md": reference(), ROOT / "docs" / "methods.md": methods()}
    files |= {ROOT / "docs" / "metrics.md": metrics(), ROOT / "docs" / "presets.md": presets()}
    files |= {ROOT / "docs" / "adapters.md": adapters(), ROOT / "docs" / "exchange.md": exchange()}
    for shell in SHELLS:
        files[ROOT / "completions" / FILES[shell]] = completion_script(shell)
    return files


def main() -> int:
    stale = [file for file, text in generated().items() if not file.exists() or file.read_text("utf-8") != text]
    if "--check" in sys.argv:
        for file in stale:
            sys.stderr.write(f"{file.relative_to(ROOT)} is not what the program makes: python -m tests.generate\n")
        return 1 if stale else 0
    for file, text in generated().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
