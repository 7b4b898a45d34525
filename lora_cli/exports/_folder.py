"""An export as a PEFT folder of one rank: the scale in lora_alpha where no number has to change for it, else in B."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.exports import Plan, Reader, Shape, Source, Written, folds_of, precision_of
from lora_cli.files import read_regular
from lora_cli.formats.config import parse_config
from lora_cli.formats.facts import TASKS_WITH_A_HEAD
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.layout import Layout, layout
from lora_cli.formats.reader import Factors
from lora_cli.formats.skeleton import OWN
from lora_cli.formats.writer import AdapterWriter, base_entries
from lora_cli.imports import Tensors
from lora_cli.records import Progress

_TEXT_BYTES = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderPlan(Plan):
    """The two files of PEFT. The program multiplies B·A by `outside` = lora_alpha / rank.

    `scaled` is false for a program that does not read the configuration: it multiplies by 1.
    """

    source: Source
    outside: float
    dtype: str
    zeros: Mapping[str, Shape] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scaled: bool = True

    @classmethod
    def of(
        cls,
        source: Source,
        dtype: str,
        *,
        zeros: Mapping[str, Shape] | None = None,
        notes: tuple[str, ...] = (),
        scaled: bool = True,
    ) -> "FolderPlan":
        """The plan for an adapter."""
        scale = source.scale
        whole = scaled and scale is not None and float(scale * source.rank).is_integer()
        outside = scale if whole and scale is not None else 1.0
        precision = precision_of(source, folds_of(source, outside), dtype)
        return cls(source=source, outside=outside, dtype=precision, zeros=zeros or {}, notes=notes, scaled=scaled)

    @cached_property
    def folds(self) -> Mapping[str, float]:  # type: ignore[override]
        return folds_of(self.source, self.outside)

    @cached_property
    def layout(self) -> Layout:
        """The places of the factors."""
        adapter = self.source.adapter
        known = {module: adapter.shape(module) for module in self.source.modules}
        modules = {module: adapter.modules[module] for module in self.source.modules}
        return layout(modules, self.source.skeleton, known=known, zeros=self.zeros).spelled(adapter.spelling)

    @property
    def files(self) -> Mapping[str, int]:
        rows = sum(sum(place.shape) * len(place.modules) for place in self.layout.places)
        return {WEIGHTS_NAME: self.bytes_of(rows * self.source.rank), CONFIG_NAME: _TEXT_BYTES}

    def write(self, folder: Path, progress: Progress) -> None:
        with AdapterWriter(folder, self.layout, self.dtype) as writer:
            for module, b, a in self.each(progress):
                writer.put(module, b, a)
            writer.finish(self._config())

    def _config(self) -> dict[str, Any]:
        adapter = self.source.adapter
        task = adapter.config.task_type
        known = self.source.meant if adapter.spelling == OWN else None
        alpha = self.outside * self.source.rank
        trained = adapter.config.trained_class if adapter.spelling != OWN else ""
        mapping = {"base_model_class": trained, "parent_library": "transformers"}
        return {
            **base_entries(self.source.base),
            "fan_in_fan_out": adapter.fan_in_fan_out,
            "task_type": None if task in TASKS_WITH_A_HEAD else task or None,
            "lora_alpha": int(alpha),
            **self.layout.targets(known),
            **({"auto_mapping": mapping} if trained.isidentifier() else {}),
        }

    @contextmanager
    def opened(self, folder: Path) -> Iterator[Reader]:
        file = Tensors.of(folder / WEIGHTS_NAME)
        config = parse_config(read_regular(folder / CONFIG_NAME))

        def read(module: str) -> Written:
            place = self.layout.of[module]
            both = (file.stored(name).numbers for name in place.names)
            a, b = (one.reshape(len(one), -1) for one in both)
            if len(place.modules) > 1:
                at, rank = place.modules.index(module), a.shape[0] // len(place.modules)
                a, b = a[at * rank : (at + 1) * rank], b.reshape(b.shape[0], rank, -1)[:, :, at]
            return Written(Factors(b, a), config.scale(place.target, a.shape[0]) if self.scaled else 1.0)

        yield read
