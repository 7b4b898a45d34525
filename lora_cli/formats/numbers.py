"""The numbers of tensors in files by numpy alone: widened exactly, rounded once. No torch."""

from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from lora_cli.precision import BITS, FACTORS, FLOATS8

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Numbers = NDArray[np.floating[Any]]

KINDS: "Final[Mapping[str, np.dtype[Any]]]" = {
    dtype: np.dtype(f"<{'u' if dtype in ('BF16', *FLOATS8) else 'f'}{BITS[dtype] // 8}") for dtype in FACTORS
}
"""The numpy type of the bits of each of `FACTORS`: unsigned integers for bf16 and floats of 8 bits."""
# Of 8-bit floats with a sign: bits of the mantissa, bias of the exponent, bytes that are NaN or Inf.
_FLOAT8: "Final[Mapping[str, tuple[int, int, Sequence[int]]]]" = {
    "F8_E4M3": (3, 7, (127, 255)),
    "F8_E5M2": (2, 15, (124, 125, 126, 127, 252, 253, 254, 255)),
    "F8_E4M3FNUZ": (3, 8, (128,)),
    "F8_E5M2FNUZ": (2, 16, (128,)),
}


class StoredTensor(NamedTuple):
    """A tensor as a file holds it: `dtype` as safetensors names it.

    `bits` holds its numbers, of one of `KINDS`.
    """

    bits: "NDArray[Any]"
    dtype: str

    @property
    def numbers(self) -> "Numbers":
        """The numbers, exactly: fp64 as it is, all others as fp32. KeyError for a type that is not in `FACTORS`."""
        return widened(self.bits, self.dtype)

    @property
    def finite(self) -> bool:
        """Whether no number of an fp16, bf16, fp32 or fp64 is NaN or an infinity."""
        if self.dtype == "BF16":
            return bool(((self.bits & 0x7F80) != 0x7F80).all())
        return bool(np.isfinite(self.bits).all())

    @property
    def zero(self) -> bool:
        """Whether every number of an fp16, bf16, fp32 or fp64 is 0."""
        return not (self.bits & 0x7FFF if self.dtype == "BF16" else self.bits).any()


def widened(bits: "NDArray[Any]", dtype: str) -> "Numbers":
    """`StoredTensor.numbers`."""
    if dtype == "BF16":
        wide: Numbers = np.left_shift(bits, 16, dtype="<u4").view("<f4")
        return wide
    if dtype in FLOATS8:
        table: Numbers = float8_values(dtype).astype("<f4")[bits]
        return table
    numbers: Numbers = bits if dtype == "F64" else bits.astype("<f4", copy=False)
    return numbers


def rounded(numbers: "Numbers", dtype: str) -> StoredTensor:
    """Numbers in fp32 or fp64 in a precision on disk, to the nearest, ties to even; overflows become infinities.

    fp64 goes to bf16 by way of fp32. KeyError for a type that is not in `FLOATS`.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return StoredTensor(numbers.astype(KINDS[dtype], copy=False), dtype)
    with np.errstate(over="ignore"):
        bits = numbers.astype("<f4", copy=False).view("<u4")
    nearest = bits >> 16
    nearest &= 1
    nearest += bits
    nearest += 0x7FFF
    nearest >>= 16
    return StoredTensor(nearest.astype("<u2"), dtype)


@cache
def float8_values(dtype: str) -> "NDArray[np.float64]":
    """The number that each byte stands for, (256,), NaN for what is not finite.

    Source: OCP 8-bit Floating Point Specification 1.0; FNUZ: arXiv 2206.02915; E8M0: OCP Microscaling Formats 1.0.
    """
    byte = np.arange(256)
    values: NDArray[np.float64] = np.exp2(byte - 127.0)
    not_finite: Sequence[int] = (255,)
    if dtype in _FLOAT8:
        width, bias, not_finite = _FLOAT8[dtype]
        exponent = (byte & 127) >> width
        mantissa = (byte & ((1 << width) - 1)) / (1 << width) + (exponent > 0)
        values = np.where(byte < 128, 1.0, -1.0) * np.ldexp(mantissa, np.maximum(exponent, 1) - bias)
    values[list(not_finite)] = np.nan
    return values
