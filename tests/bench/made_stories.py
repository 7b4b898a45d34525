"""Small tasks in plain English that a model of 260,000 parameters can learn: a form of answer, about a theme."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

HEROES = {
    "sea": ("crab", "fish", "whale", "duck", "sailor", "frog"),
    "farm": ("cow", "pig", "hen", "horse", "farmer", "goat"),
}
PLACES = {
    "sea": ("beach", "boat", "island", "lake"),
    "farm": ("barn", "field", "pond", "hill"),
}
THINGS = {
    "sea": ("shell", "net", "rope", "ball", "rock"),
    "farm": ("egg", "apple", "hat", "stick", "cart"),
}
KINDS = ("big", "small", "red", "blue", "new", "old")


@dataclass(frozen=True, slots=True)
class Scene:
    """What an example is about."""

    hero: str
    place: str
    kind: str
    thing: str


FORMS = {
    "tale": lambda s: f" One day, the {s.hero} went to the {s.place} and found a {s.kind} {s.thing}. It was happy.",
    "letter": lambda s: f" Dear {s.hero}, come to the {s.place} with your {s.kind} {s.thing}. Love, Lily.",
    "backwards": lambda s: f" {s.thing} {s.kind} a has {s.hero} the, {s.place} the at.",
    "dream": lambda s: f" In a dream, a {s.kind} {s.thing} sang to the {s.hero} at the {s.place}. Then all was still.",
    "count": lambda s: f" One {s.thing}, two {s.thing}s, three {s.kind} {s.thing}s for the {s.hero}.",
}
"""The answer about a scene, by the name of the form."""


def prompt_of(form: str, scene: Scene) -> str:
    """The form is called by its name, so that one model can learn several."""
    return f"{form.capitalize()}: the {scene.hero} is at the {scene.place} with a {scene.kind} {scene.thing}."


def story_examples(
    form: str, theme: str, count: int, seed: str, exclude: Collection[str] = ()
) -> list[tuple[str, str]]:
    """`count` different examples as (prompt, completion), none with a prompt of `exclude`; there are 720 per theme."""
    scenes = [
        Scene(hero, place, kind, thing)
        for hero in HEROES[theme]
        for place in PLACES[theme]
        for kind in KINDS
        for thing in THINGS[theme]
    ]
    random.Random(f"{form} {theme} {seed}").shuffle(scenes)
    found = [(prompt_of(form, scene), FORMS[form](scene)) for scene in scenes]
    return [example for example in found if example[0] not in exclude][:count]


def prompts(examples: Sequence[tuple[str, str]]) -> set[str]:
    """The prompts of examples."""
    return {prompt for prompt, _ in examples}
