"""The options of a study: flags, presets, and the keys of a study file."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from lora_cli.errors import UsageError
from lora_cli.files import read_given
from lora_cli.merge_options import Energy, Rank
from lora_cli.options import Flag, Options
from lora_cli.recipes import SCORES, TRAINING, MaxNewTokens, Metrics, TargetRecipe, TrainOptions
from lora_cli.settings import KEYS
from lora_cli.text import nearest

WHAT, TARGET, SEQUENCE = "What is compared", "The target LoRA", "Tasks one after another"
USUAL = "base,single,average,norm-matched,ties,tsv,lego,adaptive,adaptive+target,lorahub,target"
OF_SETTINGS = ("base", "base_aliases", "data", "test", "db", "seed", "device", "dtype", "license_policy")
"""The settings that a study file may have beside the options of a study."""


class StudyOptions(Metrics, frozen=True, kw_only=True):  # type: ignore[misc,call-arg]
    """What a study compares, and how its adapters are chosen, learnt from and judged.

    `own_systems` and `own_pools` are defined in a study file: name → its options.
    """

    systems: Annotated[
        str,
        Flag(
            help="By commas: base, single (the best adapter on the data), target (a new LoRA on the data), average, "
            "merge methods, presets of fit; +target joins the new LoRA to the pool.",
            metavar="A,B,…",
            panel=WHAT,
        ),
    ] = USUAL
    pools: Annotated[
        str,
        Flag(
            help="By commas: relevant (the best on the data), random, noise (for fits: random adapters whose updates "
            "are noise of the same norm).",
            metavar="A,B,…",
            panel=WHAT,
        ),
    ] = "relevant,random,noise"
    seeds: Annotated[int, Flag(help="Cells by so many seeds, from --seed on.", minimum=1, panel=WHAT)] = 3
    k: Annotated[int, Flag(help="Adapters of each pool.", minimum=1, panel=WHAT)] = 30
    where: Annotated[
        tuple[str, ...],
        Flag(help="Condition on the adapters that pools are chosen from, like 'rank<=16'; repeatable.", panel=WHAT),
    ] = ()
    held_out: Annotated[
        float, Flag(help="Without test data: the share of the data that is kept for testing.", panel=WHAT)
    ] = 0.5
    rank: Rank = "auto"
    energy: Energy = None
    steps: Annotated[int, Flag(help="Steps of a fit by gradients.", minimum=1, panel=TRAINING)] = 100
    lr: Annotated[
        float | None, Flag(help="Peak learning rate of such a fit.", default="the preset's", panel=TRAINING)
    ] = None
    batch: Annotated[int, Flag(help="Examples per step of such a fit.", minimum=1, panel=TRAINING)] = 8
    target_rank: Annotated[int, Flag(help="Its rank.", minimum=1, panel=TARGET)] = 64
    target_alpha: Annotated[float, Flag(help="Its alpha.", panel=TARGET)] = 16.0
    target_dropout: Annotated[float, Flag(help="Dropout on its input.", panel=TARGET)] = 0.1
    target_steps: Annotated[int, Flag(help="Steps of its training.", minimum=1, panel=TARGET)] = 400
    target_lr: Annotated[float, Flag(help="Peak learning rate of its training.", panel=TARGET)] = 3e-4
    max_new_tokens: MaxNewTokens = 30
    batch_size: Annotated[
        int, Flag(help="The most prompts at once; it moves the last bit of a likelihood.", minimum=1, panel=SCORES)
    ] = 16
    sequence: Annotated[
        str,
        Flag(
            help="Task files by commas, in order: a LoRA is trained on each, and merged into the running one. In place "
            "of --data, systems and pools.",
            metavar="T1,T2,…",
            panel=SEQUENCE,
        ),
    ] = ""
    sequence_test: Annotated[
        str, Flag(help="Their test files, in the same order.", metavar="V1,V2,…", default="parts", panel=SEQUENCE)
    ] = ""
    rules: Annotated[
        str,
        Flag(
            help="How a LoRA joins the running one, by commas; lego-K is LEGO with K clusters. sequential trains one "
            "LoRA on and merges nothing.",
            metavar="A,B,…",
            panel=SEQUENCE,
        ),
    ] = "average,ties,lego,orthogonal,sequential"
    own_systems: Mapping[str, Mapping[str, Any]] = {}
    own_pools: Mapping[str, Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UsageError(f"--held-out is a share between 0 and 1, not {self.held_out}")

    @property
    def named_systems(self) -> list[str]:
        """The systems by name, each once."""
        return names_in(self.systems)

    @property
    def named_pools(self) -> list[str]:
        """The pools by name, each once."""
        return names_in(self.pools)

    def target(self) -> tuple[TrainOptions, TargetRecipe]:
        """The target LoRA and its training. UsageError for options that are none, by the names that they have here."""
        try:
            lora = TrainOptions(rank=self.target_rank, alpha=self.target_alpha, dropout=self.target_dropout)
            return lora, TargetRecipe(steps=self.target_steps, lr=self.target_lr)
        except UsageError as error:
            raise UsageError(error.message.replace("--", "--target-"), hint=error.hint) from None


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {
        "systems": "base,average,ties,adaptive,target",
        "seeds": 1,
        "k": 10,
        "steps": 20,
        "target_steps": 40,
    },
    "paper": {
        "systems": "base,single,average,ties,tsv,lego,adaptive,adaptive+target,lorahub,target",
        "seeds": 3,
        "k": 30,
        "steps": 100,
        "target_rank": 64,
        "target_steps": 400,
    },
}
"""Options by the name of a preset."""


def _optional() -> Any:
    """`StudyOptions` as flags, each None where it is not given: a preset or a file may have it."""
    fields = []
    for name, (kind, flag) in StudyOptions.flags().items():
        usual = msgspec.structs.fields(StudyOptions)
        default = next(field.default for field in usual if field.name == name)
        told = flag.default or (
            "" if default in (None, ()) else f"{default:g}" if isinstance(default, float) else default
        )
        optional = kind if kind == tuple[str, ...] else kind | None
        fields.append((name, Annotated[optional, replace(flag, default=str(told))], () if optional == kind else None))
    return msgspec.defstruct("Asked", fields, bases=(_Presets,), frozen=True, kw_only=True)


class _Presets(Options, frozen=True, kw_only=True):
    """Where options come from that are not given."""

    file: Annotated[
        Path | None, Flag(help="A study file (TOML): every key is called as its flag.", metavar="FILE", panel=WHAT)
    ] = None
    quick: Annotated[bool, Flag(help="Few systems, one seed, short training.", panel=WHAT)] = False
    paper: Annotated[bool, Flag(help="The grid of arXiv 2602.12323 for one task.", panel=WHAT)] = False


if TYPE_CHECKING:
    Asked = _Presets
else:
    Asked = _optional()


def asked_options(asked: _Presets) -> tuple[StudyOptions, dict[str, Any]]:
    """The options of a study, by precedence flag > file > preset > default; and the settings that its file has.

    Raises:
        UsageError: two presets, a file that cannot be read, an unknown key, or a value of the wrong kind.
    """
    if asked.quick and asked.paper:
        raise UsageError("--quick and --paper exclude each other")
    found, settings = ({}, {}) if asked.file is None else read_study_file(asked.file)
    of_file = [name for name in PRESETS if found.pop(name, False)]
    names = [name for name in PRESETS if getattr(asked, name)] or of_file
    if len(names) > 1:
        raise UsageError(f"{asked.file}: {names[0]} and {names[1]} exclude each other")
    given = {name: value for name in StudyOptions.flags() if (value := getattr(asked, name)) not in (None, ())}
    preset = PRESETS[names[0]] if names else {}
    return StudyOptions.of(**{**preset, **found, **given}), settings


def read_study_file(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the settings that a study file holds; paths in it are relative to its folder.

    A system or a pool is a name, or a table with a name and the options of one's own.

    Raises UsageError, which names the file and the key.
    """
    try:
        text = read_given(file).decode()
        values = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file} cannot be read: {reason}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {**StudyOptions.flags(), **dict.fromkeys(OF_SETTINGS), **dict.fromkeys(PRESETS)}
    for name in values:
        if name not in known:
            hint = nearest(name, known, f"keys are {', '.join(known)}")
            raise UsageError(f"{file}{_line(text, name)}: unknown key {name!r}", hint=hint)
    for name in PRESETS:
        if not isinstance(values.get(name, False), bool):
            raise UsageError(f"{file}: {name} must be true or false, not {values[name]!r}")
    settings = {name: _setting(file, name, values.pop(name)) for name in OF_SETTINGS if name in values}
    for what in ("sequence", "sequence_test"):
        if what in values:
            values[what] = _files(file, what, values[what])
    for what in ("systems", "pools"):
        if isinstance(values.get(what), list):
            values[what], values[f"own_{what}"] = _defined(file, what, values[what])
    for name in values.keys() - PRESETS.keys():
        try:
            StudyOptions.of(**{name: values[name]})
        except UsageError as error:
            raise UsageError(f"{file}{_line(text, name)}: {error.message}", hint=error.hint) from None
    return values, settings


def _line(text: str, name: str) -> str:
    """The line of a key in a study file, with a colon before it; "" where it is spelled in another way."""
    spelled = re.compile(rf"""\s*["']?{re.escape(name).replace("_", "[_-]")}["']?\s*=""")
    return next((f":{number}" for number, line in enumerate(text.split("\n"), 1) if spelled.match(line)), "")


def names_in(text: str) -> list[str]:
    """The names in a text with commas, each once."""
    return list(dict.fromkeys(listed(text)))


def listed(text: str) -> list[str]:
    """What stands in a text with commas, in its order."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _files(file: Path, what: str, value: Any) -> str:
    """The task files that a study file names, in a list or with commas, as paths from here."""
    names = listed(value) if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{file}: {what} takes names of files, not {value!r}")
    return ",".join(str(file.parent / name) for name in names)


def _defined(file: Path, what: str, entries: list[Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The names in a list of names and tables, with commas, and the tables by name."""
    names, tables = [], {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or not name:
            raise UsageError(f"{file}: {what} takes names, or tables with a name, not {entry!r}")
        names.append(name)
        if isinstance(entry, dict):
            tables[name] = {key.replace("-", "_"): value for key, value in entry.items() if key != "name"}
    return ",".join(names), tables


def _setting(file: Path, name: str, value: Any) -> Any:
    """The value of a setting in a study file, as a flag gives it."""
    try:
        parsed = KEYS[name].parse(value, file.absolute().parent)
    except ValueError as error:
        raise UsageError(f"{file}: {name} must be {error}, not {value!r}") from None
    return str(parsed) if isinstance(parsed, Path) else parsed
