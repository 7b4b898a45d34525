"""LoKr of PEFT: ΔW = alpha/r · w1 ⊗ w2, each whole or the product of two factors (arXiv 2212.10650).

With w1 = P1·Q1 and w2 = P2·Q2, ΔW = (P1 ⊗ P2)·(Q1 ⊗ Q2): a LoRA of rank ρ1·ρ2. The singular values of a Kronecker
product are the products of those of its parts, so that the best lower rank is found from two small matrices.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_cli.errors import Refused
from lora_cli.imports import Asked, Foreign, ForeignModule, Found, Tensors
from lora_cli.imports._pairs import demand_matrices
from lora_cli.imports._peft_types import PeftType, by_module, one_of, settings_of
from lora_cli.text import shortened

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.algebra.lowrank import LowRank

_KINDS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class Lokr(PeftType):
    """LoKr of PEFT."""

    program = "a LoKr of PEFT"
    peft_type = "LOKR"

    def open(self, found: Found, asked: Asked) -> Foreign:
        file, settings = found.tensors, settings_of(found.place.config)
        modules = {}
        for module, tensors in by_module(file.header.tensors, _KINDS).items():
            if "lokr_t2" in tensors:
                raise Refused(f"{shortened(module)} is a convolution with a core of its own (use_effective_conv2d)")
            one, other = (_Part(file, tensors, side, module) for side in ("w1", "w2"))
            shape = (one.shape[0] * other.shape[0], one.shape[1] * other.shape[1])
            # PEFT divides by r also where neither side has factors.
            rank = settings.rank_of(module)
            modules[module] = ForeignModule(
                shape,
                one.rank * other.rank,
                _reader(one, other),
                settings.scale(module, rank),
                computed=True,
                best=_best(one, other),
            )
        return self.foreign(modules, found.place, asked)


class _Part:
    """One side of a Kronecker product: a matrix of `shape` and of rank `rank` at most, whole or in two factors."""

    def __init__(self, file: Tensors, tensors: Mapping[str, str], side: str, module: str) -> None:
        whole = f"lokr_{side}"
        kinds = (whole,) if whole in tensors else (f"{whole}_a", f"{whole}_b")
        self._file, self._names = file, one_of(tensors, kinds, module)
        entries = [file.header.tensors[name] for name in self._names]
        if len(entries[0].shape) > 2:
            raise Refused(f"{shortened(module)} is a convolution, whose kernel stands in {whole}")
        demand_matrices(*entries)
        self.shape = (entries[0].shape[0], entries[-1].shape[1])
        self.rank = min(self.shape)
        if len(entries) == 2:
            if entries[0].shape[1] != entries[1].shape[0]:
                raise Refused(f"the factors of {shortened(module)} do not fit together")
            self.rank = entries[0].shape[1]

    def factors(self) -> "tuple[Tensor, Tensor]":
        """P (rows, rank) and Q (rank, columns) in float64."""
        import torch

        found = [self._file.read(name, torch.float64) for name in self._names]
        if len(found) == 2:
            return found[0], found[1]
        [matrix] = found
        eye = torch.eye(self.rank, dtype=torch.float64)
        return (eye, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, eye)


def _reader(one: _Part, other: _Part) -> "Callable[[], LowRank]":
    def read() -> "LowRank":
        import torch

        from lora_cli.algebra.lowrank import LowRank

        (p1, q1), (p2, q2) = one.factors(), other.factors()
        return LowRank(torch.kron(p1, p2), torch.kron(q1, q2))

    return read


def _best(one: _Part, other: _Part) -> "Callable[[int], tuple[LowRank, float, float]]":
    def best(rank: int) -> "tuple[LowRank, float, float]":
        import torch

        from lora_cli.algebra.lowrank import LowRank, svd

        left, right = (svd(LowRank(*part.factors())) for part in (one, other))
        values = torch.outer(left.s, right.s).flatten()  # (ρ1·ρ2)
        order = values.argsort(descending=True, stable=True)[:rank]
        i, j = order // len(right.s), order % len(right.s)
        root = values[order].sqrt()
        # Column k of U is the Kronecker product of column i of the left U with column j of the right one.
        u = (left.U[:, None, i] * right.U[None, :, j]).flatten(0, 1)  # (out, rank)
        v = (left.V[:, None, i] * right.V[None, :, j]).flatten(0, 1)  # (in, rank)
        total = float(values.square().sum())
        return LowRank(u * root, (v * root).T.contiguous()), total, float(values[order].square().sum())

    return best


lokr = Lokr()
