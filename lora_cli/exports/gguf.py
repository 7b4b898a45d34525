"""llama.cpp, by the rules of November 2026: one GGUF file, scale = `adapter.lora.alpha` / the rank of the tensors.

The rows of q and k are in llama.cpp's order. alpha is the one of most modules, and B takes what is left of other
scales, so that modules may keep ranks of their own.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from struct import pack, unpack
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_cli.errors import Refused
from lora_cli.escapes import safe
from lora_cli.exports import Export, Plan, Reader, Source, Written
from lora_cli.files import read_regular
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.gguf import Base, base_of, is_plain, package
from lora_cli.hashes import hashed_as_written, opened_as
from lora_cli.imports._gguf_file import read_gguf
from lora_cli.imports.gguf import arranged_back
from lora_cli.precision import STORED
from lora_cli.records import Progress
from lora_cli.text import shortened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_cli.formats.reader import OpenAdapter

FILE = "adapter.gguf"
_HEADER_BYTES = 256
_ALIGNMENT = 32
"""Every tensor begins at a multiple of these bytes where a file says nothing else."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufPlan(Plan):
    """One GGUF file. `tensors` are the names of the modules' weights in it."""

    source: Source
    base: Base
    alpha: float
    tensors: Mapping[str, str]
    dtype: str
    notes: tuple[str, ...] = ()

    @cached_property
    def folds(self) -> Mapping[str, float]:  # type: ignore[override]
        alphas = alphas_of(self.source)
        return {module: 1.0 if alpha == self.alpha else alpha / self.alpha for module, alpha in alphas.items()}

    @property
    def files(self) -> Mapping[str, int]:
        return {FILE: self.bytes_of(self.numbers) + _HEADER_BYTES * len(self.tensors)}

    def write(self, folder: Path, progress: Progress) -> None:
        header = self._header(folder / FILE)
        with hashed_as_written(folder / FILE) as file:
            file.write(memoryview(header))
            for module, b, a in self.each(progress):
                heads = self.base.parts(module)
                for bits in (a.bits, rearranged(b.bits, heads) if heads else b.bits):
                    file.write(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
                    file.write(memoryview(bytes(-bits.nbytes % _ALIGNMENT)))

    def _header(self, path: Path) -> bytes:
        """All before the first tensor, by the gguf package, which writes it to `path`."""
        gguf = package()
        writer = gguf.GGUFWriter(path, self.base.architecture.name)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_string(gguf.Keys.General.NAME, safe(self.source.adapter.ref.pinned))
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, self.alpha)
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, safe(split_revision(self.source.base)[0]))
            raw = gguf.GGMLQuantizationType[self.dtype]
            for module, name in self.tensors.items():
                (rows, columns), rank = self.source.adapter.shape(module), self.source.ranks[module]
                for side, shape in (("a", (rank, columns)), ("b", (rows, rank))):
                    size = self.bytes_of(shape[0] * shape[1])
                    writer.add_tensor_info(f"{name}.lora_{side}", shape, None, size, raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        header = read_regular(path)
        return header + bytes(-len(header) % _ALIGNMENT)

    @contextmanager
    def opened(self, folder: Path) -> Iterator[Reader]:
        from lora_cli.formats.reader import Factors, read_stored

        values, held = read_gguf(folder / FILE)
        alpha = float(values[package().Keys.Adapter.LORA_ALPHA])
        with opened_as(held.path, held.stamp, f"{held.path}: its tensors") as file:

            def read(module: str) -> Written:
                names = (f"{self.tensors[module]}.lora_{side}" for side in "ab")
                a, b = (read_stored(file.fileno(), held.header.tensors[name]).numbers for name in names)
                heads = self.base.parts(module)
                return Written(Factors(arranged_back(b, heads) if heads else b, a), alpha / b.shape[1])

            yield read


class Gguf(Export):
    """llama.cpp, and programs that are built on it."""

    program = "llama.cpp"
    version = "of November 2026"

    def sure(self, adapter: "OpenAdapter", config: Mapping[str, Any]) -> bool:
        return is_plain(adapter, config)

    def plan(self, source: Source, dtype: str) -> Plan:
        return plan(source, dtype, self.title)


def plan(source: Source, dtype: str, program: str) -> GgufPlan:
    """The file for an adapter. Refused for what llama.cpp cannot hold, by name, with the name of the program."""
    if not source.config:
        raise Refused(
            f"{program}: the names of layers depend on the base's config.json, and that of {source.base} is not here",
            hint="give the base's folder or Hub id: --base",
        )
    source.demand_linear(program)
    base = base_of(source.config, source.base, of_class="" if source.skeleton is None else source.skeleton.architecture)
    tensors = _tensors(source, base, program)
    alphas = Counter(alpha for alpha in alphas_of(source).values() if alpha and _is_fp32(alpha))
    alpha = alphas.most_common(1)[0][0] if alphas else float(source.rank)
    for module in source.modules:
        rows = source.adapter.shape(module)[0]
        if (heads := base.parts(module)) and rows % (2 * heads):
            raise Refused(f"{source.id}: the {rows} rows of {module} are not those of {heads} heads")
    precision = STORED["fp32" if dtype == "auto" else dtype]
    return GgufPlan(source=source, base=base, alpha=alpha, tensors=tensors, dtype=precision)


def _tensors(source: Source, base: Base, program: str) -> dict[str, str]:
    names, found = base.names(), dict[str, str]()
    for module in source.modules:
        if source.skeleton is not None and (other := source.skeleton.ties.get(module)):
            raise Refused(
                f"{source.id}: {module} has the weight of {other[0]}, and {program} loads no update of it",
                hint="leave it out: lora merge ADAPTER --scope modules=… keeps the others",
            )
        name = names.of(module)
        if name is None or not name.endswith(".weight"):
            raise Refused(
                f"{source.id}: {program} has no name for {shortened(module)} of a {base.architecture.name}",
                hint="leave it out: lora merge ADAPTER --scope modules=… keeps the others",
            )
        if name in found.values():
            raise Refused(f"{source.id}: {module} and another module are both {name} in {program}")
        found[module] = name
    return found


def alphas_of(source: Source) -> dict[str, float]:
    """The alpha of each module: its scale times its rank."""
    return {module: source.adapter.scales[module] * rank for module, rank in source.ranks.items()}


def rearranged(b: "NDArray[Any]", heads: int) -> "NDArray[Any]":
    """The rows of B (out, r) in llama.cpp's order, for a module whose rows are those of `heads` heads.

    The inverse of `arranged_back`.
    """
    return b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _is_fp32(value: float) -> bool:
    return bool(unpack("<f", pack("<f", value))[0] == value)


gguf = Gguf()
