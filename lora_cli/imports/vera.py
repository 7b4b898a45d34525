"""VeRA of PEFT: ΔW = diag(λ_b)·B·diag(λ_d)·A with B and A shared by all modules and cut to each (arXiv 2310.11454).

The shared projections are read from the file. PEFT can also leave them out and draw them again from a key; what a
generator draws is not the same on every machine, so that such a file is refused. The file does not tell the widths of
the modules: they are those of the base model.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_cli.errors import Refused
from lora_cli.imports import Asked, Foreign, ForeignModule, Found, Tensors, demand_floats
from lora_cli.imports._pairs import demand_matrices
from lora_cli.imports._peft_types import PeftType, by_module, one_of
from lora_cli.text import shortened

if TYPE_CHECKING:
    from lora_cli.algebra.lowrank import LowRank

_A, _B = "base_model.vera_A", "base_model.vera_B"
_LAMBDAS = ("vera_lambda_b", "vera_lambda_d")


class Vera(PeftType):
    """VeRA of PEFT."""

    program = "a VeRA of PEFT"
    peft_type = "VERA"

    def open(self, found: Found, asked: Asked) -> Foreign:
        file = found.tensors
        tensors = dict(file.header.tensors)
        a, b = tensors.pop(_A, None), tensors.pop(_B, None)
        if a is None or b is None:
            raise Refused(
                "its shared projections are not in the file, only the key of a random generator (save_projection)",
                hint="save it with save_projection=True",
            )
        demand_matrices(a, b)
        if a.shape[0] != b.shape[1]:
            raise Refused(f"its projections have rank {a.shape[0]} and {b.shape[1]}")
        base = asked.skeleton() if asked.skeleton is not None else None
        if base is None:
            raise Refused(
                "the widths of its modules are those of the base model, which are not in its file",
                hint="lora convert FOLDER --base BASE, a folder or an id whose config.json is on this machine",
            )
        modules = {}
        for module, names in by_module(tensors, _LAMBDAS).items():
            one, other = (tensors[name] for name in one_of(names, _LAMBDAS, module))
            demand_floats((one, other))
            matrix = base.get(module)
            if matrix is None:
                raise Refused(f"{base.architecture} has no module {shortened(module)}")
            out, into = matrix.shape
            if one.shape != (out,) or other.shape != (a.shape[0],) or b.shape[0] < out or a.shape[1] < into:
                raise Refused(f"the vectors of {shortened(module)} do not fit a layer of {out}×{into}")
            reader = _reader(file, (one.name, other.name), (out, into))
            modules[module] = ForeignModule((out, into), a.shape[0], reader, computed=True)
        return self.foreign(modules, found.place, asked)


def _reader(file: Tensors, lambdas: tuple[str, str], shape: tuple[int, int]) -> "Callable[[], LowRank]":
    def read() -> "LowRank":
        import torch

        from lora_cli.algebra.lowrank import LowRank

        of_b, of_d = (file.read(name, torch.float64) for name in lambdas)
        a, b = file.read(_A, torch.float64), file.read(_B, torch.float64)
        return LowRank(of_b[:, None] * b[: shape[0]], of_d[:, None] * a[:, : shape[1]])

    return read


vera = Vera()
