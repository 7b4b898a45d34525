"""The world's tasks: small string operations, their prompts, and random examples.

A prompt names one operation or a chain of them, then the string: `sort|shift-two:cabed`. The answer is the string after
the operations, from left to right. Strings are made of the ten letters a to j.
"""

import json
import random
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from lora_cli.world.layout import Size

LETTERS = "abcdefghij"
STRING_LENGTH: dict[Size, int] = {"small": 5, "test": 4}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")


def rotate(text: str, by: int) -> str:
    """The string with its first `by` letters moved to the end."""
    return text[by:] + text[:by]


def shift(text: str, by: int) -> str:
    """Each letter replaced by the one `by` places later, j being followed by a."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in text)


def swap(text: str) -> str:
    """Neighbours exchanged: badc for abcd; an odd last letter stays."""
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def addmod(text: str) -> str:
    """Running sum of the letters' places, modulo ten."""
    total, out = 0, ""
    for letter in text:
        total = (total + LETTERS.index(letter)) % len(LETTERS)
        out += LETTERS[total]
    return out


OPERATIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "copy": (lambda s: s, "repeats the string"),
    "reverse": (lambda s: s[::-1], "writes the string backwards"),
    "swap": (swap, "exchanges each pair of neighbouring letters"),
    "sort": (lambda s: "".join(sorted(s)), "puts the letters in alphabetical order"),
    "evens": (lambda s: s[1::2], "keeps the second, fourth, … letter"),
    "odds": (lambda s: s[::2], "keeps the first, third, … letter"),
    "max": (lambda s: max(s), "gives the letter that comes last in the alphabet"),
    "min": (lambda s: min(s), "gives the letter that comes first in the alphabet"),
    "first": (lambda s: s[0], "gives the first letter"),
    "last": (lambda s: s[-1], "gives the last letter"),
    "descend": (lambda s: "".join(sorted(s, reverse=True)), "puts the letters in descending order"),
    "cond": (
        lambda s: s[::-1] if s[0] < "f" else rotate(s, 1),
        "writes the string backwards if it starts with a to e, and otherwise moves its first letter to the end",
    ),
    "pairmax": (lambda s: "".join(map(max, s, s[1:])), "gives the later letter of each two neighbours"),
    "runmax": (lambda s: "".join(max(s[: i + 1]) for i in range(len(s))), "gives the latest letter seen so far"),
    "complement": (lambda s: "".join(LETTERS[9 - LETTERS.index(c)] for c in s), "mirrors the alphabet: a becomes j"),
    "mirror": (lambda s: s + s[::-1], "writes the string and then the same backwards"),
    "double": (lambda s: "".join(c + c for c in s), "writes every letter twice"),
    "dedupe": (lambda s: "".join(dict.fromkeys(s)), "drops letters that were there before"),
    "addmod": (addmod, "adds up the letters' places in the alphabet, modulo ten"),
    "part": (lambda s: "".join(sorted(s, key=lambda c: c >= "f")), "moves the letters a to e to the front, in order"),
    "median": (lambda s: sorted(s)[len(s) // 2], "gives the middle letter in alphabetical order"),
    "outer": (lambda s: s[0] + s[-1] + s[1:-1], "moves the last letter to the second place"),
}
OPERATIONS |= {
    f"shift-{word}": (partial(shift, by=by), f"moves every letter forward in the alphabet by {word}")
    for by, word in enumerate(NUMBERS, start=1)
}
OPERATIONS |= {
    f"rotate-{word}": (partial(rotate, by=by), f"rotates the string to the left by {word}")
    for by, word in enumerate(NUMBERS[:3], start=1)
}


def answer(task: str, text: str) -> str:
    """The result of `task` (operations joined by `|`, applied from left to right) on `text`."""
    for name in task.split("|"):
        text = OPERATIONS[name][0](text)
    return text


def sentence(task: str) -> str:
    """A description of a task for people."""
    return ", then ".join(OPERATIONS[name][1] for name in task.split("|"))


def file_name(task: str) -> str:
    """The task's name in file names, without `|`."""
    return task.replace("|", "-then-")


def example(task: str, length: int, rng: random.Random) -> tuple[str, str]:
    """One random (prompt, completion) of a task, on a string of `length` letters."""
    text = "".join(rng.choices(LETTERS, k=length))
    return f"{task}:{text}", answer(task, text)


def examples(
    task: str, length: int, count: int, rng: random.Random, *, exclude: Collection[str] = ()
) -> list[tuple[str, str]]:
    """`count` different random examples of a task, none with a prompt of `exclude`."""
    found: dict[str, str] = {}
    while len(found) < count:
        prompt, completion = example(task, length, rng)
        if prompt not in exclude:
            found.setdefault(prompt, completion)
    return list(found.items())


def write_jsonl(path: Path, task: str, split: str, rows: list[tuple[str, str]]) -> None:
    """Examples as lines of `{"id", "prompt", "completion"}`."""
    lines = (
        json.dumps({"id": f"{task}/{split}/{i}", "prompt": prompt, "completion": completion})
        for i, (prompt, completion) in enumerate(rows)
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
