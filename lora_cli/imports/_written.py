"""A foreign adapter becomes a PEFT folder of one rank: alpha = s·rank if all modules have scale s, else alpha = rank.

Where they have one scale and no rank is asked for, the factors are copied bit for bit. Everything else is computed in
float64 and written in fp32, or in the precision that was asked for.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_cli.algebra.lowrank import LowRank, RankChoice, inner, reduce
from lora_cli.errors import Refused
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.layout import Layout, Place
from lora_cli.formats.reader import natural
from lora_cli.formats.writer import AdapterWriter, TensorStream, base_entries
from lora_cli.hashes import opened_as
from lora_cli.imports import Foreign, ForeignModule
from lora_cli.precision import stored_as, torch_dtype
from lora_cli.records import Progress, silent

HIGHEST_RANK: Final = 512
"""The highest rank that is written without being asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How a foreign adapter is written: `rank` is the highest rank asked for, `dtype` the user's choice or "auto"."""

    foreign: Foreign
    rank: int | None = None
    dtype: str = "auto"

    @property
    def reduced(self) -> bool:
        """Whether some module has more ranks than were asked for."""
        return self.rank is not None and any(one.rank > self.rank for one in self.foreign.modules.values())

    @property
    def scale(self) -> float | None:
        """The scale of every module, None where they differ or have to go into the factors."""
        scales = {one.scale for one in self.foreign.modules.values()}
        computed = self.reduced or any(one.computed for one in self.foreign.modules.values())
        return scales.pop() if len(scales) == 1 and not computed else None

    @property
    def precision(self) -> torch.dtype:
        """The precision on disk: that of the file where its factors stay as they are, else fp32."""
        if self.dtype != "auto":
            return torch_dtype(self.dtype)
        if self.scale is None:
            return torch.float32
        found = torch_dtype(min(self.foreign.dtypes))
        for name in self.foreign.dtypes:
            found = torch.promote_types(found, torch_dtype(name))
        return found

    @property
    def exact(self) -> bool:
        """Whether the factors are those of the file, bit for bit."""
        if self.foreign.copied:
            return True
        return self.scale is not None and all(
            torch.promote_types(torch_dtype(name), self.precision) == self.precision for name in self.foreign.dtypes
        )

    def demand_low_rank(self) -> None:
        """Refused for ranks that no program serves, unless a rank is asked for."""
        highest = max((one.rank for one in self.foreign.modules.values()), default=0)
        if self.rank is None and highest > HIGHEST_RANK:
            raise Refused(
                f"as a LoRA it has rank {highest}, more than {HIGHEST_RANK}",
                hint="lora convert --rank R writes its best approximation of that rank, and tells the error",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A module as it was written: its rank, and the squared norms of its update and of what was kept of it."""

    rank: int
    total: float
    kept: float

    @property
    def error(self) -> float:
        """‖ΔW − written‖ / ‖ΔW‖."""
        return math.sqrt(max(0.0, 1 - self.kept / self.total)) if self.total else 0.0


def write(conversion: Conversion, folder: Path, progress: Progress = silent) -> Mapping[str, Converted]:
    """Write the two files of PEFT into an existing folder, a module at a time, and return what became of each.

    Raises:
        Refused: NaN, Inf or an overflow; a file that changed; an update that is zero.
    """
    foreign = conversion.foreign
    if foreign.copied:
        _copy(foreign, folder, progress)
        return {}
    names = natural(foreign.modules)
    places = [
        Place(PREFIX + name, (name,), one.shape, name, kind=one.kind, kernel=one.kernel)
        for name, one in ((name, foreign.modules[name]) for name in names)
    ]
    layout, scale, found = Layout(tuple(places)), conversion.scale, dict[str, Converted]()
    with AdapterWriter(folder, layout, stored_as(conversion.precision)) as writer:
        for done, name in enumerate(names):
            progress("convert", done, len(names))
            update, found[name] = _update(foreign.modules[name], conversion.rank, fold=scale is None)
            writer.add(name, update)
        progress("convert", len(names), len(names))
        if writer.empty or not any(one.total for one in found.values()):
            raise Refused("it changes nothing: a factor of every module is zero", hint="leave this adapter out")
        alpha = {} if scale is None else {"lora_alpha": _whole(scale * max(writer.ranks.values()))}
        writer.finish({**_config(foreign), **layout.targets(None), **alpha})
    return found


def _copy(foreign: Foreign, folder: Path, progress: Progress) -> None:
    """Write tensors that are PEFT's already into one file, unchanged, and their configuration beside it."""
    with TensorStream(folder / WEIGHTS_NAME, [*foreign.copied], "F32") as stream:
        for done, (name, (file, entry)) in enumerate(foreign.copied.items()):
            progress("convert", done, len(foreign.copied))
            with opened_as(file.path, file.stamp, f"{file.path}: its weights") as opened:
                stream.copy(name, entry, opened)
        stream.finish()
    text = json.dumps(foreign.config, indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _update(module: ForeignModule, rank: int | None, *, fold: bool) -> tuple[LowRank, Converted]:
    """The update as it is written, its scale in B where `fold`; and what became of it."""
    square = module.scale**2
    if rank is not None and module.rank > rank:
        if module.best is not None:
            update, total, kept = module.best(rank)
        else:
            reduced = reduce(module.read().to(torch.float64), RankChoice(ceiling=rank))
            update, total, kept = reduced.update, reduced.total, reduced.kept
        update = update.to(torch.float64).scaled(module.scale)
        return update, Converted(rank=update.rank, total=total * square, kept=kept * square)
    update = module.read()
    total = float(inner(update, update)) * square
    if fold:
        update = update.to(torch.float64).scaled(module.scale)
    return update, Converted(rank=update.rank, total=total, kept=total)


def _config(foreign: Foreign) -> dict[str, Any]:
    base = base_entries(foreign.base) if foreign.base else {"base_model_name_or_path": None}
    return {**base, **foreign.config}


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
