"""The world's pool: its adapters, some of them broken on purpose. This module trains nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.world.layout import Size

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *FEED_FORWARD)

Flaw = Literal["", "wrong base", "not finite", "never trained", "cut off", "pickle only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The making of one adapter of the pool. `name` is `author/name`; the other fields have PEFT's names."""

    name: str
    task: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, int] = field(default_factory=dict)
    licence: str = "apache-2.0"
    flaw: Flaw = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A pool's recipes and the training that they share: AdamW for `steps` batches at a peak learning rate `rate`."""

    recipes: tuple[Recipe, ...]
    steps: int
    batch: int
    rate: float

    def recipe(self, name: str) -> Recipe:
        """The recipe of the adapter `author/name`."""
        return next(recipe for recipe in self.recipes if recipe.name == name)


POOLS: dict[Size, Pool] = {
    "small": Pool(
        steps=120,
        batch=32,
        rate=5e-3,
        recipes=(
            Recipe(name="kestrel/descend", task="descend", rank=8, alpha=16, targets=ALL),
            Recipe(name="mossy/sort-descending", task="descend", rank=16, alpha=32, targets=ATTENTION, licence="mit"),
            Recipe(name="northwind/conditional", task="cond", rank=8, alpha=16, targets=ALL, licence="cc-by-4.0"),
            Recipe(name="tarn/reverse-or-rotate", task="cond", rank=16, alpha=16, targets=ALL, rslora=True),
            Recipe(name="kestrel/pair-maximum", task="pairmax", rank=4, alpha=8, targets=ALL),
            Recipe(name="mossy/running-maximum", task="runmax", rank=8, alpha=16, targets=ATTENTION, licence="mit"),
            Recipe(name="tarn/complement", task="complement", rank=4, alpha=8, targets=FEED_FORWARD),
            Recipe(name="northwind/shift-seven", task="shift-seven", rank=8, alpha=16, targets=FEED_FORWARD),
            Recipe(name="kestrel/rotate-three", task="rotate-three", rank=2, alpha=4, targets=("q_proj", "v_proj")),
            Recipe(name="tarn/mirror", task="mirror", rank=8, alpha=16, targets=ALL, licence="mit"),
            Recipe(
                name="mossy/double",
                task="double",
                rank=4,
                alpha=8,
                targets=ALL,
                ranks={"down_proj": 8, "layers.0.self_attn.q_proj": 2},
                alphas={"down_proj": 16},
            ),
            Recipe(name="northwind/rotate-shift", task="rotate-one|shift-six", rank=8, alpha=16, targets=ALL),
            Recipe(name="kestrel/swap-rotate", task="swap|rotate-one", rank=4, alpha=8, targets=ATTENTION),
            Recipe(
                name="mossy/maximum-complement", task="max|complement", rank=16, alpha=32, targets=("q_proj", "v_proj")
            ),
            Recipe(name="tarn/dedupe", task="dedupe", rank=16, alpha=16, targets=ALL, licence="cc-by-4.0"),
            Recipe(name="northwind/running-sum", task="addmod", rank=8, alpha=16, targets=ALL),
            Recipe(name="kestrel/descend-wide", task="descend", rank=8, alpha=16, targets=ALL, flaw="wrong base"),
            Recipe(name="mossy/dedupe-half", task="dedupe", rank=4, alpha=8, targets=ATTENTION, flaw="not finite"),
            Recipe(name="northwind/part-draft", task="part", rank=8, alpha=16, targets=ALL, flaw="never trained"),
            Recipe(name="tarn/mirror-upload", task="mirror", rank=4, alpha=8, targets=ALL, flaw="cut off"),
            Recipe(name="tarn/median-2023", task="median", rank=8, alpha=16, targets=ATTENTION, flaw="pickle only"),
        ),
    ),
    "test": Pool(
        steps=60,
        batch=24,
        rate=1e-2,
        recipes=(
            Recipe(name="kestrel/outer", task="outer", rank=8, alpha=16, targets=ALL),
            Recipe(name="tarn/mirror", task="mirror", rank=4, alpha=16, targets=ATTENTION, licence="mit"),
            Recipe(
                name="kestrel/rotate-three",
                task="rotate-three",
                rank=2,
                alpha=3,
                targets=("q_proj", "v_proj"),
                rslora=True,
            ),
            Recipe(
                name="mossy/double",
                task="double",
                rank=4,
                alpha=8,
                targets=ALL,
                ranks={"down_proj": 8, "layers.0.self_attn.q_proj": 2},
                alphas={"down_proj": 16},
            ),
            Recipe(name="kestrel/outer-wide", task="outer", rank=4, alpha=8, targets=ALL, flaw="wrong base"),
            Recipe(name="mossy/outer-half", task="outer", rank=4, alpha=8, targets=ATTENTION, flaw="not finite"),
            Recipe(name="northwind/part-draft", task="part", rank=8, alpha=16, targets=ALL, flaw="never trained"),
            Recipe(name="tarn/mirror-upload", task="mirror", rank=4, alpha=8, targets=ALL, flaw="cut off"),
            Recipe(name="tarn/double-2023", task="double", rank=4, alpha=8, targets=ATTENTION, flaw="pickle only"),
        ),
    ),
}
