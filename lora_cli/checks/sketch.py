"""A sketch of an adapter's whole update: 2,048 numbers whose angles are those of updates, nearly. numpy, not torch.

Every entry (i, j) of ΔW in every module is added, with a sign, to one of SIZE places. Place and sign of an entry are
the sum and the product of those of its row and of its column, which hashes of the module's name draw. So the sketch of
s·B·A is a sum of circular convolutions of sketched columns of B and rows of A: O(r (out + in) + r SIZE log SIZE) a
module, without ΔW. Source: TensorSketch, Pham and Pagh (2013); its error, Avron, Nguyen and Woodruff (2014).
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.checks.weights import rows_of, stored_factors
from lora_cli.errors import Refused
from lora_cli.files import open_regular
from lora_cli.formats.factors import ModuleFactors
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.header import Header
from lora_cli.formats.modules import locate_modules
from lora_cli.formats.skeleton import Skeleton

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SIZE: Final = 2048
"""Numbers in a sketch; a power of two."""
ERROR: Final = 0.022
"""The standard error 1/√SIZE of the cosine of unrelated updates; that of a cosine c is about (1 − c²)/√SIZE.

It holds for updates of many directions. Two of one direction each in one module, with a shared row or column space, are
off by up to 3.3 times as much (√11/√SIZE).
"""

_VERSION = "lora sketch 1"
_Numbers = NDArray[np.float64]


class Sketch(NamedTuple):
    """The sketch of an adapter's update: `numbers` (SIZE,) float16, of length √SIZE, all zero for an update of zero.

    `content` names what it was made from: the bytes of the weights, the configuration, and whether the names of
    modules are the base's, which `by_base` repeats. Only sketches of one `by_base` can be compared.
    """

    content: str
    by_base: bool
    numbers: NDArray[np.float16]


def content_of(weights_sha256: str, config: bytes, skeleton: Skeleton | None) -> str:
    """The name of what a sketch is made from, 64 hex digits."""
    said = f"{_VERSION}\n{weights_sha256}\n{hashlib.sha256(config).hexdigest()}\n{skeleton is not None}"
    return hashlib.sha256(said.encode()).hexdigest()


def sketch(
    path: Path, header: Header, config: LoraConfigFacts, skeleton: Skeleton | None = None
) -> NDArray[np.float16]:
    """The `numbers` of the Sketch of an adapter's file.

    The cosine of two sketches estimates that of the whole updates to `ERROR`; a module that an adapter lacks counts as
    zero. Equal updates have equal sketches but for rounding, whatever their factors. Memory: the A of one place in the
    file, and 4 MiB of its B.

    Refused for NaN or Inf, and as `scan_weights` refuses.
    """
    located = locate_modules(config, header, skeleton)
    wanted: dict[str, list[_Part]] = {}
    for whole in located.modules.values():
        for part, row in zip(whole.parts, whole.rows, strict=True):
            wanted.setdefault(part.a.name, []).append(_Part(whole.module, whole.out_features, row, part.expert))
    found = np.zeros(SIZE // 2 + 1, np.complex128)
    with open_regular(path) as file:
        for place, factors in stored_factors(located.modules.values()).items():
            scale = config.scale(factors.pattern, factors.rank)
            for rows, columns in _sums(file, factors, wanted[place]):
                found += scale * (np.fft.rfft(rows, axis=0) * np.fft.rfft(columns, axis=0)).sum(1)
    numbers = np.fft.irfft(found, SIZE)
    if not np.isfinite(numbers).all():
        raise Refused(f"{path.name}: NaN or Inf in its update")
    largest = np.abs(numbers).max()
    numbers = numbers / largest if largest else numbers
    norm = np.linalg.norm(numbers)
    return (numbers * (SIZE**0.5 / norm) if norm else numbers).astype(np.float16)


class _Part(NamedTuple):
    """The matrix that factors in a file are for: its name, rows in all, their first row in it, and their expert."""

    module: str
    rows: int
    first: int
    expert: int


def _sums(file: BufferedReader, factors: ModuleFactors, parts: Sequence[_Part]) -> Iterator[tuple[_Numbers, _Numbers]]:
    """For each part the sketched columns of B and rows of A, (SIZE, rank) each."""
    sums = np.zeros((len(parts), SIZE, factors.rank))
    first = 0
    for chunk in rows_of(file, factors.b):
        by_expert = chunk.reshape(len(chunk), factors.rank, factors.experts)
        for total, part in zip(sums, parts, strict=True):
            total += (
                _places("out", part.module, part.rows, part.first + first, len(chunk)) @ by_expert[..., part.expert]
            )
        first += len(chunk)
    a = np.concatenate([*rows_of(file, factors.a)]).reshape(factors.experts, factors.rank, -1)
    for total, part in zip(sums, parts, strict=True):
        yield total, _places("in", part.module, a.shape[2], 0, a.shape[2]) @ a[part.expert].T


@lru_cache(maxsize=2048)
def _places(side: str, module: str, total: int, start: int, count: int) -> "csr_array":
    """The places and signs of rows or columns `start` … `start + count - 1` of a module's `total`, (SIZE, count).

    They are bits of SHAKE-256 of the module's name.
    """
    from scipy.sparse import csr_array

    name = f"{_VERSION}\n{side}\n{module}".encode("utf-8", "backslashreplace")
    words = np.frombuffer(hashlib.shake_256(name).digest(4 * total), "<u4")[start : start + count]
    signs = np.where(words >> 31, -1.0, 1.0)
    return csr_array((signs, (words & (SIZE - 1), np.arange(count))), shape=(SIZE, count))
