"""GGUF adapters, as llama.cpp's convert_lora_to_gguf.py writes them and llama.cpp applies them.

`NAME.weight.lora_a` is (r, in) and `NAME.weight.lora_b` (out, r), names being those of llama.cpp; ΔW = alpha/r·B·A with
the tensor's own rank r, or B·A where the file gives no alpha. For models of the architecture `llama` the converter
orders the rows of q_proj and k_proj so that the two halves of each head alternate; they are put back here.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lora_cli.errors import DataError, HeaderError, Refused
from lora_cli.files import read_regular
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_json
from lora_cli.formats.gguf import package
from lora_cli.imports import (
    SAFETENSORS,
    Asked,
    Foreign,
    ForeignModule,
    Found,
    Import,
    Place,
    Tensors,
    demand_some,
    others_in_words,
)
from lora_cli.imports._gguf_file import read_gguf
from lora_cli.imports._pairs import demand_matrices, dtypes_of, paired
from lora_cli.text import shortened

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_cli.algebra.lowrank import LowRank

Rows = TypeVar("Rows", "Tensor", "NDArray[Any]")

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
"""The architectures of llama.cpp whose modules have the names of Llama's in transformers, one tensor each."""
_ENDS = (".weight.lora_a", ".weight.lora_b")
_LAYER = re.compile(r"blk\.(\d{1,4})\..+")
_OURS = re.compile(r"model\.layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj")


class Gguf(Import):
    """An adapter in a GGUF file."""

    program = "an adapter of llama.cpp (GGUF)"

    def recognises(self, place: Place) -> tuple[str, ...]:
        found = [name for name in place.names if name.endswith(".gguf")]
        if place.one or len(found) != 1:
            return tuple(found) if place.one else ()
        # A folder may hold a model as well, and a broken file beside another program's adapter.
        try:
            kind = read_gguf(place.folder / found[0]).values.get("general.type")
        except (HeaderError, DataError):
            return () if any(name.endswith(SAFETENSORS) for name in place.names) else (found[0],)
        return (found[0],) if kind == "adapter" else ()

    def open(self, found: Found, asked: Asked) -> Foreign:
        values, file = read_gguf(found.place.folder / found.weights[0])
        kind, form = values.get("general.type"), values.get("adapter.type")
        if kind != "adapter":
            raise Refused(f"a GGUF file of type {shortened(kind or 'model')}, not an adapter")
        if form != "lora":
            raise Refused(f"an adapter of type {shortened(form)}, not lora")
        if "adapter.alora.invocation_tokens" in values:
            raise Refused("aLoRA: the update acts only after its invocation tokens")
        architecture = str(values.get("general.architecture"))
        pairs, others = paired(file.header.tensors, _ENDS)
        if others:
            raise Refused(f"tensors that are no factors: {others_in_words(others)}")
        alpha = values.get("adapter.lora.alpha", 0.0)
        if isinstance(alpha, str) or not abs(alpha) < 1e30:
            raise Refused(f"its alpha is {shortened(repr(alpha))}, not a number")
        names = _names(architecture, pairs)
        heads = _Heads(asked)
        modules: dict[str, ForeignModule] = {}
        for theirs, (a, b) in pairs.items():
            one, other = file.header.tensors[a], file.header.tensors[b]
            demand_matrices(one, other)
            if one.shape[0] != other.shape[1]:
                raise Refused(f"{shortened(theirs)} has rank {one.shape[0]} in lora_a but {other.shape[1]} in lora_b")
            rank, module = one.shape[0], names[theirs]
            back = heads.order(module, other.shape[0]) if architecture == "llama" else None
            scale = float(alpha) / rank if alpha else 1.0
            modules[module] = ForeignModule((other.shape[0], one.shape[1]), rank, _reader(file, a, b, back), scale)
        demand_some(modules)
        notes = () if alpha else ("it gives no alpha: llama.cpp applies it at scale 1",)
        return Foreign(self.program, modules, dtypes_of(file, pairs), base=asked.base, notes=notes)


def _reader(file: Tensors, a: str, b: str, order: "Callable[[Tensor], Tensor] | None") -> "Callable[[], LowRank]":
    def read() -> "LowRank":
        from lora_cli.algebra.lowrank import LowRank

        rows = file.read(b)
        return LowRank(rows if order is None else order(rows), file.read(a))

    return read


def arranged_back(b: Rows, heads: int) -> Rows:
    """The rows of B (out, r) in transformers' order, for a module whose rows are those of `heads` heads."""
    return b.reshape(heads, b.shape[0] // heads // 2, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


class _Heads:
    """The heads of the base, by which llama.cpp's converter orders rows."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._config: dict[str, Any] | None = None

    def order(self, module: str, rows: int) -> "Callable[[Tensor], Tensor] | None":
        """The function that puts the rows of a module's B back; None where they were never ordered otherwise."""
        if not module.endswith((".q_proj", ".k_proj")):
            return None
        heads = self._count("num_attention_heads")
        if module.endswith(".k_proj"):
            heads = self._count("num_key_value_heads", heads)
        if rows % (2 * heads):
            raise Refused(
                f"{module} has {rows} rows, which are no {heads} heads",
                hint="give the base model that the adapter was trained on: --base",
            )
        return partial(arranged_back, heads=heads)

    def _count(self, key: str, otherwise: int = 0) -> int:
        value = self._read().get(key) or otherwise
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**16:
            raise Refused(f"{key} of the base model is {shortened(value)}: the order of rows is not known")
        return value

    def _read(self) -> dict[str, Any]:
        if self._config is None:
            if self._asked.folder is None:
                raise Refused(
                    "the rows of q_proj and k_proj are ordered by the heads of the base model, which it does not hold",
                    hint="lora convert FILE --base BASE, a folder or an id whose config.json is on this machine",
                )
            try:
                self._config = parse_json(read_regular(self._asked.folder / "config.json", MAX_CONFIG_BYTES))
            except OSError as error:
                raise Refused(f"config.json of the base model cannot be read ({error.strerror})") from error
        return self._config


def _names(architecture: str, theirs: "dict[str, tuple[str, str]]") -> dict[str, str]:
    """The names in transformers of llama.cpp's modules, by the tables of the `gguf` package."""
    if architecture not in ARCHITECTURES:
        raise Refused(
            f"the architecture {shortened(architecture)} arranges or names its modules in a way of its own",
            hint=f"read are {', '.join(ARCHITECTURES)}",
        )
    tables = package()
    numbers = [int(found[1]) for name in theirs if (found := _LAYER.fullmatch(name))]
    known = {name: key for key, name in tables.MODEL_ARCH_NAMES.items()}
    table = tables.get_tensor_name_map(known[architecture], max(numbers, default=0) + 1)
    ours = {found: ours for ours, (_, found) in table.mapping.items() if _OURS.fullmatch(ours) or ours == "lm_head"}
    for name in theirs:
        if name not in ours:
            raise Refused(f"{shortened(name)} is an embedding, a stack of experts or no one module in transformers")
    return {name: ours[name] for name in theirs}


gguf = Gguf()
