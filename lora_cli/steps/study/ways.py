"""The systems and the pools of a study: what a name means, and everything that decides its result."""

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal

import msgspec

from lora_cli.errors import UsageError
from lora_cli.merge_options import METHODS, MergeOptions, MergeSources
from lora_cli.recipes import FIT_METHODS, SELECTION_METHODS, Recipe, SelectOptions, Shape
from lora_cli.study_options import StudyOptions
from lora_cli.text import nearest

Kind = Literal["base", "single", "target", "merge", "fit"]
_PLUS = "+target"
_FIT = "fit-"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_OF_SOURCES = ("weights", "dedupe")
_TRAINED = ("steps", "lr", "batch")
RULES: Mapping[str, Mapping[str, str]] = {
    "relevant": {"by": "evaluation"},
    "random": {"by": "random"},
    "noise": {"by": "random", "noise": "norm"},
}
"""The pools that need no definition."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """A system: how a model is made of a pool's adapters, by the records of options that decide it.

    target: the LoRA trained on the data joins the pool's adapters.
    """

    kind: Kind
    options: Mapping[str, Mapping[str, Any]] = {}
    target: bool = False

    @property
    def pooled(self) -> bool:
        """Whether it takes the adapters of a pool."""
        return self.kind in ("merge", "fit")

    @property
    def draws(self) -> bool:
        """Whether its result depends on the seed by itself."""
        return self.kind in ("target", "fit") or self.target or "seed" in self.merge.knobs

    @property
    def merge(self) -> MergeOptions:
        """How a merge is done."""
        return MergeOptions.of_settings(self.options.get("merge", {}))

    @property
    def sources(self) -> MergeSources:
        """The weights of a merge."""
        return MergeSources.of_settings(self.options.get("sources", {}))

    @property
    def shape(self) -> Shape:
        """The preset of a fit."""
        found: Shape = Shape.of(**self.options["shape"])
        return found

    def recipe(self, seed: int) -> Recipe:
        """How a fit is trained."""
        return Recipe.of_settings({**self.options["recipe"], "seed": seed})

    @property
    def reduction(self) -> dict[str, Any]:
        """The rank to which a fit's result is reduced."""
        return dict(self.options["reduction"])


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A pool: how its adapters are chosen. `names` are those of a stored selection; `noise` replaces all updates."""

    select: Mapping[str, Any] = {}
    names: tuple[str, ...] = ()
    noise: Literal["", "norm", "pooled"] = ""

    @property
    def options(self) -> SelectOptions:
        """How its adapters are selected."""
        return SelectOptions.of_settings(self.select)

    @property
    def chosen(self) -> "Rule":
        """The same adapters without noise."""
        return msgspec.structs.replace(self, noise="")

    @property
    def kind(self) -> str:
        """What the selection reads: "" for a stored one."""
        return SELECTION_METHODS.get(self.options.by).kind if self.select else ""

    @property
    def drawn(self) -> bool:
        """Whether the choice depends on the seed: by chance, by a LoRA trained with it, or by fits."""
        if self.kind == "catalogue":
            return "seed" in signature(SELECTION_METHODS.load(self.options.by)).parameters
        return self.kind in ("weights", "fits")


def way_of(name: str, options: StudyOptions) -> Way:
    """The system called `name`. UsageError for an unknown name, or options that it does not take."""
    given = dict(options.own_systems.get(name, {}))
    demand_name(name, "system")
    if name in options.own_systems:
        method, preset, target = given.pop("method", ""), given.pop("preset", ""), bool(given.pop("target", False))
        if bool(method) == bool(preset):
            raise UsageError(f"system {name}: give either a method (of lora merge) or a preset (of lora fit)")
    else:
        stem, target = name.removesuffix(_PLUS), name.endswith(_PLUS)
        if stem in ("base", "single", "target"):
            if target:
                raise UsageError(f"system {name}: only merges and fits are joined by the target LoRA")
            return Way(kind=stem, options=_target(options) if stem == "target" else {})  # type: ignore[arg-type]
        method, preset = _stem(stem)
    try:
        made = _merge(method, given, options) if method else _fit(preset, given, options)
    except UsageError as error:
        raise UsageError(f"system {name}: {error.message}", hint=error.hint) from None
    return msgspec.structs.replace(made, target=target)


def _stem(stem: str) -> tuple[str, str]:
    """The merge method and the preset that a name means, one of them ""."""
    if stem == "average":
        return "linear", ""
    if stem in METHODS.methods:
        return stem, ""
    if (preset := stem.removeprefix(_FIT)) in FIT_METHODS.methods:
        return "", preset
    known = ["base", "single", "target", "average", *METHODS.methods, *FIT_METHODS.methods]
    raise UsageError(f"unknown system {stem!r}", hint=nearest(stem, known, f"there are {', '.join(known)}"))


def _merge(method: str, given: dict[str, Any], options: StudyOptions) -> Way:
    from lora_cli.steps.merge.plan import checked_options  # imports torch, which reading a plan does without

    knobs = {name: given.pop(name) for name in [*given] if name in METHODS.knobs}
    sources = MergeSources.of(**{name: given.pop(name) for name in [*given] if name in _OF_SOURCES})
    usual = {"rank": options.rank, "energy": options.energy}
    merge = checked_options(MergeOptions.of(**{**usual, **given, "method": method, "knobs": knobs}))
    return Way(kind="merge", options={"merge": merge.settings, "sources": sources.settings})


def _fit(preset: str, given: dict[str, Any], options: StudyOptions) -> Way:
    reduction = {name: given.pop(name, getattr(options, name)) for name in ("rank", "energy")}
    trained = {name: given.pop(name) for name in [*given] if name in _TRAINED}
    if FIT_METHODS.get(preset).kind == "gradient":
        trained = {name: getattr(options, name) for name in _TRAINED} | trained
    shape = Shape.of(**{**given, "preset": preset})
    recipe = shape.completed(Recipe.of(**trained)).settings
    del recipe["seed"]
    return Way(kind="fit", options={"shape": shape.settings, "recipe": recipe, "reduction": reduction})


def _target(options: StudyOptions) -> dict[str, Mapping[str, Any]]:
    """The target LoRA and its training."""
    lora, recipe = options.target()
    return {"lora": lora.settings, "recipe": {name: one for name, one in recipe.settings.items() if name != "seed"}}


def rule_of(name: str, options: StudyOptions, selected: Mapping[str, tuple[str, ...]]) -> Rule:
    """The pool called `name`. UsageError for an unknown name, or options that a selection does not take.

    Args:
        selected: by pool, the adapters (`id@commit`) of those that are known before the study: stored selections, and
            choices by stored scores.
    """
    demand_name(name, "pool")
    if name not in RULES and name not in options.own_pools:
        known = [*RULES, *options.own_pools]
        hint = nearest(name, known, f"there are {', '.join(RULES)}, and those that a study file defines")
        raise UsageError(f"unknown pool {name!r}", hint=hint)
    given = dict(options.own_pools.get(name, RULES.get(name, {})))
    noise, selection = given.pop("noise", ""), given.pop("selection", "")
    if noise not in ("", "norm", "pooled"):
        raise UsageError(f"pool {name}: noise is norm or pooled, not {noise!r}")
    if selection and given:
        raise UsageError(f"pool {name}: a stored selection takes no {next(iter(given))}")
    if name in selected:
        return Rule(names=selected[name], noise=noise)
    for unfit in ("data", "target"):
        if unfit in given:
            raise UsageError(f"pool {name}: takes no {unfit}", hint="a pool is chosen by the study's own data")
    try:
        return Rule(select=SelectOptions.of(**{"k": options.k, **given}).settings, noise=noise)
    except UsageError as error:
        raise UsageError(f"pool {name}: {error.message}", hint=error.hint) from None


def demand_name(name: str, what: str) -> None:
    """UsageError unless `name` can name a system or a pool, and so a folder."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{what} {name!r}: a name has letters, digits and . _ + - alone, and at most 64 of them")
