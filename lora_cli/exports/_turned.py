"""An export as one safetensors file whose factors are stored transposed: A (in, r) and B (r, out)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lora_cli.exports import Plan, Reader, Source, Written, folds_of, precision_of
from lora_cli.formats.numbers import StoredTensor
from lora_cli.formats.reader import Factors
from lora_cli.formats.writer import TensorStream, filled_up
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
    dtype: str
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
        return {self.name: self.bytes_of(rows * self.source.rank), **texts}

    def write(self, folder: Path, progress: Progress) -> None:
        names = [name for module in self.source.modules for name in self.names(module)]
        with TensorStream(folder / self.name, names, self.dtype) as stream:
            for module, b, a in self.each(progress):
                name_a, name_b = self.names(module)
                stream.put(name_a, StoredTensor(filled_up(a.bits.T, self.source.rank, 1), a.dtype))
                stream.put(name_b, StoredTensor(filled_up(b.bits.T, self.source.rank, 0), b.dtype))
            stream.finish()
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    @contextmanager
    def opened(self, folder: Path) -> Iterator[Reader]:
        file = Tensors.of(folder / self.name)

        def read(module: str) -> Written:
            a, b = (file.stored(name).numbers.T for name in self.names(module))
            return Written(Factors(b, a), self.outside)

        yield read
