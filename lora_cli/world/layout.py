"""The parts of a world and their places on the disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Size = Literal["small", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAdapter:
    """One adapter of the pool: `name` is `author/name`, its folder below the pool.

    It was trained on `task`. `exact_match` and `base_exact_match` are shares of 100 fresh examples of that task
    which the adapter and the bare base model answer right. `problem` is empty for a usable adapter, else it names
    the deliberate fault, and the two shares are 0.
    """

    name: str
    task: str
    rank: int
    target_modules: tuple[str, ...]
    exact_match: float
    base_exact_match: float
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One task to fit and evaluate on. `relevant` names the adapters of the pool that were trained on the same task."""

    name: str
    kind: Literal["relevant", "none"]
    train: Path
    test: Path
    relevant: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A finished world. `base_name` is the model that the adapters declare; `base` is the folder that holds it.

    `targets[0]` is the main target: `task.jsonl` is its training data and `lora.toml` names its test data.
    """

    folder: Path
    size: Size
    seed: int
    base_name: str
    adapters: tuple[PoolAdapter, ...]
    targets: tuple[Target, ...]

    @property
    def base(self) -> Path:
        """The trained base model, as transformers saves it."""
        return self.folder / "base"

    @property
    def pool(self) -> Path:
        """The folder tree `author/name/` of adapters, as PEFT saves them."""
        return self.folder / "pool"

    @property
    def usable(self) -> tuple[PoolAdapter, ...]:
        """The adapters of the pool without a deliberate fault."""
        return tuple(adapter for adapter in self.adapters if not adapter.problem)
