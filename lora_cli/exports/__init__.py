"""Programs that serve the result of a merge, for `--for NAME`. One file is one program: an object of the file's name.

docs/merging.md lists the rules of these and of other programs, and tests/readers.py holds each as a function.
"""

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from lora_cli.errors import Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.methods import file_names, member
from lora_cli.names import leaves

Shape = tuple[int, int]

# Linear layers of decoder models of the Llama kind, separate and as servers fuse them.
_LLAMA_MODULES = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
)


class Export(ABC):
    """A program that loads adapters: its rules, and the command that starts it.

    The rules are those of `version`. `highest_rank` is the highest rank that it loads, None for any. `one_rank` is true
    if it reads neither rank_pattern nor alpha_pattern and does not apply every module at its own rank.
    """

    program: str
    version: str
    highest_rank: int | None = None
    one_rank: bool = False

    @property
    def title(self) -> str:
        """The program with its version."""
        return f"{self.program} {self.version}"

    def demand_servable(self, *, conv1d: Sequence[str], rank: int) -> None:
        """Refused for modules without a LoRA layer in the program, and for a rank above its limit.

        Args:
            conv1d: the adapters whose modules are Conv1D.
        """
        if conv1d:
            raise Refused(f"{self.title} takes no LoRA on Conv1D modules, as {conv1d[0]} has (fan_in_fan_out)")
        if self.highest_rank is not None and rank > self.highest_rank:
            raise Refused(
                f"{self.program} serves ranks up to {self.highest_rank}, but this result has rank {rank}",
                hint="give a lower --rank",
            )

    def zeros(self, modules: Collection[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The modules that must be added as zeros so that all of `modules` load, with their shapes (out, in).

        Args:
            shapes: the shape of every known module.

        Raises Refused if the shape of a module to add is not known.
        """
        return {}

    def misread(self, modules: Collection[str], known: Collection[str]) -> str:
        """How the program reads a result with these modules otherwise than PEFT does, "" if it does not.

        Args:
            known: all modules of the parents. Modules that they lack too were not lost in the merge.
        """
        return ""

    def not_surely_served(self, modules: Iterable[str]) -> list[str]:
        """The kinds of modules that the program may have no LoRA layer for."""
        return sorted(leaves(modules) - _LLAMA_MODULES)

    def serve_line(self, base: str, folder: Path, rank: int) -> str:
        """The shell line that serves the adapter on `base`, a Hub id or a folder; quoted, whatever their names hold.

        An id may carry its revision: `owner/name@revision`.
        """
        model, revision = split_revision(base)
        return shlex.join(self.command([model, *(["--revision", revision] if revision else [])], folder, rank))

    @abstractmethod
    def command(self, base: Sequence[str], folder: Path, rank: int) -> list[str]:
        """The words of the shell line; `base` are those for the base model, its revision among them."""


def named_path(folder: Path, name_key: str, path_key: str) -> str:
    """An adapter's NAME=PATH; JSON with these keys if a server would split it at another place.

    Both servers split at an equals sign, vLLM also at commas.
    """
    name, path = folder.name, str(folder.absolute())
    plain = f"{name}={path}"
    if plain.count("=") == 1 and "," not in plain and not name.startswith(("-", "{")):
        return plain
    return json.dumps({name_key: name, path_key: path})


def export(name: str) -> Export:
    """The program called `name`, as its file is."""
    found: Export = member(__name__, name)
    return found


def exports() -> list[Export]:
    """Every program of the folder."""
    return [export(name) for name in file_names(__name__)]
