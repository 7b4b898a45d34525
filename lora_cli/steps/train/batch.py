"""The examples of a step, where a recipe asks for more than there are."""

from typing import TypeVar

from msgspec.structs import replace

from lora_cli.recipes import Recipe
from lora_cli.text import counted

_Recipe = TypeVar("_Recipe", bound=Recipe)


def within(recipe: _Recipe, examples: int) -> _Recipe:
    """The recipe for so many training examples: a step reads none of them twice."""
    return replace(recipe, batch=max(1, min(recipe.batch, examples)))


def batch_note(asked: Recipe, taken: Recipe) -> list[str]:
    """The line about steps of fewer examples than the user asked for; no line about the default, which nobody did."""
    if asked.batch in (taken.batch, type(asked)().batch):
        return []
    return [f"note: a step reads {counted(taken.batch, 'example')}, all that are learnt from, not {asked.batch:,}"]
