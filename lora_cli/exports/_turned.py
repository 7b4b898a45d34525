"""An export as one safetensors file whose factors are stored transposed: A (in, r) and B (r, out)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.exports import Plan, Reader, Source, Written, folds_of, precision_of
from lora_cli.formats.writer import TensorStream
from lora_cli.imports import Tensors
from lora_cli.records import Progress

Names = Callable[[str], tuple[str, str]]
"""The names of A and B of a module."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TurnedPlan(Plan):
    """One file `name` with transposed factors of one rank, and `texts` beside it.

    The program multiplies B·A by `outside`. `names` gives the names of the tensors.
    """

    source: Source
    outside: float
    dtype: torch.dtype
    name: str
    names: Names
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        source: Source,
        dtype: str,
        *,
        outside: float,
        name: str,
        names: Names,
        texts: Mapping[str, str] | None = None,
    ) -> "TurnedPlan":
        """The plan for an adapter."""
        precision = precision_of(source, folds_of(source, outside), dtype)
        return cls(source=source, outside=outside, dtype=precision, name=name, names=names, texts=texts or {})

    @cached_property
    def folds(self) -> Mapping[str, float]:  # type: ignore[override]
        return folds_of(self.source, self.outside)

    @property
    def files(self) -> Mapping[str, int]:
        rows = sum(sum(self.source.adapter.shape(module)) for module in self.source.modules)
        texts = {name: len(text.encode()) for name, text in self.texts.items()}
        return {self.name: rows * self.source.rank * self.dtype.itemsize, **texts}

    def write(self, folder: Path, progress: Progress) -> None:
        names = [name for module in self.source.modules for name in self.names(module)]
        with TensorStream(folder / self.name, names, self.dtype) as stream:
            for module, factors in self.each(progress):
                a, b = self.names(module)
                stream.add(a, _filled(factors.A.T, 1, self.source.rank))
                stream.add(b, _filled(factors.B.T, 0, self.source.rank))
            stream.finish()
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    @contextmanager
    def opened(self, folder: Path) -> Iterator[Reader]:
        file = Tensors.of(folder / self.name)

        def read(module: str) -> Written:
            a, b = map(file.read, self.names(module))
            return Written(LowRank(b.T, a.T), self.outside)

        yield read


def _filled(factor: Tensor, dim: int, rank: int) -> Tensor:
    """A factor with zeros behind its ranks (dimension `dim`) up to `rank`."""
    if factor.shape[dim] == rank:
        return factor
    more = list(factor.shape)
    more[dim] = rank - more[dim]
    return torch.cat([factor, factor.new_zeros(more)], dim)
