"""The options of select, fit, train and eval."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from lora_cli.errors import UsageError
from lora_cli.merge_options import Energy, Rank
from lora_cli.methods import Knob, Method, MethodFolder
from lora_cli.metrics import METRICS
from lora_cli.options import Flag, Options
from lora_cli.records import ALL_LINEAR

SELECTION_METHODS = MethodFolder("lora_cli.selection_methods", "selection method")

FIT_METHODS = MethodFolder("lora_cli.fit_methods", "preset")
if TYPE_CHECKING:
    Metric = str
    By = str
    Preset = str
else:  # one choice per file of metrics/, selection_methods/ and fit_methods/
    Metric = Literal[tuple(METRICS.methods)]
    By = Literal[tuple(SELECTION_METHODS.methods)]
    Preset = Literal[tuple(FIT_METHODS.methods)]
COEFFICIENTS, TRAINING, CONTROLS = "Coefficients", "Training", "Comparison"
LORA, SCORES = "The LoRA", "Scores"

Steps = Annotated[int, Flag(help="Steps of the optimiser.", panel=TRAINING)]
MaxNewTokens = Annotated[int, Flag(help="Longest output.", minimum=1, panel=SCORES)]
BatchSize = Annotated[
    int | None,
    Flag(
        help="The most prompts at once, over all adapters.", minimum=1, panel=SCORES, default="as many as memory takes"
    ),
]
LearningRate = Annotated[float, Flag(help="Peak learning rate.", panel=TRAINING)]


def _usual(values: Mapping[str, Any]) -> str:
    """The defaults of a knob in presets, as the help names them: the commonest one first, without names."""
    by_value: dict[str, list[str]] = {}
    for preset, value in values.items():
        by_value.setdefault(f"{value:g}" if isinstance(value, float) else str(value), []).append(preset)
    usual = max(by_value, key=lambda value: len(by_value[value]))
    others = [f"{value} for {' and '.join(presets)}" for value, presets in by_value.items() if value != usual]
    return "; ".join([usual, *others])


def _knobs_of_presets() -> list[tuple[str, Any, None]]:
    """The knobs of all presets as fields, None for the preset's own value."""
    fields = []
    for name, presets in FIT_METHODS.knobs.items():
        knobs = [*presets.values()]
        choices = tuple(dict.fromkeys(choice for one in knobs for choice in one.choices))
        kind: Any = Literal[choices] if all(one.choices for one in knobs) else knobs[0].type
        lacking = [name for name in FIT_METHODS.methods if name not in presets]
        own = f"Not for {', '.join(lacking)}: " if len(lacking) < len(presets) else f"For {', '.join(presets)}: "
        help = own + knobs[0].help
        if len({one.help for one in knobs}) > 1:
            help = " ".join(f"For {preset}: {one.help}" for preset, one in presets.items())
        usual = _usual({preset: one.default for preset, one in presets.items()})
        fields.append((name, Annotated[kind | None, Flag(help=help, default=usual, panel=COEFFICIENTS)], None))
    return fields


def _knobs(name: str, knobs: Iterable[Knob], panel: str, after: type[Options] = Options) -> Any:
    """The options of `after` and those that are these knobs, each a choice."""
    return msgspec.defstruct(
        name,
        [
            (knob.name, Annotated[Literal[knob.choices], Flag(help=knob.help, panel=panel)], knob.default)
            for knob in knobs
        ],
        bases=(after,),
        frozen=True,
        kw_only=True,
    )


def _knobs_of_metrics() -> list[Knob]:
    """The knobs of all metrics, whose help names the metric."""
    return [
        replace(knob, help=f"For {', '.join(metrics)}: {knob.help}.")
        for metrics in METRICS.knobs.values()
        for knob in [*metrics.values()][:1]
    ]


class _Preset(Options, frozen=True, kw_only=True):
    """The preset."""

    preset: Annotated[
        Preset,
        Flag(
            help="; ".join(f"{name}: {one.summary[:-1]}" for name, one in FIT_METHODS.methods.items()) + ".",
            panel=COEFFICIENTS,
        ),
    ] = "adaptive"


_Shape = msgspec.defstruct("_Shape", _knobs_of_presets(), bases=(_Preset,), frozen=True, kw_only=True)


class Shape(_Shape):  # type: ignore[misc,valid-type]
    """The coefficients, and how they are found: a preset of `fit_methods/`, and knobs of it that are turned.

    A knob that is None has the preset's own value.

    Raises:
        UsageError: a knob that the preset lacks, or a value out of range.
    """

    @property
    def knobs(self) -> dict[str, Any]:
        """Every knob of the preset."""
        given = {name: getattr(self, name) for name in FIT_METHODS.knobs if getattr(self, name) is not None}
        return FIT_METHODS.check(self.preset, given)

    @property
    def settings(self) -> dict[str, Any]:
        return {"preset": self.preset, **self.knobs}

    @property
    def routes(self) -> bool:
        """Whether the preset makes a router, which learns nothing and is no LoRA."""
        return FIT_METHODS.get(self.preset).kind == "routing"

    @property
    def labelled(self) -> bool:
        """Whether the fit learns from answers."""
        return bool(self.knobs.get("objective") != "entropy")

    def completed(self, recipe: "Recipe") -> "Recipe":
        """A recipe with the preset's learning rate, unless it has one.

        Raises:
            UsageError: the preset does not descend by gradients, and the recipe has options of a descent.
        """
        preset = FIT_METHODS.get(self.preset)
        if preset.kind == "gradient":
            return recipe if recipe.lr is not None else msgspec.structs.replace(recipe, lr=preset.lr)
        usual = Recipe()
        why = "it learns nothing" if self.routes else "it searches without gradients, over all examples at once"
        for name in ("steps", "lr", "batch"):
            if getattr(recipe, name) != getattr(usual, name):
                raise UsageError(
                    f"{self.preset} takes no --{name}: {why}",
                    hint=f"its options are {', '.join(f'--{knob}' for knob in preset.knobs)}",
                )
        return recipe

    @property
    def metric(self) -> Method | None:
        """The metric that is the objective of a search, None for none."""
        searches = FIT_METHODS.get(self.preset).kind == "search"
        return METRICS.methods.get(self.knobs["objective"]) if searches else None

    @property
    def command(self) -> str:
        """The user's command that is the objective of a search, "" for none."""
        searches = FIT_METHODS.get(self.preset).kind == "search"
        return str(self.knobs["objective"]) if searches and self.metric is None else ""

    def __post_init__(self) -> None:
        knobs = self.knobs
        if knobs.get("granularity") == "rank" and knobs.get("activation") == "softmax":
            raise UsageError(
                "--activation softmax cannot be used with --granularity rank: softmax compares adapters",
                hint="use --activation leaky_relu",
            )


class Recipe(Options, frozen=True, kw_only=True):
    """How to train: AdamW (0.9, 0.999) without decay, linear warm-up over `warmup` of the steps, then half a cosine.

    The warm-up starts at a rate of 0, as transformers' schedules do: the first step only fills AdamW's moments. `lr` is
    the peak; None is the preset's of a fit, 0.05 without one. `batch` examples make one step, in as many passes as
    memory requires; gradients are clipped to norm 1; every `every` steps, and before the first one, the validation loss
    is taken, and the best parameters are kept.
    """

    steps: Steps = 100
    lr: Annotated[
        float | None,
        Flag(
            help="Peak learning rate.",
            default=_usual({name: one.lr for name, one in FIT_METHODS.methods.items() if one.lr}),
            panel=TRAINING,
        ),
    ] = None
    batch: Annotated[int, Flag(help="Examples per step.", panel=TRAINING)] = 8
    warmup: float = 0.1
    schedule: Literal["cosine from 0"] = "cosine from 0"
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("every", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise UsageError(f"--{name} must be at least {low}, not {getattr(self, name)}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr must be above 0, not {self.lr}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …, steps − 1."""
        peak = 5e-2 if self.lr is None else self.lr
        # At least one step must have a rate above 0.
        warm = min(math.ceil(self.warmup * self.steps), self.steps - 1)
        if step < warm:
            return peak * step / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class TargetRecipe(Recipe, frozen=True, kw_only=True):
    """The paper's target LoRA: 400 steps of 8 examples at 3e-4."""

    steps: Steps = 400
    lr: LearningRate = 3e-4


class SelectOptions(Options, frozen=True, kw_only=True):
    """The adapters to choose: the `k` best by a method, of those for which every condition of `where` holds.

    `target` is the folder of the reference adapter, for methods that compare weights; without it, one is trained on
    `data`. Methods that judge answers take `data`, or the stored scores of `task`. The limit per author does not apply
    to adapters without an author. `dedupe` takes cosines from sketches, which `pool verify --deep` makes.
    """

    by: Annotated[By, Flag(help="How.")] = "random"
    k: Annotated[int, Flag(help="How many.", minimum=1)] = 30
    where: Annotated[
        tuple[str, ...], Flag(help="Condition on a column, like 'rank<=16'; repeatable, all must hold.")
    ] = ()
    target: Annotated[Path | None, Flag(help="Adapter folder to compare with, for methods that read weights.")] = None
    data: Annotated[
        Path | None,
        Flag(
            help="Task file, for methods that judge answers or fit; or to train the target on.",
            default="the setting data",
        ),
    ] = None
    task: Annotated[
        str | None, Flag(help="In place of a file: a task of which the catalogue has scores, for evaluation.")
    ] = None
    rank_by: Annotated[By, Flag(help="For scan: the method whose order is cut into segments.")] = "rank"
    ties: Annotated[
        Literal["likelihood", "file", "id"],
        Flag(
            help="Order of equal scores on a task: by the likelihood of the expected answers, as the scores came into "
            "the catalogue, or by id."
        ),
    ] = "likelihood"
    max_per_author: Annotated[int | None, Flag(help="The most adapters of one author.", minimum=1)] = None
    dedupe: Annotated[
        float | None, Flag(help="Leave out copies of better ones: the same weights, or a cosine of this and above.")
    ] = None

    def __post_init__(self) -> None:
        if SELECTION_METHODS.get(self.rank_by).kind == "fits":
            raise UsageError(f"--rank-by {self.rank_by}: it ranks nothing by itself", hint="rank, downloads, cosine, …")
        if self.dedupe is not None and not 0 < self.dedupe <= 1:
            raise UsageError(f"--dedupe is a cosine in 0 < cosine <= 1, not {self.dedupe}")


class FitOptions(Options, frozen=True, kw_only=True):
    """The options of a fit besides coefficients and training; `rank` and `energy` reduce the result."""

    rank: Rank = "auto"
    energy: Energy = None
    target: Annotated[
        str | None, Flag(help="An adapter trained on the task itself, to join the others.", panel=CONTROLS)
    ] = None
    control: Annotated[
        str,
        Flag(
            help="Compare with, by commas: random (the same fit over noise that keeps the norm of each update), "
            "random-pooled (over noise of the spread of all factors), target (a new LoRA), base (always compared).",
            metavar="random,target,base",
            panel=CONTROLS,
        ),
    ] = ""
    seeds: Annotated[
        int,
        Flag(
            help="Fit by so many seeds, from --seed on, and show the spread; the result is that of the first.",
            minimum=1,
            panel=CONTROLS,
        ),
    ] = 1
    time_limit: Annotated[
        float | None,
        Flag(
            help="Stop after so many minutes with the best so far, and exit code 6; run again to go on.",
            metavar="MINUTES",
            panel=TRAINING,
        ),
    ] = None
    command_timeout: Annotated[
        float | None,
        Flag(help="The most minutes for one run of the command of --objective.", metavar="MINUTES", panel=TRAINING),
    ] = None
    grad_checkpointing: Annotated[
        bool, Flag(help="Compute the values of each layer twice and keep none: less memory, more time.", panel=TRAINING)
    ] = False

    def __post_init__(self) -> None:
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise UsageError(f"--time-limit is in minutes, above 0, not {self.time_limit}")
        if self.command_timeout is not None and not 0 < self.command_timeout < math.inf:
            raise UsageError(f"--command-timeout is in minutes, above 0, not {self.command_timeout}")

    @property
    def controls(self) -> list[str]:
        """The controls by name, but for the base, which every fit is compared with."""
        names = [part.strip() for part in self.control.split(",") if part.strip()]
        return [name for name in dict.fromkeys(names) if name != "base"]


class TrainOptions(Options, frozen=True, kw_only=True):
    """The LoRA to train."""

    rank: Annotated[int, Flag(help="Rank of the LoRA.", panel=LORA)] = 64
    alpha: Annotated[float, Flag(help="Alpha; the update is scaled by alpha/rank.", panel=LORA)] = 16.0
    dropout: Annotated[float, Flag(help="Dropout on the LoRA's input.", panel=LORA)] = 0.1
    target_modules: Annotated[str, Flag(help="Names of modules with commas, or all-linear.", panel=LORA)] = ALL_LINEAR
    start: Annotated[
        Path | None, Flag(help="Go on from the LoRA in this folder, trained with the same options.", panel=LORA)
    ] = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not 0 < self.alpha < math.inf:
            raise UsageError("a LoRA needs --rank of at least 1, --alpha above 0 and --dropout in [0, 1)")

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `BaseModel.new_adapter` but the seed, as run.json holds them."""
        names = [part.strip() for part in self.target_modules.split(",") if part.strip()]
        modules = ALL_LINEAR if self.target_modules == ALL_LINEAR else names
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "target_modules": modules}


class _Judged(Options, frozen=True, kw_only=True):
    """The metric."""

    metric: Annotated[
        Metric,
        Flag(
            help="; ".join(
                f"{name}: {one.summary[:-1]}, {one.better} is better" for name, one in METRICS.methods.items()
            )
            + ".",
            panel=SCORES,
        ),
    ] = "exact"


Metrics = _knobs("Metrics", _knobs_of_metrics(), SCORES, after=_Judged)
"""The metric with its knobs."""


class EvalOptions(Metrics, frozen=True, kw_only=True):  # type: ignore[misc,call-arg,valid-type]
    """How a task is scored: the metric with its knobs, and these options."""

    baseline: Annotated[str, Flag(help="The system for differences: base, or an adapter.", panel=SCORES)] = "base"
    max_new_tokens: MaxNewTokens = 30
    batch_size: BatchSize = None

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown metric, or a knob that the metric lacks."""
        usual = {knob.name: knob.default for metrics in METRICS.knobs.values() for knob in metrics.values()}
        METRICS.check(self.metric, {name: given for name in usual if (given := getattr(self, name)) != usual[name]})

    @property
    def knobs(self) -> dict[str, Any]:
        """The knobs of the metric."""
        return {knob: getattr(self, knob) for knob in METRICS.get(self.metric).knobs}


_Knobs = _knobs("_Knobs", _knobs_of_metrics(), SCORES)


class TrialOptions(_Knobs, frozen=True, kw_only=True):  # type: ignore[misc,call-arg,valid-type]
    """How the adapters of a pool are judged on a task."""

    metric: Annotated[
        str | None,
        Flag(help=f"{', '.join(METRICS.methods)}; stored scores may have others.", default="exact", panel=SCORES),
    ] = None
    max_new_tokens: MaxNewTokens = 30
    batch_size: BatchSize = None

    @property
    def of_eval(self) -> EvalOptions:
        """The same as the options of an evaluation. UsageError as `EvalOptions` raises it."""
        return EvalOptions(**self.settings | {"metric": self.metric or "exact"})
