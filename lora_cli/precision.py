"""Precisions: their names for users, in safetensors files, in torch and in config.json. Imports torch when asked."""

from functools import cache
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""A user's choice; each command says what "auto" means there."""
CHOICES: Final[tuple[str, ...]] = get_args(Precision)
Loading = Literal["auto", "fp32", "bf16", "fp16", "4bit"]
"""The same for a base that is loaded: its linear layers may be held in 4 bits."""
LOADED: Final[tuple[str, ...]] = get_args(Loading)
FOUR_BIT: Final = "4bit"

STORED: Final = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The name in a safetensors file of each precision that a user can choose."""
BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per number of every type that the safetensors library reads."""
FLOATS: Final = ("BF16", "F16", "F32", "F64")
"""The types of a weight to which an update can be added."""
EPSILON: Final = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-52}
"""The distance from 1 to the next number of each of `FLOATS`."""
FLOATS8: Final = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FACTORS: Final = (*FLOATS, *FLOATS8)
"""The types that PEFT turns into fp32 factors: all that this tool computes with."""

# As torch names them, and config.json.
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_STORED_OF_TORCH = {theirs: stored for stored, theirs in _TORCH.items()}
_CHOICE_OF_STORED = {stored: choice for choice, stored in STORED.items()}


def in_config(name: str) -> str:
    """The name in config.json of a user's choice or of a type in a file: float32 for fp32 and for F32."""
    return _TORCH[STORED.get(name, name)]


def remedy(used: str, otherwise: str) -> str:
    """The hint for numbers that are not finite: fp16 alone has a narrower range than other precisions."""
    return f"try --dtype fp32 or bf16, or {otherwise}" if used == "fp16" else otherwise


@cache
def torch_dtype(name: str) -> "torch.dtype":
    """The dtype of a user's choice or of a type in a file. KeyError for a type that is not in `FACTORS`."""
    import torch

    dtype: torch.dtype = getattr(torch, in_config(name))
    return dtype


def stored_as(dtype: "torch.dtype") -> str:
    """The name of a dtype in a safetensors file. KeyError for a type that is not in `FACTORS`."""
    return _STORED_OF_TORCH[str(dtype).removeprefix("torch.")]


def spoken(stored: str) -> str:
    """A type in a file as users write it: fp32 for F32; i8 for I8, which they cannot choose."""
    return _CHOICE_OF_STORED.get(stored, stored.lower())


def dtype_name(dtype: "torch.dtype") -> str:
    """A dtype as users write it."""
    return spoken(stored_as(dtype))
